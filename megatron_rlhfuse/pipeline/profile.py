"""What the stages of a job cost, measured in its own steps: from spans to a fusion problem."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.clock import Span
from megatron_rlhfuse.pipeline.devices import DeviceMap
from megatron_rlhfuse.pipeline.rank_layouts import gather_rows
from megatron_rlhfuse.schedule.problem import Model, Problem
from megatron_rlhfuse.schedule.program import Op


@dataclass(frozen=True)
class StageCost:
    """One model on one rank: seconds of a micro-batch (their mean), bytes it holds (the most)."""

    forward: float
    backward: float
    activation: float


Costs = tuple[StageCost, ...]
"""Of every model, on this rank."""

# Before anything was measured: all that matters is that a backward is the longer one.
UNKNOWN = StageCost(1.0, 2.0, 0.0)


def step_costs(spans: Sequence[Span], models: int, activations: Sequence[float]) -> Costs:
    """The costs that one step showed on this rank; all models ran forward and backward."""

    def mean(model: int, op: Op) -> float:
        return statistics.fmean(
            span.end - span.start
            for span in spans
            if span.instruction.model == model and span.instruction.op is op
        )

    return tuple(
        StageCost(mean(m, Op.FORWARD), mean(m, Op.BACKWARD), float(activations[m]))
        for m in range(models)
    )


def median_costs(steps: Sequence[Costs]) -> Costs:
    """Of several steps: the median times, the most memory."""
    return tuple(
        StageCost(
            statistics.median(cost.forward for cost in of_model),
            statistics.median(cost.backward for cost in of_model),
            max(cost.activation for cost in of_model),
        )
        for of_model in zip(*steps, strict=True)
    )


def make_problem(
    devices: DeviceMap,
    micro_batches: Sequence[int],
    costs: Sequence[Sequence[StageCost]],
    transfer: float,
    memory_limit: float,
) -> Problem:
    """The fusion problem of one group; seconds and bytes.

    costs: [models][stages]
    """
    models = tuple(
        Model(
            name,
            count,
            tuple(cost.forward for cost in stages),
            tuple(cost.backward for cost in stages),
            tuple(cost.activation for cost in stages),
            pipelines,
        )
        for name, count, stages, pipelines in zip(
            devices.names, micro_batches, costs, devices.pipelines, strict=True
        )
    )
    return Problem(devices.devices, models, transfer, (memory_limit,) * devices.devices)


def unmeasured_problem(devices: DeviceMap, micro_batches: Sequence[int]) -> Problem:
    """A problem to begin with: every stage of a model takes as long as every other."""
    costs = [[UNKNOWN] * layout.pp for layout in devices.layouts]
    return make_problem(devices, micro_batches, costs, 0.0, float("inf"))


def least_free_memory() -> float:
    """Bytes free on the rank that has least; inf on CPUs. COLLECTIVE over the job."""
    free = torch.tensor([platform.free_memory()], dtype=torch.float64, device=platform.device())
    dist.all_reduce(free, dist.ReduceOp.MIN)
    return float(free)


def gather_costs(
    devices: DeviceMap, mine: Costs, transfer: float
) -> tuple[list[list[StageCost]], float]:
    """Costs of every stage over all its ranks, and the transfer time. COLLECTIVE over the job.

    Times are means over replicas and tensor-parallel parts, activations and transfers the most.
    Equal on every rank.
    """
    row = [transfer]
    for cost in mine:
        row += [cost.forward, cost.backward, cost.activation]
    table = gather_rows(row)
    costs = []
    for m, layout in enumerate(devices.layouts):
        stages = []
        for stage in range(layout.pp):
            ranks = [rank for replica in layout.ranks for rank in replica[stage]]
            found = [StageCost(*table[rank][1 + 3 * m : 4 + 3 * m]) for rank in ranks]
            stages.append(
                StageCost(
                    statistics.fmean(cost.forward for cost in found),
                    statistics.fmean(cost.backward for cost in found),
                    max(cost.activation for cost in found),
                )
            )
        costs.append(stages)
    return costs, max(row[0] for row in table)
