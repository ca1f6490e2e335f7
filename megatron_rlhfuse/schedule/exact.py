"""The shortest schedule, or how short it can be at best, by constraint programming (CP-SAT).

It judges the search: hundreds of subtasks are often solved to the optimum in seconds, thousands
in minutes if at all, and a memory limit makes it slower. It shares no code with bounds.py: each
tests the other.

Micro-batches run in order on every stage: no loss, by the argument in bounds.py. The W of one
micro-batch run on a device as tokens imply, from its last stage there to its first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from megatron_rlhfuse.schedule.decimals import MAX_DECIMALS, as_decimal, common_unit
from megatron_rlhfuse.schedule.errors import InfeasibleError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate, predecessor
from megatron_rlhfuse.schedule.order import Order, Subtask, subtasks_of
from megatron_rlhfuse.schedule.problem import Problem

MAX_SUM = 2**50
"""Of all times in their common unit; CP-SAT computes with 64 bits and multiplies some."""


@dataclass(frozen=True)
class Exact:
    """What CP-SAT found.

    Attributes:
        timeline: the best order found, run by `evaluate`
        bound: no order that keeps to the memory limits has a shorter makespan
        optimal: whether the order is proven to be one of the shortest
    """

    timeline: Timeline
    bound: float
    optimal: bool


def solve_exactly(problem: Problem, seconds: float, memory: float | None = None) -> Exact:
    """An order of least makespan under the memory limits, or the best found within `seconds`.

    `memory` caps the peak activation of every device, besides the limits of the problem. Sums of
    activations are compared as decimal numbers: three of 0.1 fit into 0.3.

    One thread and a fixed seed: the result is the same every time, unless the time runs out.

    Raises InfeasibleError where no order keeps to the limits or none was found in time; other
    ScheduleErrors where OR-tools is missing, where times or activations have too many digits, and
    where no order was found in time though there is no limit.
    """
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise ScheduleError("OR-tools is missing: pip install megatron_rlhfuse[exact]") from None
    cap = math.inf if memory is None else memory
    limits = [min(limit, cap) for limit in problem.memory_limit]
    times = _Times(problem)
    model = cp_model.CpModel()
    starts = _add_subtasks(model, problem, times)
    _add_memory_limits(model, problem, limits, times, starts)

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.random_seed = 0
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        raise InfeasibleError("no order keeps to the memory limits")
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        limited = not all(map(math.isinf, limits))
        error = InfeasibleError if limited else ScheduleError
        raise error(f"no order was found within {seconds:g} s; more time may help")

    order: Order = [[] for _ in range(problem.devices)]
    for subtask in sorted(starts, key=lambda each: solver.value(starts[each])):
        order[_device(problem, subtask)].append(subtask)
    return Exact(
        timeline=evaluate(problem, order),
        bound=float(round(solver.best_objective_bound) * times.unit),
        optimal=status == cp_model.OPTIMAL,
    )


class _Times:
    """The times of a problem in the largest unit of which all of them are multiples."""

    def __init__(self, problem: Problem) -> None:
        lag = _exact(problem.p2p, "p2p")
        durations: dict[tuple[int, int, str], Fraction] = {}
        for m, model in enumerate(problem.models):
            for stage in range(model.stages):
                where = f"models[{m}], stage {stage}"
                forward = _exact(model.forward[stage], f"{where}: forward")
                backward = _exact(model.backward[stage], f"{where}: backward")
                weight = Fraction(0)
                if model.weight_gradient is not None:
                    weight = _exact(model.weight_gradient[stage], f"{where}: weight_gradient")
                    durations[m, stage, "W"] = weight
                durations[m, stage, "F"] = forward
                durations[m, stage, "B"] = backward - weight
        self.unit = common_unit([lag, *durations.values()])
        self.lag = int(lag / self.unit)
        self._durations = {key: int(time / self.unit) for key, time in durations.items()}
        # Until the last end of an order that runs without delay, something runs or is on its way.
        self.horizon = sum(
            (time + self.lag) * problem.models[m].micro_batches * len(problem.models[m].pipelines)
            for (m, _, _), time in self._durations.items()
        )
        if self.horizon > MAX_SUM:
            raise ScheduleError(
                f"times: all together {self.horizon} of their common unit {float(self.unit):g}, "
                f"at most {MAX_SUM} can be solved; round them"
            )

    def duration(self, subtask: Subtask) -> int:
        return self._durations[subtask.model, subtask.stage, subtask.kind]


def _add_subtasks(model: Any, problem: Problem, times: _Times) -> dict[Subtask, Any]:
    """Start variables, what must end before what, one subtask at a time, and the objective."""
    starts: dict[Subtask, Any] = {}
    intervals: list[list[Any]] = [[] for _ in range(problem.devices)]
    for m, described in enumerate(problem.models):
        for pipeline in range(len(described.pipelines)):
            for device, subtask in subtasks_of(problem, m, pipeline):
                time = times.duration(subtask)
                start = model.new_int_var(0, times.horizon - time, subtask.token)
                starts[subtask] = start
                intervals[device].append(model.new_fixed_size_interval_var(start, time, ""))
    for each in intervals:
        model.add_no_overlap(each)
    makespan = model.new_int_var(0, times.horizon, "makespan")
    model.minimize(makespan)
    for subtask, start in starts.items():
        model.add(start + times.duration(subtask) <= makespan)
        for before in _predecessors(problem, subtask):
            moved = _device(problem, before) != _device(problem, subtask)
            lag = times.lag if moved else 0
            model.add(starts[before] + times.duration(before) + lag <= start)
    return starts


def _predecessors(problem: Problem, subtask: Subtask) -> list[Subtask]:
    """What must end before `subtask`: in its pipeline, on its stage, and by the rule of tokens."""
    found = []
    before = predecessor(problem, subtask)
    if before is not None:
        found.append(before)
    if subtask.micro_batch:
        found.append(subtask._replace(micro_batch=subtask.micro_batch - 1))
    if subtask.kind == "W":
        devices = problem.models[subtask.model].pipelines[subtask.pipeline]
        for later in range(subtask.stage + 1, len(devices)):
            if devices[later] == devices[subtask.stage]:
                found.append(subtask._replace(stage=later))
                break
    return found


def _add_memory_limits(
    model: Any, problem: Problem, limits: list[float], times: _Times, starts: dict[Subtask, Any]
) -> None:
    """A micro-batch occupies a stage's device from the start of F to the end of B (of W).

    Where F starts at the very end of a B, that B is before it on the device and has freed its
    activation, in CP-SAT as in `evaluate`.
    """
    held: list[list[tuple[Any, Fraction]]] = [[] for _ in range(problem.devices)]
    for subtask, start in starts.items():
        device, described = _device(problem, subtask), problem.models[subtask.model]
        if subtask.kind != "F" or math.isinf(limits[device]):
            continue
        where = f"models[{subtask.model}], stage {subtask.stage}: activation"
        size = _exact(described.activation[subtask.stage], where)
        release = subtask._replace(kind=described.kinds[-1])
        end = starts[release] + times.duration(release)
        length = model.new_int_var(0, times.horizon, "")
        held[device].append((model.new_interval_var(start, length, end, ""), size))
    for each, limit in zip(held, limits, strict=True):
        if each:
            unit = common_unit(size for _, size in each)
            demands = [int(size / unit) for _, size in each]
            capacity = math.floor(Fraction(repr(float(limit))) / unit)
            model.add_cumulative(
                [interval for interval, _ in each], demands, min(capacity, sum(demands))
            )


def _device(problem: Problem, subtask: Subtask) -> int:
    return problem.models[subtask.model].pipelines[subtask.pipeline][subtask.stage]


def _exact(value: float, field: str) -> Fraction:
    """The decimal number that prints as `value`. Raises ScheduleError if it has many digits."""
    decimal = as_decimal(value)
    if decimal is None:
        raise ScheduleError(f"{field}: {value!r} has more than {MAX_DECIMALS} decimals; round it")
    return decimal
