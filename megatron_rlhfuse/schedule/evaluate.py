"""When every subtask of an order runs, and what memory it takes: the reference in plain Python.

It shares no code with the search in C++, so that each can test the other.

Definitions (RLHFuse, section 5.2):
- a subtask starts at the later of: the end of the subtask before it on its device; the end of its
  predecessor in its pipeline, plus `p2p` if that ran on another device;
- the predecessor of F on stage s is F on stage s - 1; of B on the last stage its own F, of B on
  stage s the B on stage s + 1; of W its own B;
- the makespan is the latest end;
- the activation memory of a device changes with the start of an F and the end of the B (of the W
  where the backward is split): its peak depends on the device's order alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlhfuse.schedule.errors import OrderError
from megatron_rlhfuse.schedule.order import Order, Subtask, order_to_tokens
from megatron_rlhfuse.schedule.problem import Problem

ROUNDING = 1e-9
"""Relative: how far sums of the same numbers may differ, at most, for their order."""


@dataclass(frozen=True)
class Timeline:
    """An order with its times.

    Attributes:
        order: the subtasks of every device
        start: start of each subtask, in the shape of `order`
        makespan: the latest end
        peak_activation: highest activation memory, [devices]
    """

    problem: Problem
    order: Order
    start: list[list[float]]
    makespan: float
    peak_activation: list[float]

    def end(self, device: int, position: int) -> float:
        subtask = self.order[device][position]
        model = self.problem.models[subtask.model]
        return self.start[device][position] + model.duration(subtask.kind, subtask.stage)

    def over_limit(self) -> int | None:
        """The first device whose peak is above its memory limit, if there is one."""
        limits = self.problem.memory_limit
        for device, (peak, limit) in enumerate(zip(self.peak_activation, limits, strict=True)):
            if peak > limit * (1 + ROUNDING):
                return device
        return None

    def bubble_fraction(self) -> float:
        """Idle share of all devices' time until the makespan."""
        return 1.0 - sum(self.problem.work()) / (self.problem.devices * self.makespan)


def evaluate(problem: Problem, order: Sequence[Sequence[Subtask]]) -> Timeline:
    """Runs an order that `parse_order` accepted, or that holds the same subtasks.

    Raises OrderError where subtasks wait for each other in a circle: the order cannot be executed.
    """
    rows = [list(row) for row in order]
    ended: dict[Subtask, float] = {}
    start: list[list[float]] = [[] for _ in rows]
    free = [0.0] * len(rows)
    runnable = list(range(len(rows)))
    waiting: dict[Subtask, int] = {}  # predecessor -> the device that stands still for it
    while runnable:
        device = runnable.pop()
        row, times = rows[device], start[device]
        while len(times) < len(row):
            subtask = row[len(times)]
            before = predecessor(problem, subtask)
            ready = 0.0
            if before is not None:
                if before not in ended:
                    waiting[before] = device
                    break
                model = problem.models[subtask.model]
                pipeline = model.pipelines[subtask.pipeline]
                moved = pipeline[before.stage] != pipeline[subtask.stage]
                ready = ended[before] + (problem.p2p if moved else 0.0)
            begin = max(free[device], ready)
            times.append(begin)
            free[device] = begin + problem.models[subtask.model].duration(
                subtask.kind, subtask.stage
            )
            ended[subtask] = free[device]
            if subtask in waiting:
                runnable.append(waiting.pop(subtask))
    if any(len(times) < len(row) for times, row in zip(start, rows, strict=True)):
        raise _circle(problem, rows, [len(times) for times in start])
    return Timeline(problem, rows, start, max(free), peak_activation(problem, rows))


def predecessor(problem: Problem, subtask: Subtask) -> Subtask | None:
    """What must end before `subtask` in its own pipeline."""
    # Called for every subtask of every evaluation: the constructor is three times as fast as
    # `_replace`.
    model, pipeline, kind, micro_batch, stage = subtask
    if kind == "F":
        return Subtask(model, pipeline, "F", micro_batch, stage - 1) if stage else None
    if kind == "W":
        return Subtask(model, pipeline, "B", micro_batch, stage)
    if stage == problem.models[model].stages - 1:
        return Subtask(model, pipeline, "F", micro_batch, stage)
    return Subtask(model, pipeline, "B", micro_batch, stage + 1)


def memory_changes(problem: Problem, row: Sequence[Subtask]) -> list[tuple[float, float]]:
    """For each subtask of a device: what it adds at its start and what it frees at its end."""
    changes = []
    for subtask in row:
        model = problem.models[subtask.model]
        size = model.activation[subtask.stage]
        changes.append(
            (
                size if subtask.kind == "F" else 0.0,
                size if subtask.kind == model.kinds[-1] else 0.0,
            )
        )
    return changes


def peak_activation(problem: Problem, order: Sequence[Sequence[Subtask]]) -> list[float]:
    """Highest activation memory of every device, [devices].

    Held activations are counted, not summed up step by step: rounding cannot add up.
    """
    peaks = []
    for row in order:
        held: dict[float, int] = {}
        peak = 0.0
        for added, freed in memory_changes(problem, row):
            if added:
                held[added] = held.get(added, 0) + 1
                peak = max(peak, sum(size * count for size, count in held.items()))
            if freed:
                held[freed] = held.get(freed, 0) - 1
        peaks.append(peak)
    return peaks


def _circle(problem: Problem, order: Order, reached: list[int]) -> OrderError:
    """The error for an order whose devices have all stopped, device d at position reached[d]."""
    position = {
        subtask: (device, i) for device, row in enumerate(order) for i, subtask in enumerate(row)
    }
    device = next(d for d, row in enumerate(order) if reached[d] < len(row))
    visited: list[int] = []
    while device not in visited:
        visited.append(device)
        before = predecessor(problem, order[device][reached[device]])
        assert before is not None
        device, _ = position[before]
    circle = visited[visited.index(device) :]
    waits = []
    for each in circle:
        before = predecessor(problem, order[each][reached[each]])
        assert before is not None
        where, i = position[before]
        waits.append(
            f"{order[each][reached[each]].token} on device {each} waits for {before.token} on "
            f"device {where}, position {i}"
        )
    return OrderError(
        order_to_tokens(order), circle[0], reached[circle[0]], "a deadlock: " + "; ".join(waits)
    )
