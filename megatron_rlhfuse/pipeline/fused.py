"""Models on the same ranks, trained by one fused pipeline: stages, channels and plan together."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.autoplan import AutoPlan, PlanOptions
from megatron_rlhfuse.pipeline.clock import Span, make_clock
from megatron_rlhfuse.pipeline.devices import map_devices
from megatron_rlhfuse.pipeline.errors import PipelineError
from megatron_rlhfuse.pipeline.executor import execute
from megatron_rlhfuse.pipeline.links import Transfers, build_links, measure_transfer
from megatron_rlhfuse.pipeline.memory import ActivationMeter
from megatron_rlhfuse.pipeline.plan_book import PlanBook
from megatron_rlhfuse.pipeline.profile import step_costs
from megatron_rlhfuse.pipeline.rank_layouts import gather_layouts, gather_rows
from megatron_rlhfuse.pipeline.stage import Stage, StepInput
from megatron_rlhfuse.schedule.evaluate import Timeline

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


GRACE = timedelta(seconds=60)
"""What NCCL's watchdog leaves the pipeline to say by itself who stands still."""


@dataclass(frozen=True)
class FusionOptions(PlanOptions):
    """How a fused pipeline is planned and watched.

    Attributes:
        timeout_s: longest wait for a peer; a rank that waits longer raises PipelineError
        record: time every instruction of every step, for traces and metrics; else only those
            steps that planning needs
        meter: measure the peak of activation memory in every step; slow
    """

    timeout_s: float = 600.0
    record: bool = False
    meter: bool = False


@dataclass(frozen=True)
class StepReport:
    """One fused step on this rank.

    Attributes:
        source: where its plan came from: 1f1b, greedy, search, cache or file
        timeline: that plan; its times are seconds if `is_measured`
        began: time.time() at the start of the step
        spans: when this rank's forwards and backwards ran; empty unless recorded
        peak_activation: bytes that autograd held at most, None unless metered
    """

    source: str
    timeline: Timeline
    is_measured: bool
    device: int
    began: float
    spans: list[Span] = field(default_factory=list)
    peak_activation: int | None = None

    @property
    def makespan(self) -> float:
        """Seconds until this rank's last instruction ended."""
        return self.spans[-1].end if self.spans else math.nan

    @property
    def busy(self) -> float:
        """Seconds that this rank computed."""
        return math.fsum(span.end - span.start for span in self.spans)


class FusedPipeline:
    """The stages of two models on this rank, their channels and their plan."""

    def __init__(
        self,
        names: Sequence[str],
        models: Sequence[torch.nn.Module],
        process_groups: Sequence[ProcessGroupCollection | None],
        options: FusionOptions | None = None,
    ) -> None:
        """COLLECTIVE over all ranks of the job, each with its part of every model.

        process_groups: of every model; a rank that has None for one is refused, with all others
        Raises LayoutError, on every rank, for layouts that cannot be fused, and ValueError for a
        model that cannot be run in a fused pipeline.
        """
        self.options = options or FusionOptions()
        self._timeout = timedelta(seconds=self.options.timeout_s)
        # First, on every rank: one that lacks a model has no stage to make.
        layouts = gather_layouts(names, process_groups)
        self.devices = map_devices(names, layouts)
        present = [groups for groups in process_groups if groups is not None]
        self.stages = [
            Stage(name, model, groups)
            for name, model, groups in zip(names, models, present, strict=True)
        ]
        _, self._device = self.devices.locate(dist.get_rank())
        self._links = [
            build_links(layout, name, self._timeout + GRACE)
            for name, layout in zip(names, layouts, strict=True)
        ]
        self._control = dist.new_group(
            backend="gloo", timeout=self._timeout, group_desc="fused pipeline"
        )
        self._plans = PlanBook(self.devices, self.options)
        self._broken = False
        self.last_step: StepReport | None = None

    def run(self, steps: Sequence[StepInput], forward_only: bool = False) -> list[list[Any]]:
        """Forward and backward of all micro-batches of all models; gradients are finalized.

        COLLECTIVE over all ranks of the job. Returns for every model what its loss function
        reported per micro-batch; empty before the last stage. After an error in a step it refuses
        to run again: messages of that step may still be under way, and would be taken for others.
        """
        self._agree(steps, forward_only)
        plan = self._plan(steps)
        program = plan.program(self._device, forward_only)
        timed = not forward_only and (self.options.record or plan.profiling)
        metered = not forward_only and (self.options.meter or plan.measures_memory)
        meter = self._meter() if metered else None
        for stage, step in zip(self.stages, steps, strict=True):
            stage.begin(step, forward_only, meter)
        transfers = [
            Transfers(
                links, stage.message_shapes(step), stage.config.pipeline_dtype, not forward_only
            )
            for links, stage, step in zip(self._links, self.stages, steps, strict=True)
        ]
        clock = make_clock() if timed else None
        self._broken = True
        execute(program, self.stages, transfers, self._timeout, clock)
        for stage in self.stages:
            stage.finish()
        for stage in self.stages:  # the same order on every rank: these are collectives
            stage.finalize()
        self._broken = False
        spans = clock.spans() if clock is not None else []
        if not forward_only:
            self.last_step = StepReport(
                plan.source,
                plan.timeline,
                plan.is_measured,
                self._device,
                clock.began if clock is not None else math.nan,
                spans,
                meter.peak if meter is not None else None,
            )
            costs = None
            if plan.profiling:
                activations = [stage.planned_activation for stage in self.stages]
                costs = step_costs(spans, len(self.stages), activations)
            plan.after_step(costs)
        return [stage.collected for stage in self.stages]

    def close(self) -> None:
        """Ends a search for a plan that is still going on."""
        self._plans.close()

    def _meter(self) -> ActivationMeter:
        return ActivationMeter(p for stage in self.stages for p in stage.model.parameters())

    def _plan(self, steps: Sequence[StepInput]) -> AutoPlan:
        """The plan for these numbers of micro-batches. COLLECTIVE."""
        sizes = [
            max(shape.numel() for shape in stage.message_shapes(step))
            for stage, step in zip(self.stages, steps, strict=True)
        ]
        return self._plans.plan(
            tuple(step.micro_batches for step in steps),
            tuple(max(step.tokens, step.most_tokens or 0) for step in steps),
            lambda: self._key(steps),
            lambda: self._measure_transfer(sizes),
        )

    def _agree(self, steps: Sequence[StepInput], forward_only: bool) -> None:
        """COLLECTIVE, at the head of a step. Raises, on every rank, where they want different ones.

        A transport would put a shorter message into a longer buffer without a word. Runs on the
        host, so that a GPU is not waited for.
        """
        row = [int(self._broken), int(forward_only)]
        for stage, step in zip(self.stages, steps, strict=True):
            lengths = repr((step.sequence_lengths, step.batch_sizes, stage.config.pipeline_dtype))
            row += [step.micro_batches, zlib.crc32(lengths.encode())]
        try:
            table = gather_rows(row, self._control)
        except RuntimeError as error:
            reason = f"not all ranks came to it: {error}"
            raise PipelineError(dist.get_rank(), 0, "head of the step", None, reason) from error
        if any(row[0] for row in table):
            raise RuntimeError(
                "a step of this fused pipeline failed: end the job and go on from a checkpoint"
            )
        if len({row[1] for row in table}) > 1:
            raise ValueError("forward_only: some ranks say True, others False")
        for m, (name, layout) in enumerate(
            zip(self.devices.names, self.devices.layouts, strict=True)
        ):
            counts = sorted({int(row[2 + 2 * m]) for row in table})
            if len(counts) > 1 or counts[0] < 1:
                raise ValueError(
                    f"num_microbatches of {name}: ranks have {counts}; all need the same, from 1"
                )
            for replica in layout.ranks:
                ranks = [rank for stage in replica for rank in stage]
                if len({table[rank][3 + 2 * m] for rank in ranks}) > 1:
                    raise ValueError(
                        f"seq_length, micro_batch_size or pipeline_dtype of {name}: ranks {ranks}, "
                        "one replica, have different ones; all need those of its data"
                    )

    def _measure_transfer(self, sizes: Sequence[int]) -> float:
        """Seconds of the slowest hop of this rank; sizes: elements, by model. COLLECTIVE."""
        return max(
            measure_transfer(links, size, stage.config.pipeline_dtype or torch.float32)
            for links, stage, size in zip(self._links, self.stages, sizes, strict=True)
        )

    def _key(self, steps: Sequence[StepInput]) -> dict[str, Any]:
        """What stage times depend on, besides the layout."""
        models = [
            {
                **{field: getattr(stage.config, field) for field in _SHAPE_FIELDS},
                "dtype": str(stage.config.params_dtype),
                "parameters": sum(p.numel() for p in stage.model.parameters()),
                "tp": stage.process_groups.tp.size(),
                # Lengths vary from step to step: only their magnitude counts.
                "tokens": round(math.log2(_mean_tokens(step))),
            }
            for stage, step in zip(self.stages, steps, strict=True)
        ]
        return {"models": models, "device": platform.device_name()}


# Of Megatron's TransformerConfig: what decides how long a stage takes.
_SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "sequence_parallel",
)


def _mean_tokens(step: StepInput) -> float:
    tokens = [n * b for n, b in zip(step.sequence_lengths, step.batch_sizes, strict=True)]
    return max(1.0, sum(tokens) / len(tokens))
