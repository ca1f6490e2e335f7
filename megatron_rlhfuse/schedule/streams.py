"""Streams: lists of subtasks with a fixed order on one device, and their merge into an order.

A pipeline is cut into streams, one for each stage or for each device, which together can be
executed; a device with several streams takes from them whatever is ready first.

Invariant: streams that can be executed with a device each can be executed after `merge_streams`.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from megatron_rlhfuse.schedule.evaluate import predecessor
from megatron_rlhfuse.schedule.order import Order, Subtask
from megatron_rlhfuse.schedule.problem import Model, Problem

Stream = tuple[int, list[Subtask]]
"""A device, and subtasks that it runs in this order."""


def stage_1f1b(model: Model, m: int, pipeline: int, stage: int) -> list[Subtask]:
    """F and B of one stage under 1F1B: min(stages - stage - 1, micro-batches) forwards ahead."""
    forward, backward = (
        [Subtask(m, pipeline, kind, number, stage) for number in range(model.micro_batches)]
        for kind in "FB"
    )
    return alternate(forward, backward, model.stages - stage - 1)


def alternate(
    forward: Sequence[Subtask], backward: Sequence[Subtask], warm_up: int
) -> list[Subtask]:
    """The first `warm_up` forwards, then one forward and one backward in turn, then the rest."""
    row = list(forward[:warm_up])
    for i, subtask in enumerate(backward):
        row += forward[warm_up + i : warm_up + i + 1]
        row.append(subtask)
    return row


def delay_weight_gradients(row: Sequence[Subtask], delay: int) -> list[Subtask]:
    """The F and B of one stage, each B followed by the W of the B that came `delay` before it."""
    delayed, waiting = [], []
    for subtask in row:
        delayed.append(subtask)
        if subtask.kind == "B":
            waiting.append(subtask._replace(kind="W"))
            if len(waiting) > delay:
                delayed.append(waiting.pop(0))
    return delayed + waiting


def add_weight_gradients(problem: Problem, order: Sequence[Sequence[Subtask]]) -> Order:
    """An order of F and B with W right after B in the models that split the backward."""
    return [
        [
            each
            for subtask in row
            for each in (
                [subtask, subtask._replace(kind="W")]
                if subtask.kind == "B" and "W" in problem.models[subtask.model].kinds
                else [subtask]
            )
        ]
        for row in order
    ]


def merge_streams(problem: Problem, streams: Sequence[Stream]) -> Order:
    """One row per device, made by running the streams: what can start first goes first.

    Of subtasks that could start at the same time on a device a backward goes before a forward, to
    free memory, then the one that was ready first, then the one nearer to its micro-batch's end.
    """
    order: Order = [[] for _ in range(problem.devices)]
    free = [0.0] * problem.devices
    ended: dict[Subtask, float] = {}
    position = [0] * len(streams)
    waiting: dict[Subtask, list[int]] = {}  # predecessor -> the streams that stand still for it
    heads: list[tuple[float, bool, float, int, int]] = []  # start, tie-breaks, stream

    def offer(number: int) -> None:
        """Puts the next subtask of a stream among the heads, or notes what it waits for."""
        device, row = streams[number]
        if position[number] == len(row):
            return
        subtask = row[position[number]]
        before = predecessor(problem, subtask)
        ready = 0.0
        if before is not None:
            if before not in ended:
                waiting.setdefault(before, []).append(number)
                return
            pipeline = problem.models[subtask.model].pipelines[subtask.pipeline]
            moved = pipeline[before.stage] != device
            ready = ended[before] + (problem.p2p if moved else 0.0)
        way = subtask.stage if subtask.kind != "F" else -subtask.stage
        heapq.heappush(heads, (max(free[device], ready), subtask.kind == "F", ready, way, number))

    for number in range(len(streams)):
        offer(number)
    while heads:
        start, is_forward, ready, way, number = heapq.heappop(heads)
        device, row = streams[number]
        if start < free[device]:  # another stream was taken since this head was offered
            heapq.heappush(heads, (free[device], is_forward, ready, way, number))
            continue
        subtask = row[position[number]]
        order[device].append(subtask)
        position[number] += 1
        free[device] = start + problem.models[subtask.model].duration(subtask.kind, subtask.stage)
        ended[subtask] = free[device]
        for each in [number, *waiting.pop(subtask, [])]:
            offer(each)
    return order
