"""Which ranks hold which part of a model, and the process groups that follow from it.

Several models share the same ranks, each in a layout of its own, so no model may ask Megatron's
process-wide `parallel_state` where it is. `Layout` is PURE; `build_process_groups` turns it into
the `ProcessGroupCollection` that Megatron's models, DDP, optimizers, schedules and checkpoints
take instead.

Invariants
- A layout is a full box [replica][stage][tensor part] of distinct ranks.
- Groups keep the layout's order; ranks need not be sorted. A pipeline may run from high ranks to
  low ones, and Megatron takes stage numbers and neighbours from positions in the `pp` group.
- The `embd` group is [first stage, last stage] in this order: Megatron takes its first member for
  the owner of the word embeddings; sorted, tied output weights silently stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from megatron_rlhfuse import platform

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout."""

    data: int
    stage: int
    tensor: int


@dataclass(frozen=True)
class Layout:
    """Global ranks of a model: `ranks[replica][stage][tensor part]`."""

    ranks: tuple[tuple[tuple[int, ...], ...], ...]

    def __post_init__(self) -> None:
        sizes = {(len(replica), len(stage)) for replica in self.ranks for stage in replica}
        if len(sizes) != 1 or 0 in next(iter(sizes)):
            raise ValueError(f"every replica needs as many stages and tensor parts: {self.ranks}")
        if len(set(self.members)) != len(self.members):
            raise ValueError(f"a rank stands twice in the layout {self.ranks}")

    @classmethod
    def contiguous(cls, world_size: int, tensor: int, pipeline: int) -> Layout:
        """Megatron's own order: tensor parts fastest, then replicas, then stages.

        A model in this layout sits where Megatron's `parallel_state` of the same sizes puts it.
        """
        replicas = _replicas(world_size, tensor, pipeline)
        return cls(
            tuple(
                tuple(
                    tuple((stage * replicas + data) * tensor + part for part in range(tensor))
                    for stage in range(pipeline)
                )
                for data in range(replicas)
            )
        )

    @classmethod
    def blocks(cls, world_size: int, tensor: int, pipeline: int) -> Layout:
        """Every replica on a block of neighbouring ranks: a block can be released by itself."""
        replicas = _replicas(world_size, tensor, pipeline)
        return cls(
            tuple(
                tuple(
                    tuple((data * pipeline + stage) * tensor + part for part in range(tensor))
                    for stage in range(pipeline)
                )
                for data in range(replicas)
            )
        )

    @property
    def dp(self) -> int:
        """Number of replicas."""
        return len(self.ranks)

    @property
    def pp(self) -> int:
        """Number of pipeline stages."""
        return len(self.ranks[0])

    @property
    def tp(self) -> int:
        """Number of tensor-parallel parts."""
        return len(self.ranks[0][0])

    @property
    def members(self) -> tuple[int, ...]:
        """All ranks, replica by replica, stage by stage."""
        return tuple(rank for replica in self.ranks for stage in replica for rank in stage)

    def place(self, rank: int) -> Place | None:
        """Where `rank` stands, or None if it has no part of the model."""
        if rank not in self.members:
            return None
        index = self.members.index(rank)
        return Place(index // (self.tp * self.pp), index // self.tp % self.pp, index % self.tp)


def _replicas(world_size: int, tensor: int, pipeline: int) -> int:
    if tensor < 1 or pipeline < 1 or world_size % (tensor * pipeline):
        raise ValueError(
            f"{world_size} ranks cannot be split into replicas of {tensor} (tensor) x "
            f"{pipeline} (pipeline) ranks: the product must divide the number of ranks"
        )
    return world_size // (tensor * pipeline)


@dataclass(frozen=True)
class ModelGroups:
    """This rank's part in one model: its place and the groups it talks in."""

    name: str
    layout: Layout
    place: Place
    pgc: ProcessGroupCollection

    @property
    def is_first_stage(self) -> bool:
        return self.place.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.place.stage == self.layout.pp - 1


def build_process_groups(
    layout: Layout, name: str, timeout: timedelta | None = None
) -> ModelGroups | None:
    """Makes the groups of one model. Collective over ALL ranks of the job, members or not.

    Every rank must call this for the same layouts in the same order. Returns None on a rank that
    is not in the layout.

    Args:
        name: the model's name ("actor"), part of the groups' descriptions in error messages
        timeout: of every group's collectives; None takes torch's default
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    rank = dist.get_rank()
    place = layout.place(rank)
    mine: dict[str, Any] = {}
    for field, members in _memberships(layout):
        group = dist.new_group(
            list(members),
            timeout=timeout,
            backend=platform.backend(),
            group_desc=f"{name}.{field}",
            sort_ranks=False,
        )
        if rank in members:
            mine[field] = group
    if place is None:
        return None
    return ModelGroups(name, layout, place, ProcessGroupCollection(**_all_fields(mine)))


def _memberships(layout: Layout) -> list[tuple[str, tuple[int, ...]]]:
    """Every group of a layout, in the order in which all ranks create them."""
    ranks = layout.ranks
    stages, parts = range(layout.pp), range(layout.tp)
    groups: list[tuple[str, Sequence[int]]] = []
    for replica in ranks:
        groups += [("tp", stage) for stage in replica]
        groups.append(("mp", [rank for stage in replica for rank in stage]))
        for part in parts:
            pipeline = [replica[stage][part] for stage in stages]
            groups.append(("pp", pipeline))
            groups.append(("embd", list(dict.fromkeys((pipeline[0], pipeline[-1])))))
            groups.append(("pos_embd", pipeline[:1]))
    for stage in stages:
        groups += [("dp", [replica[stage][part] for replica in ranks]) for part in parts]
        groups.append(("tp_dp_cp", [rank for replica in ranks for rank in replica[stage]]))
    groups.append(("intra_dist_opt", layout.members))
    groups += [("cp", [rank]) for rank in layout.members]
    return [(field, tuple(members)) for field, members in groups]


def _all_fields(mine: dict[str, Any]) -> dict[str, Any]:
    """Adds the fields that coincide without context and expert parallelism.

    A missing `expt_dp` would make Megatron's DDP call a collective `new_group`; `embd` and
    `pos_embd` must be there as None on the stages that have no embeddings.
    """
    tp, dp, mp, cp = mine["tp"], mine["dp"], mine["mp"], mine["cp"]
    return {
        "embd": None,
        "pos_embd": None,
        **mine,
        "ep": cp,
        "tp_cp": tp,
        "expt_tp": tp,
        "tp_ep": tp,
        "tp_ep_pp": mp,
        "tp_ep_pp_with_egtp_remat": mp,
        "dp_cp": dp,
        "dp_cp_gtp_remat": dp,
        "intra_dp_cp": dp,
        "expt_dp": dp,
        "expt_dp_gtp_remat": dp,
        "intra_expt_dp": dp,
    }
