"""A plan: the order of subtasks on every device, with its numbers; JSON both ways, and checks.

The form is documented in docs/planner.md. A plan holds its problem, so it can be checked, drawn
and run by itself; what a file claims is computed anew and compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_rlhfuse.schedule.baselines import merge_backward, one_f_one_b, serial_timeline
from megatron_rlhfuse.schedule.bounds import lower_bound, reaches
from megatron_rlhfuse.schedule.errors import ProblemError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import ROUNDING, Timeline, evaluate
from megatron_rlhfuse.schedule.fields import Fields, is_whole
from megatron_rlhfuse.schedule.order import order_to_tokens, parse_order
from megatron_rlhfuse.schedule.problem import load_json, parse_problem, problem_to_json

VERSION = 1


@dataclass(frozen=True)
class Plan:
    """A schedule and what to compare it with, in the problem's units.

    Attributes:
        lower_bound: no order is shorter
        greedy: makespan of the greedy plan
        seconds: what the search took
    """

    timeline: Timeline
    lower_bound: float
    greedy: float
    seconds: float

    @cached_property
    def serial(self) -> Timeline:
        """One model after the other under 1F1B."""
        return serial_timeline(merge_backward(self.timeline.problem), one_f_one_b)

    @property
    def serial_1f1b(self) -> float:
        return self.serial.makespan

    @property
    def at_bound(self) -> bool:
        return reaches(self.timeline.makespan, self.lower_bound)


def make_plan(timeline: Timeline, *, greedy: float, seconds: float) -> Plan:
    """A plan of a timeline; computes what it is compared with."""
    return Plan(timeline, lower_bound(timeline.problem), greedy, seconds)


def plan_to_json(plan: Plan) -> dict[str, Any]:
    """The JSON form: `parse_plan` makes an equal plan of it."""
    return {
        "version": VERSION,
        "problem": problem_to_json(plan.timeline.problem),
        "order": order_to_tokens(plan.timeline.order),
        "makespan": plan.timeline.makespan,
        "lower_bound": plan.lower_bound,
        "peak_activation": plan.timeline.peak_activation,
        "serial_1f1b": plan.serial_1f1b,
        "greedy": plan.greedy,
        "seconds": plan.seconds,
    }


def load_plan(path: Path | str) -> Plan:
    """Reads and checks a plan. Raises ScheduleError naming the place, OSError without a file."""
    return parse_plan(load_json(path))


def is_plan(data: Any) -> bool:
    """Whether JSON is meant as a plan, not as a problem."""
    return isinstance(data, dict) and "order" in data


def parse_plan(data: Any) -> Plan:
    """A plan from its JSON form.

    Raises ProblemError naming a field, OrderError naming device, position and token for an order
    that is not complete or cannot be executed, or takes more memory than the limit.
    """
    numbers = {"makespan", "lower_bound", "serial_1f1b", "greedy", "seconds"}
    required = {"version", "problem", "order", "peak_activation", *numbers}
    fields = Fields(data, "", required, set(), what="plan")
    if not is_whole(fields.get("version")) or fields.get("version") != VERSION:
        raise ProblemError("version", f"want {VERSION}, the version of plans that is known here")
    try:
        problem = parse_problem(fields.get("problem"))
    except ProblemError as error:
        raise ProblemError(f"problem.{error.field}", error.reason) from error
    timeline = evaluate(problem, parse_order(problem, fields.get("order")))
    claimed = {name: fields.number(name, lowest=0.0, highest=math.inf) for name in sorted(numbers)}
    peaks = fields.numbers(
        "peak_activation", problem.devices, "device", lowest=0.0, highest=math.inf
    )
    _compare("makespan", claimed["makespan"], timeline.makespan)
    for device, (claim, peak) in enumerate(zip(peaks, timeline.peak_activation, strict=True)):
        _compare(f"peak_activation[{device}]", claim, peak)
    plan = make_plan(timeline, greedy=claimed["greedy"], seconds=claimed["seconds"])
    _compare("lower_bound", claimed["lower_bound"], plan.lower_bound)
    _compare("serial_1f1b", claimed["serial_1f1b"], plan.serial_1f1b)
    check_limits(timeline)
    return plan


def check_limits(timeline: Timeline) -> None:
    """Raises ScheduleError naming the first device that takes more memory than its limit."""
    device = timeline.over_limit()
    if device is not None:
        raise ScheduleError(
            f"order: device {device} takes {timeline.peak_activation[device]:g} of activation "
            f"memory, its limit is {timeline.problem.memory_limit[device]:g}"
        )


def _compare(field: str, claimed: float, computed: float) -> None:
    if abs(claimed - computed) > ROUNDING * max(abs(claimed), abs(computed)):
        raise ProblemError(field, f"the file says {claimed:g}, its order and problem {computed:g}")
