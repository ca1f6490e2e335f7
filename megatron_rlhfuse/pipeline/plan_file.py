"""A plan that is given: from a file of rank 0 to every rank, checked against the job."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from megatron_rlhfuse.pipeline.broadcast import broadcast_messages
from megatron_rlhfuse.pipeline.devices import DeviceMap
from megatron_rlhfuse.pipeline.errors import PlanMismatchError
from megatron_rlhfuse.schedule.evaluate import Timeline
from megatron_rlhfuse.schedule.lowering import lower
from megatron_rlhfuse.schedule.plan import load_plan, parse_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.replay import prove


def read_plan(path: Path | str, devices: DeviceMap, micro_batches: Sequence[int]) -> Timeline:
    """The plan of a file that rank 0 reads, proved to run on these pipelines. COLLECTIVE.

    Raises PlanMismatchError, ScheduleError or OSError, on every rank.
    """
    text = from_rank_0(lambda: json.dumps(plan_to_json(load_plan(path))))
    timeline = parse_plan(json.loads(text)).timeline
    check_plan(timeline, devices, micro_batches)
    return timeline


def check_plan(timeline: Timeline, devices: DeviceMap, micro_batches: Sequence[int]) -> None:
    """Raises PlanMismatchError unless a plan was made for this job's pipelines.

    Raises ScheduleError for a plan that cannot be run by them.
    """
    check_problem(timeline.problem, devices, micro_batches)
    prove(lower(timeline.problem, timeline.order))


def check_problem(problem: Problem, devices: DeviceMap, micro_batches: Sequence[int]) -> None:
    """Raises PlanMismatchError unless a problem is that of this job's pipelines."""
    if problem.devices != devices.devices:
        raise PlanMismatchError(
            f"the plan is for {problem.devices} devices, this job has {devices.devices} in each "
            f"of its {len(devices.groups)} group(s)"
        )
    if len(problem.models) != len(devices.names):
        raise PlanMismatchError(
            f"the plan is for {len(problem.models)} model(s), this job trains "
            f"{' and '.join(devices.names)}"
        )
    for m, (model, pipelines, count) in enumerate(
        zip(problem.models, devices.pipelines, micro_batches, strict=True)
    ):
        name = devices.names[m]
        if sorted(model.pipelines) != sorted(pipelines):
            raise PlanMismatchError(
                f"models[{m}].pipelines: the plan has {_lists(model.pipelines)}, {name} runs on "
                f"{_lists(pipelines)}: plan for this layout"
            )
        if model.pipelines != pipelines:
            raise PlanMismatchError(
                f"models[{m}].pipelines: want them in the order {_lists(pipelines)}"
            )
        if model.micro_batches != count:
            raise PlanMismatchError(
                f"models[{m}].micro_batches: the plan has {model.micro_batches}, {name} runs "
                f"{count} in a step"
            )


def _lists(pipelines: Sequence[Sequence[int]]) -> str:
    return str([list(pipeline) for pipeline in pipelines])


def from_rank_0(make: Callable[[], str]) -> str:
    """A text of rank 0, on every rank; an error of rank 0 is raised on all. COLLECTIVE."""
    messages, fault = None, None
    if dist.get_rank() == 0:
        try:
            messages = [b"ok", make().encode()]
        except Exception as error:  # whatever it is, the others wait
            fault = error
            messages = [b"error", str(error).encode(errors="replace")]
    status, content = broadcast_messages(messages, 0)
    if status == b"error":
        raise fault or PlanMismatchError(content.decode())
    return content.decode()
