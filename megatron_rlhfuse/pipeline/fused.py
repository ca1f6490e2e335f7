"""Two models on the same ranks, trained by one fused pipeline.

`fused_forward_backward` takes the place of two calls of Megatron's `forward_backward_func`:
the same arguments, in lists of two, the same losses and gradients. `FusedPipeline` is what stands
behind it, for those who want to keep it themselves and read its reports.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core.utils import get_attr_wrapped_model

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.autoplan import AutoPlan, PlanOptions
from megatron_rlhfuse.pipeline.clock import Span, make_clock
from megatron_rlhfuse.pipeline.devices import LayoutError, map_devices
from megatron_rlhfuse.pipeline.executor import execute
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.pipeline.links import Transfers, build_links, measure_transfer
from megatron_rlhfuse.pipeline.memory import ActivationMeter
from megatron_rlhfuse.pipeline.profile import step_costs
from megatron_rlhfuse.pipeline.stage import Stage, StepInput
from megatron_rlhfuse.schedule.evaluate import Timeline

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


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
        process_groups: Sequence[ProcessGroupCollection],
        options: FusionOptions | None = None,
    ) -> None:
        """COLLECTIVE over all ranks of the job, each with its part of every model.

        Raises LayoutError, on every rank, for layouts that cannot be fused, and ValueError for a
        model that cannot be run in a fused pipeline.
        """
        self.options = options or FusionOptions()
        self.stages = [
            Stage(name, model, groups)
            for name, model, groups in zip(names, models, process_groups, strict=True)
        ]
        self._timeout = timedelta(seconds=self.options.timeout_s)
        layouts = gather_layouts(names, process_groups)
        self.devices = map_devices(names, layouts)
        _, self._device = self.devices.locate(dist.get_rank())
        self._links = [
            build_links(layout, groups.pp, name, None)
            for name, layout, groups in zip(names, layouts, process_groups, strict=True)
        ]
        self._plans: dict[tuple[int, ...], AutoPlan] = {}
        self.last_step: StepReport | None = None

    def run(self, steps: Sequence[StepInput], forward_only: bool = False) -> list[list[Any]]:
        """Forward and backward of all micro-batches of all models; gradients are finalized.

        COLLECTIVE over all ranks of the job. Returns for every model what its loss function
        reported per micro-batch; empty before the last stage.
        """
        plan = self._plan(steps)
        plan.before_step()
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
        execute(program, self.stages, transfers, self._timeout, clock)
        for stage in self.stages:
            stage.finish()
        for stage in self.stages:  # the same order on every rank: these are collectives
            stage.finalize()
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
                activations = [stage.activation for stage in self.stages]
                costs = step_costs(spans, len(self.stages), activations)
            plan.after_step(costs)
        return [stage.collected for stage in self.stages]

    def close(self) -> None:
        """Ends a search for a plan that is still going on."""
        for plan in self._plans.values():
            plan.close()

    def _meter(self) -> ActivationMeter:
        return ActivationMeter(p for stage in self.stages for p in stage.model.parameters())

    def _plan(self, steps: Sequence[StepInput]) -> AutoPlan:
        """The plan for these numbers of micro-batches; a new one in the first step with them."""
        counts = tuple(step.micro_batches for step in steps)
        if counts not in self._plans:
            if 0 in counts:
                raise ValueError(f"num_microbatches {list(counts)}: every model needs at least one")
            self._plans[counts] = AutoPlan(
                self.devices,
                counts,
                self.options,
                self._key(steps),
                lambda: self._measure_transfer(steps),
            )
        return self._plans[counts]

    def _measure_transfer(self, steps: Sequence[StepInput]) -> float:
        """Seconds of the slowest hop of this rank with messages of these steps. COLLECTIVE."""
        return max(
            measure_transfer(
                links,
                max(shape.numel() for shape in stage.message_shapes(step)),
                stage.config.pipeline_dtype or torch.float32,
            )
            for links, stage, step in zip(self._links, self.stages, steps, strict=True)
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


def gather_layouts(
    names: Sequence[str], process_groups: Sequence[ProcessGroupCollection | None]
) -> list[Layout]:
    """The layout of every model, from where each rank says it stands. COLLECTIVE over the job.

    process_groups: of this rank; None where it has no part of a model
    Raises LayoutError, on every rank, where a model does not have a part on every rank.
    """
    row = []
    for groups in process_groups:
        if groups is None or getattr(groups, "pp", None) is None:
            row += [-1] * 4
            continue
        pipeline = dist.get_process_group_ranks(groups.pp)
        row += [groups.dp.rank(), groups.pp.rank(), groups.tp.rank(), pipeline[0]]
    sent = torch.tensor(row, dtype=torch.int64, device=platform.device())
    rows = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, sent)
    table = torch.stack(rows).cpu().tolist()
    return [
        _layout(name, [row[4 * m : 4 * m + 4] for row in table]) for m, name in enumerate(names)
    ]


def _layout(name: str, places: Sequence[Sequence[int]]) -> Layout:
    """places: (replica, stage, tensor part, first rank of the pipeline) of every rank."""
    outside = [rank for rank, place in enumerate(places) if place[0] < 0]
    if outside:
        raise LayoutError(
            f"{name} has no part on rank {', '.join(map(str, outside[:8]))}: the models of a fused "
            "pipeline stand on the same ranks, all ranks of the job"
        )
    rank_at = {tuple(place[:3]): rank for rank, place in enumerate(places)}
    sizes = [1 + max(place[axis] for place in places) for axis in range(3)]
    if len(rank_at) < len(places) or math.prod(sizes) != len(places):
        raise LayoutError(
            f"{name}: {len(places)} ranks do not fill {sizes[0]} replicas x {sizes[1]} stages x "
            f"{sizes[2]} tensor parts; build its process groups over all ranks of the job"
        )
    layout = Layout(
        tuple(
            tuple(
                tuple(rank_at[data, stage, part] for part in range(sizes[2]))
                for stage in range(sizes[1])
            )
            for data in range(sizes[0])
        )
    )
    for rank, (data, _, part, first) in enumerate(places):
        if layout.ranks[data][0][part] != first:
            raise LayoutError(
                f"{name}: the pipeline of rank {rank} begins at rank {first}, its data-parallel "
                f"number {data} says {layout.ranks[data][0][part]}: number replicas alike on all "
                "stages"
            )
    return layout


# Of Megatron's TransformerConfig: what decides how long a stage takes.
_SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "recompute_granularity",
)


def _mean_tokens(step: StepInput) -> float:
    tokens = [n * b for n, b in zip(step.sequence_lengths, step.batch_sizes, strict=True)]
    return max(1.0, sum(tokens) / len(tokens))


def fused_forward_backward(
    *,
    forward_step_func: Sequence[Callable[..., Any]],
    data_iterator: Sequence[Iterator[Any] | None],
    model: Sequence[torch.nn.Module | Sequence[torch.nn.Module]],
    num_microbatches: Sequence[int],
    seq_length: Sequence[int | Sequence[int]],
    micro_batch_size: Sequence[int | Sequence[int]],
    decoder_seq_length: None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: None = None,
    p2p_communicator: Any = None,
    pg_collection: Sequence[ProcessGroupCollection] | None = None,
    force_all_reduce: bool = False,
    options: FusionOptions | None = None,
) -> list[list[Any]]:
    """Forward and backward of two models in one fused pipeline; COLLECTIVE over the job's ranks.

    The keywords are those of Megatron-Core's `forward_backward_func`, with a list of two where a
    model has its own: same meaning, same losses, same gradients as two calls of the stock function
    one after the other. `seq_length` and `micro_batch_size` may be lists themselves, one number per
    micro-batch: stages exchange no shapes, also where `variable_seq_lengths` is set.

    Args:
        pg_collection: of every model; by default those that the models were built with
        p2p_communicator: ignored; the transfers are those of the plan
        options: of the pipeline; those of the first call with these models count

    Returns the losses of both models, as the stock function returns those of one.
    Raises ValueError for arguments that do not fit, LayoutError, PlanMismatchError, PipelineError.
    """
    if decoder_seq_length is not None or adjust_tensor_shapes_fn is not None:
        raise ValueError("decoder_seq_length and adjust_tensor_shapes_fn: leave them out")
    models = [_single(each) for each in model]
    count = len(models)
    arguments = {
        "forward_step_func": forward_step_func,
        "data_iterator": data_iterator,
        "num_microbatches": num_microbatches,
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
    }
    for name, value in arguments.items():
        if not isinstance(value, list | tuple) or len(value) != count:
            raise ValueError(f"{name}: want a list of {count}, one entry per model")
    if pg_collection is None:
        pg_collection = [get_attr_wrapped_model(each, "pg_collection") for each in models]
    pipeline = _pipeline_of(models, pg_collection, options)
    steps = [
        StepInput(
            forward_step_func[m],
            _single(data_iterator[m]),
            _per_micro_batch("seq_length", seq_length[m], num_microbatches[m]),
            _per_micro_batch("micro_batch_size", micro_batch_size[m], num_microbatches[m]),
            collect_non_loss_data,
            first_val_step,
            force_all_reduce,
        )
        for m in range(count)
    ]
    return pipeline.run(steps, forward_only)


def _single(value: Any) -> Any:
    """Megatron hands models and iterators over in lists of one."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise ValueError("a model of several chunks (interleaved stages) cannot be fused")
    return value[0]


def _per_micro_batch(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} numbers for {count} micro-batches")
    return tuple(value)


def _pipeline_of(
    models: Sequence[torch.nn.Module],
    process_groups: Sequence[ProcessGroupCollection],
    options: FusionOptions | None,
) -> FusedPipeline:
    """The pipeline of these models, made in the first call with them."""
    # Kept by the first model itself, so that both go together.
    known = models[0].__dict__.setdefault("_fused_pipelines", {})
    key = tuple(id(each) for each in models[1:])
    if key not in known:
        names = [f"model {m}" for m in range(len(models))]
        known[key] = FusedPipeline(names, models, process_groups, options)
    return known[key]
