"""A problem in whole numbers, as the network of streams that the search in C++ works on.

Times and activations become multiples of a common unit where they are decimal numbers that have
one, so nothing is rounded and equal problems in other units are the same network. Measured ones
have none: they are rounded, to a 2**-30th of the largest or less. Activations are rounded up and
limits down, half of the evaluator's tolerance above them: a schedule that keeps to the limits in
ticks does so in truth, and a limit that is itself a sum of activations admits that sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from megatron_rlhfuse import _planner
from megatron_rlhfuse.schedule.decimals import as_decimal, common_unit
from megatron_rlhfuse.schedule.errors import InfeasibleError, show_name
from megatron_rlhfuse.schedule.evaluate import ROUNDING, Timeline, evaluate
from megatron_rlhfuse.schedule.order import Order, Subtask
from megatron_rlhfuse.schedule.problem import Model, Problem

TOTAL_TICKS = 2**52
"""Of all subtasks, were each as long as the longest: sums are exact in floats too."""

ScheduleRow = tuple[list[int], int, int]
"""Start of each subtask, makespan and peak activation, in ticks; as `_planner` gives it."""


@dataclass(frozen=True)
class TickedProblem:
    """A problem in ticks and its network.

    Attributes:
        problem: the problem as the user gave it
        ticks: the same in whole numbers, for bounds that must hold exactly in ticks
        time_unit, memory_unit: what a tick is worth
        network: for `_planner`
        limits: memory limit of each device in ticks, `_planner.NO_LIMIT` where there is none
    """

    problem: Problem
    ticks: Problem
    time_unit: float
    memory_unit: float
    network: _planner.Network
    limits: list[int]
    streams: tuple[tuple[int, int, str, int, int], ...]  # model, pipeline, kind, stage, device

    def order(self, row: ScheduleRow) -> Order:
        """The subtasks of every device by their start."""
        starts = row[0]
        cells: list[list[tuple[int, Subtask]]] = [[] for _ in range(self.problem.devices)]
        position = 0
        for m, pipeline, kind, stage, device in self.streams:
            for k in range(self.problem.models[m].micro_batches):
                cells[device].append((starts[position], Subtask(m, pipeline, kind, k, stage)))
                position += 1
        return [[subtask for _, subtask in sorted(row)] for row in cells]

    def timeline(self, row: ScheduleRow) -> Timeline:
        """The schedule under the reference evaluator, in the user's units."""
        return evaluate(self.problem, self.order(row))

    def row(self, order: Sequence[Sequence[Subtask]]) -> ScheduleRow:
        """An order, timed in ticks, for `_planner`."""
        timed = evaluate(self.ticks, order)
        start_of = {
            subtask: start
            for row, starts in zip(timed.order, timed.start, strict=True)
            for subtask, start in zip(row, starts, strict=True)
        }
        starts = [
            int(start_of[Subtask(m, pipeline, kind, k, stage)])
            for m, pipeline, kind, stage, _ in self.streams
            for k in range(self.problem.models[m].micro_batches)
        ]
        return starts, int(timed.makespan), int(max(timed.peak_activation))


def to_network(problem: Problem) -> TickedProblem:
    """Raises InfeasibleError if a device cannot hold one micro-batch of each pipeline alone."""
    times = [problem.p2p]
    sizes: list[float] = []
    for model in problem.models:
        times += [*model.forward, *model.backward, *(model.weight_gradient or ())]
        sizes += model.activation
    most = TOTAL_TICKS // problem.subtasks
    time_unit = _unit(times, most)
    memory_unit = _unit(sizes, most)
    models = tuple(_ticked(model, time_unit, memory_unit) for model in problem.models)
    ticked_limits = tuple(_limit_in_ticks(limit, memory_unit) for limit in problem.memory_limit)
    p2p = float(_in_ticks(problem.p2p, time_unit, round))
    ticks = replace(problem, models=models, p2p=p2p, memory_limit=ticked_limits)
    _check_limits(problem, ticks)
    network, streams = _build(ticks)
    return TickedProblem(
        problem=problem,
        ticks=ticks,
        time_unit=float(time_unit[0]),
        memory_unit=float(memory_unit[0]),
        network=network,
        limits=[_planner.NO_LIMIT if math.isinf(x) else int(x) for x in ticked_limits],
        streams=streams,
    )


_Unit = tuple[Fraction, bool]
"""What a tick is worth, and whether all values are whole multiples of it."""


def _unit(values: Iterable[float], most: int) -> _Unit:
    """A unit of which the largest value takes at most `most`."""
    listed = list(values)
    largest = max(listed)
    decimals = [as_decimal(value) for value in listed]
    known = [value for value in decimals if value is not None]
    if len(known) == len(decimals):
        unit = common_unit(known)
        if largest / unit <= most:
            return unit, True
    return Fraction(largest) / most, False


def _in_ticks(value: float, unit: _Unit, rounding: Callable[[Fraction], int]) -> int:
    exact = as_decimal(value) if unit[1] else None
    return rounding((Fraction(value) if exact is None else exact) / unit[0])


def _limit_in_ticks(limit: float, unit: _Unit) -> float:
    """Infinite where no sum of activations can come near it."""
    if math.isinf(limit):
        return limit
    ticks = math.floor(Fraction(limit) * (1 + Fraction(ROUNDING) / 2) / unit[0])
    return float(ticks) if ticks < TOTAL_TICKS else math.inf


def _ticked(model: Model, time_unit: _Unit, memory_unit: _Unit) -> Model:
    def times(values: Iterable[float]) -> tuple[float, ...]:
        return tuple(float(max(1, _in_ticks(value, time_unit, round))) for value in values)

    weight = None if model.weight_gradient is None else times(model.weight_gradient)
    backward = times(model.backward)
    if weight is not None:  # what is left of the backward keeps at least a tick
        backward = tuple(max(b, w + 1.0) for b, w in zip(backward, weight, strict=True))
    return replace(
        model,
        forward=times(model.forward),
        backward=backward,
        weight_gradient=weight,
        activation=tuple(
            float(_in_ticks(value, memory_unit, math.ceil)) for value in model.activation
        ),
    )


def _check_limits(problem: Problem, ticks: Problem) -> None:
    for m, model in enumerate(ticks.models):
        for pipeline in model.pipelines:
            needed = dict.fromkeys(pipeline, 0.0)
            for stage, device in enumerate(pipeline):
                needed[device] += model.activation[stage]
            for device, size in needed.items():
                if size > ticks.memory_limit[device]:
                    one = problem.models[m]
                    held = sum(
                        size
                        for place, size in zip(pipeline, one.activation, strict=True)
                        if place == device
                    )
                    raise InfeasibleError(
                        f"memory_limit: device {device} has {problem.memory_limit[device]:g}, a "
                        f"micro-batch of {show_name(one.name) if one.name else f'models[{m}]'} "
                        f"takes {held:g} there"
                    )


def _build(
    ticks: Problem,
) -> tuple[_planner.Network, tuple[tuple[int, int, str, int, int], ...]]:
    rows: list[tuple[int, int, int, int, int, int, int, bool, bool]] = []
    links: list[tuple[int, int, int]] = []
    names: list[tuple[int, int, str, int, int]] = []
    slot = line = 0
    for m, model in enumerate(ticks.models):
        for k, pipeline in enumerate(model.pipelines):
            number: dict[tuple[str, int], int] = {}
            for kind in model.kinds:
                for stage, device in enumerate(pipeline):
                    number[kind, stage] = len(rows)
                    names.append((m, k, kind, stage, device))
                    rows.append(
                        (
                            line,
                            device,
                            slot + stage,
                            model.micro_batches,
                            model.stages - stage,
                            int(model.duration(kind, stage)),
                            int(model.activation[stage]),
                            kind == "F",
                            kind == model.kinds[-1],
                        )
                    )
            links += _links(model, pipeline, number, int(ticks.p2p))
            slot += model.stages
            line += 1
    return _planner.Network(rows, links, ticks.devices), tuple(names)


def _links(
    model: Model, pipeline: tuple[int, ...], number: dict[tuple[str, int], int], p2p: int
) -> Iterable[tuple[int, int, int]]:
    """(from, to, delay) of a pipeline; see `evaluate.predecessor`."""
    last = model.stages - 1
    yield number["F", last], number["B", last], 0
    for stage in range(last):
        delay = p2p if pipeline[stage] != pipeline[stage + 1] else 0
        yield number["F", stage], number["F", stage + 1], delay
        yield number["B", stage + 1], number["B", stage], delay
    if "W" in model.kinds:
        below: dict[int, int] = {}  # the stage met last on a device
        for stage in range(last, -1, -1):
            yield number["B", stage], number["W", stage], 0
            # Tokens name no stage: on one device a micro-batch's W run from the last stage down.
            if pipeline[stage] in below:
                yield number["W", below[pipeline[stage]]], number["W", stage], 0
            below[pipeline[stage]] = stage
