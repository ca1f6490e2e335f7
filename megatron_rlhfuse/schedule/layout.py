"""Two models on the same ranks: from their parallel sizes to a fusion problem, and to ranks.

The transformation of RLHFuse (NSDI '25), section 5.1. A *device* of the problem is the
tensor-parallel group of the model whose groups are larger: `ranks_per_device` neighbouring ranks.
Model a with N1 stages and model b with N2 are laid on N = lcm(N1, N2) devices, the fewest that
both cover with whole pipelines: K1 = N / N1 pipelines of a and K2 = N / N2 of b, each on a block
of neighbouring devices, b's in reverse. A job with more devices is a number of such *groups*,
which run the same schedule on data of their own.

Unequal tensor parallelism: a device holds `lanes` = (larger TP / own TP) tensor-parallel groups
of the model with the smaller ones. Lane l of every device of a block forms a pipeline of its own.
The lanes of a block run the same subtasks at the same time on ranks of their own, so the problem
has one pipeline for all of them; each is a data-parallel replica with its own micro-batches.
So a model's replicas are groups x pipelines x lanes, and one pipeline of the problem runs
(micro-batches of the mini-batch) / DP of them, whatever the lanes.

Invariants of a `Placement`
- both models stand on every rank exactly once: TP1 x PP1 x DP1 = TP2 x PP2 x DP2 = the ranks;
- groups x pipelines x lanes = DP, for each model;
- all ranks of one stage of one replica belong to one device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlhfuse.schedule.errors import ProblemError
from megatron_rlhfuse.schedule.problem import Model, Problem

Ranks = tuple[tuple[tuple[int, ...], ...], ...]
"""Global ranks of a model, [replica][stage][tensor part]."""


@dataclass(frozen=True)
class Parallelism:
    """Sizes of tensor, pipeline and data parallelism of one model."""

    tp: int
    pp: int
    dp: int

    @property
    def world_size(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP {self.tp} x PP {self.pp} x DP {self.dp}"


@dataclass(frozen=True)
class StageCosts:
    """What one model costs a GPU on each of its stages.

    Attributes:
        forward, backward: time of a micro-batch, [stages]
        activation: memory a micro-batch holds from its forward to the end of its backward, [stages]
        resident: memory of what stays: weights, gradients, optimizer state, [stages]
    """

    forward: tuple[float, ...]
    backward: tuple[float, ...]
    activation: tuple[float, ...]
    resident: tuple[float, ...]


@dataclass(frozen=True)
class PlacedModel:
    """One model of a placement.

    Attributes:
        lanes: its tensor-parallel groups on a device
        pipelines: the device of each stage, [pipelines][stages], the same in every group
    """

    name: str
    parallelism: Parallelism
    lanes: int
    pipelines: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Placement:
    """Where two models stand: `groups` times `devices` times `ranks_per_device` ranks."""

    models: tuple[PlacedModel, PlacedModel]
    groups: int
    devices: int
    ranks_per_device: int

    def device_ranks(self, group: int, device: int) -> tuple[int, ...]:
        """Global ranks of a device of a group."""
        first = (group * self.devices + device) * self.ranks_per_device
        return tuple(range(first, first + self.ranks_per_device))

    def locate(self, rank: int) -> tuple[int, int]:
        """Group and device of a global rank."""
        return divmod(rank // self.ranks_per_device, self.devices)

    def ranks(self, model: int) -> Ranks:
        """Global ranks of model 0 or 1, in the form of `pipeline.groups.Layout`."""
        placed = self.models[model]
        tp = placed.parallelism.tp
        return tuple(
            tuple(
                self.device_ranks(group, device)[lane * tp : (lane + 1) * tp] for device in pipeline
            )
            for group in range(self.groups)
            for pipeline in placed.pipelines
            for lane in range(placed.lanes)
        )

    def spans_nodes(self, gpus_per_node: int) -> bool:
        """Whether any pipeline hands micro-batches from one node to another.

        Pipelines stand on blocks of equal size, one after the other: they keep to their nodes if
        nodes hold whole blocks, or if there is only one node.
        """
        world_size = self.models[0].parallelism.world_size
        blocks = (placed.parallelism.pp * self.ranks_per_device for placed in self.models)
        return world_size > gpus_per_node and any(gpus_per_node % block for block in blocks)


def place(
    a: Parallelism, b: Parallelism, names: tuple[str, str] = ("actor", "critic")
) -> Placement:
    """Lays two models on the same ranks, b's pipelines in reverse.

    The pipelines of both models divide N, and N the devices of the job, once the sizes pass the
    checks here. Raises ProblemError whose `field` is such as `critic.dp`.
    """
    for name, sizes in zip(names, (a, b), strict=True):
        _check_sizes(name, sizes)
    if a.world_size != b.world_size:
        needed, rest = divmod(a.world_size, b.tp * b.pp)
        remedy = f"; {names[1]}.dp {needed} would fit" if needed and not rest else ""
        raise ProblemError(
            f"{names[1]}.dp",
            f"both models must stand on the same ranks, but {names[0]} has {a} = {a.world_size} "
            f"and {names[1]} {b} = {b.world_size}{remedy}",
        )
    per_device = max(a.tp, b.tp)
    for name, sizes in zip(names, (a, b), strict=True):
        lanes = per_device // sizes.tp
        if sizes.dp % lanes:
            raise ProblemError(
                f"{name}.dp",
                f"a tensor-parallel group of the other model ({per_device} ranks) holds {lanes} of "
                f"{name} ({sizes.tp} ranks), and they are replicas of each other: want a multiple "
                f"of {lanes}, got {sizes.dp}",
            )
    devices = math.lcm(a.pp, b.pp)
    placed_a, placed_b = (
        PlacedModel(name, sizes, per_device // sizes.tp, _blocks(devices, sizes.pp, reverse))
        for name, sizes, reverse in zip(names, (a, b), (False, True), strict=True)
    )
    groups = a.world_size // (per_device * devices)
    return Placement((placed_a, placed_b), groups, devices, per_device)


def fusion_problem(
    placement: Placement,
    costs: tuple[StageCosts, StageCosts],
    micro_batches: tuple[int, int],
    *,
    p2p: float = 0.0,
    memory: float = math.inf,
) -> Problem:
    """The problem of one group of a placement; all its groups have the same one.

    Args:
        micro_batches: of each model in one mini-batch, over all its replicas
        p2p: transfer time between two stages
        memory: of a GPU; what both models keep resident there is taken off

    Raises ProblemError: costs do not fit the stages, micro-batches do not divide over the
    replicas, or the resident memory leaves nothing for activations.
    """
    models = tuple(
        _model(placed, cost, count)
        for placed, cost, count in zip(placement.models, costs, micro_batches, strict=True)
    )
    return Problem(placement.devices, models, p2p, _limits(placement, costs, memory))


def _check_sizes(name: str, sizes: Parallelism) -> None:
    for field in ("tp", "pp", "dp"):
        size = getattr(sizes, field)
        if size < 1:
            raise ProblemError(f"{name}.{field}", f"want a whole number from 1, got {size}")
    if sizes.tp & (sizes.tp - 1):
        raise ProblemError(
            f"{name}.tp",
            f"want a power of two, so that the groups of both models nest; got {sizes.tp}",
        )


def _blocks(devices: int, stages: int, reverse: bool) -> tuple[tuple[int, ...], ...]:
    blocks = (range(first, first + stages) for first in range(0, devices, stages))
    return tuple(tuple(reversed(block) if reverse else block) for block in blocks)


def _model(placed: PlacedModel, costs: StageCosts, micro_batches: int) -> Model:
    sizes = placed.parallelism
    for field in ("forward", "backward", "activation", "resident"):
        given = len(getattr(costs, field))
        if given != sizes.pp:
            raise ProblemError(
                f"{placed.name}.{field}", f"want one number per stage ({sizes.pp}), got {given}"
            )
    if micro_batches < 1 or micro_batches % sizes.dp:
        raise ProblemError(
            f"{placed.name}.dp",
            f"{micro_batches} micro-batches of a mini-batch do not divide over {sizes.dp} "
            "replicas: want a divisor",
        )
    return Model(
        placed.name,
        micro_batches // sizes.dp,
        costs.forward,
        costs.backward,
        costs.activation,
        placed.pipelines,
    )


def _limits(
    placement: Placement, costs: tuple[StageCosts, StageCosts], memory: float
) -> tuple[float, ...]:
    """What the resident memory of both models leaves of a GPU, [devices]."""
    resident: list[list[float]] = [[] for _ in range(placement.devices)]
    for placed, cost in zip(placement.models, costs, strict=True):
        for pipeline in placed.pipelines:
            for stage, device in enumerate(pipeline):
                resident[device].append(cost.resident[stage])
    limits = tuple(memory - math.fsum(parts) for parts in resident)
    worst = min(range(placement.devices), key=limits.__getitem__)
    if limits[worst] <= 0:
        names = " and ".join(placed.name for placed in placement.models)
        raise ProblemError(
            "memory",
            f"weights, gradients and optimizer state of {names} take "
            f"{math.fsum(resident[worst]):.1f} of the {memory:.1f} that a GPU of device {worst} "
            "has: want more tensor or pipeline parallelism, or the distributed optimizer",
        )
    return limits
