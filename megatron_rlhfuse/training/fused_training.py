"""Intra-stage fusion in the trainer: actor and critic take their step in one fused pipeline.

The two steps are those of `TrainedModel.step`, with one pipeline in the place of two: gradients,
and so weights, are the same bit for bit.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.observe.jsonl import write_atomically
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.pipeline.fused import FusedPipeline, FusionOptions, StepReport
from megatron_rlhfuse.pipeline.model import ForwardStep
from megatron_rlhfuse.pipeline.plan_cache import default_folder
from megatron_rlhfuse.pipeline.stage import StepInput
from megatron_rlhfuse.schedule.errors import InfeasibleError
from megatron_rlhfuse.schedule.evaluate import Timeline
from megatron_rlhfuse.schedule.plan import make_plan, plan_to_json
from megatron_rlhfuse.schedule.search import greedy
from megatron_rlhfuse.training.trained_model import StepResult, TrainedModel, TrainedModels
from megatron_rlhfuse.training.training_data import MicroBatch

MEASURED_TRACK = "pipeline"
PLANNED_TRACK = "pipeline, planned"
_CATEGORIES = ("actor_training", "critic_training")


@dataclass(frozen=True)
class ModelStep:
    """What one model does in a fused step.

    metrics: names of what its loss function reports
    most_tokens: that a micro-batch may have, if there is a limit
    """

    forward_step: ForwardStep
    micro_batches: Sequence[MicroBatch]
    metrics: Sequence[str]
    most_tokens: int | None = None


@dataclass(frozen=True)
class FusionTimes:
    """The fused steps of an iteration on this rank: seconds, summed up over those timed.

    timed: steps that were timed: all of them with a trace, else what planning needed
    measured: from the steps' starts to the last forward or backward of this rank
    busy: in forwards and backwards
    planned_steps: those of them that ran a plan of measured stage times
    planned: makespans of these plans
    measured_against: what `measured` has of these steps
    """

    steps: int
    plan: str
    timed: int
    measured: float
    busy: float
    planned_steps: int
    planned: float
    measured_against: float


@dataclass
class FusedTraining:
    """Actor and critic of this rank in one pipeline."""

    models: TrainedModels
    pipeline: FusedPipeline
    tracer: Tracer
    _reports: list[StepReport] = field(default_factory=list)
    _undrawn: StepReport | None = None
    """The step whose plan is not in the trace yet."""
    _written: Timeline | None = None

    @classmethod
    def build(
        cls, args: argparse.Namespace, models: TrainedModels, tracer: Tracer
    ) -> FusedTraining:
        """COLLECTIVE over all ranks."""
        actor, critic = models.actor, models.critic
        assert critic is not None, "without a critic there is nothing to fuse with"
        options = FusionOptions(
            plan=args.rlhfuse_plan,
            search_seconds=args.rlhfuse_plan_seconds,
            cache=_cache_folder(args.rlhfuse_plan_cache),
            memory_limit=_bytes(args.rlhfuse_activation_memory_gib),
            timeout_s=args.rlhfuse_stage_timeout,
            record=args.rlhfuse_trace,
        )
        pipeline = FusedPipeline(
            ("actor", "critic"),
            (actor.model, critic.model),
            (actor.groups.pgc, critic.groups.pgc),
            options,
        )
        return cls(models, pipeline, tracer)

    def step(self, actor: ModelStep, critic: ModelStep) -> tuple[StepResult, StepResult]:
        """One optimizer step of both models. COLLECTIVE over all ranks."""
        assert self.models.critic is not None
        models = (self.models.actor, self.models.critic)
        for model in models:
            model.zero_grad()
        with self.tracer.span("fused step", "training"):
            reported = self.pipeline.run([_input(step) for step in (actor, critic)])
        report = self.pipeline.last_step
        assert report is not None
        self._reports.append(report)
        self._trace(report)
        return tuple(  # type: ignore[return-value]
            self._finish(model, found, step.metrics)
            for model, found, step in zip(models, reported, (actor, critic), strict=True)
        )

    def take_times(self) -> FusionTimes | None:
        """The fused steps since the last call; None without any."""
        self._trace_plan()
        reports, self._reports = self._reports, []
        if not reports:
            return None
        timed = [report for report in reports if report.spans]
        planned = [report for report in timed if report.is_measured]
        return FusionTimes(
            steps=len(reports),
            plan=reports[-1].source,
            timed=len(timed),
            measured=math.fsum(report.makespan for report in timed),
            busy=math.fsum(report.busy for report in timed),
            planned_steps=len(planned),
            planned=math.fsum(report.timeline.makespan for report in planned),
            measured_against=math.fsum(report.makespan for report in planned),
        )

    def write_plan(self, path: Path) -> None:
        """Writes the plan that runs, once its times are measured ones, for `rlhfuse plan`.

        Does nothing where the file holds it already. For one rank.
        """
        report = self.pipeline.last_step
        if report is None or not report.is_measured or report.timeline is self._written:
            return
        timeline = self._written = report.timeline
        try:
            first = greedy(timeline.problem).makespan
        except InfeasibleError:
            first = timeline.makespan
        plan = make_plan(timeline, greedy=first, seconds=0.0)
        write_atomically(path, json.dumps(plan_to_json(plan)))

    def close(self) -> None:
        """Ends a search for a plan that is still going on."""
        self.pipeline.close()

    def _finish(
        self, model: TrainedModel, reported: Sequence[dict[str, torch.Tensor]], names: Sequence[str]
    ) -> StepResult:
        with self.tracer.span(f"{model.name} optimizer", f"{model.name}_training"):
            return model.finish_step(reported, names)

    def _trace(self, report: StepReport) -> None:
        """What ran when, and beside it when the plan has it, if the step was timed."""
        if not report.spans:
            return
        self._trace_plan(until=report.began)
        self._undrawn = report if report.is_measured else None
        for span in report.spans:
            instruction = span.instruction
            self.tracer.add(
                instruction.token,
                report.began + span.start,
                report.began + span.end,
                MEASURED_TRACK,
                _CATEGORIES[instruction.model],
                stage=instruction.stage,
                micro_batch=instruction.micro_batch,
            )

    def _trace_plan(self, until: float = math.inf) -> None:
        """When the plan has what the last step did, cut off where the next step began.

        A step may take less than its plan says: its responses are shorter than those measured.
        """
        report, self._undrawn = self._undrawn, None
        if report is None:
            return
        timeline, device = report.timeline, report.device
        for position, subtask in enumerate(timeline.order[device]):
            start = report.began + timeline.start[device][position]
            if start >= until:
                break
            self.tracer.add(
                subtask.token,
                start,
                min(report.began + timeline.end(device, position), until),
                PLANNED_TRACK,
                _CATEGORIES[subtask.model],
                stage=subtask.stage,
                micro_batch=subtask.micro_batch,
            )


def reduce_times(times: FusionTimes | None) -> dict[str, float | str]:
    """Metrics of an iteration's fused steps, over all ranks. COLLECTIVE.

    Times are left out where no step was timed, that of the plan where it was not known.
    """
    mine = torch.tensor(
        [times.measured, times.measured_against, times.busy] if times is not None else [0.0] * 3,
        dtype=torch.float64,
        device=platform.device(),
    )
    longest, total = mine.clone(), mine.clone()
    dist.all_reduce(longest, dist.ReduceOp.MAX)
    dist.all_reduce(total)
    if times is None:
        return {}
    values: dict[str, float | str] = {"fusion_plan": times.plan, "fused_steps": times.steps}
    if not times.timed:
        return values
    measured = float(longest[0])
    values["makespan_s"] = measured / times.timed
    values["bubble_fraction"] = 1 - float(total[2]) / (measured * dist.get_world_size())
    if times.planned_steps:
        values["planned_makespan_s"] = times.planned / times.planned_steps
        values["makespan_over_planned"] = float(longest[1]) / times.planned
    return values


def _input(step: ModelStep) -> StepInput:
    tokens = [rows.batch.tokens for rows in step.micro_batches]
    return StepInput(
        forward_step_func=step.forward_step,
        data_iterator=iter(step.micro_batches),
        sequence_lengths=tuple(part.shape[1] for part in tokens),
        batch_sizes=tuple(part.shape[0] for part in tokens),
        most_tokens=step.most_tokens,
    )


def _cache_folder(given: str | None) -> str | None:
    if given is None:
        return str(default_folder())
    return None if given == "none" else given


def _bytes(gib: float | None) -> float | None:
    return None if gib is None else gib * 2**30
