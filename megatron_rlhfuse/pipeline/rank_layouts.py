"""The layouts of models whose process groups somebody else has built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.devices import LayoutError, opposite_layout
from megatron_rlhfuse.pipeline.groups import Layout, build_process_groups

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def opposite_process_groups(
    process_groups: ProcessGroupCollection,
    tensor: int | None = None,
    pipeline: int | None = None,
    name: str = "second",
    timeout: timedelta | None = None,
) -> ProcessGroupCollection:
    """Groups for a second model whose pipelines run opposite to a first one's, on the same ranks.

    COLLECTIVE over all ranks of the job. Build the second model, its DDP wrapper and its optimizer
    with them.

    Args:
        process_groups: of the first model, such as
            `ProcessGroupCollection.use_mpu_process_groups()` in a job that has called
            `initialize_model_parallel`
        tensor, pipeline: sizes of the second model; by default the first one's
        name: of the second model, for messages
        timeout: of the groups' collectives; None takes torch's default

    Raises LayoutError where the sizes do not fit the first model's.
    """
    (layout,) = gather_layouts(["first"], [process_groups])
    opposite = opposite_layout(
        layout,
        layout.tp if tensor is None else tensor,
        layout.pp if pipeline is None else pipeline,
        names=("first", name),
    )
    groups = build_process_groups(opposite, name, timeout)
    assert groups is not None  # every rank is in the first layout
    return groups.pgc


def gather_layouts(
    names: Sequence[str], process_groups: Sequence[ProcessGroupCollection | None]
) -> list[Layout]:
    """The layout of every model, from where each rank says it stands. COLLECTIVE over the job.

    process_groups: of this rank; None where it has no part of a model
    Raises LayoutError, on every rank, where a model does not have a part on every rank.
    """
    row = []
    for m, groups in enumerate(process_groups):
        if groups is None or getattr(groups, "pp", None) is None:
            row += [-1] * 4
            continue
        if groups.cp.size() > 1:
            raise LayoutError(f"{names[m]}: context parallelism must be 1 in a fused pipeline")
        pipeline = dist.get_process_group_ranks(groups.pp)
        row += [groups.dp.rank(), groups.pp.rank(), groups.tp.rank(), pipeline[0]]
    table = [[int(value) for value in row] for row in gather_rows(row)]
    return [
        _layout(name, [row[4 * m : 4 * m + 4] for row in table]) for m, name in enumerate(names)
    ]


def gather_rows(row: Sequence[float], group: dist.ProcessGroup | None = None) -> list[list[float]]:
    """The rows of all ranks, [ranks][columns]. COLLECTIVE over the job.

    group: of all ranks, on the host; by default the job's own, on the device
    """
    device = platform.device() if group is None else torch.device("cpu")
    sent = torch.tensor(row, dtype=torch.float64, device=device)
    rows = [torch.empty_like(sent) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, sent, group=group)
    return torch.stack(rows).tolist()


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
