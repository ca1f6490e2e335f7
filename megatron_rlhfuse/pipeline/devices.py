"""Where the pipelines of several models meet: devices of a fusion problem, from layouts. PURE.

A *device* of a plan is a set of ranks that work in lockstep: tensor parallelism of any model ties
ranks together. Where one model has less of it than another, several of its replicas (*lanes*) stand
on a device side by side; they run the same program, each with peers of its own. A *group* is a set
of devices that pipelines tie together. All groups look alike, so one plan serves them all.

Invariants of a `DeviceMap`:
- every rank stands on one device of one group, and has one part of every model;
- `pipelines` has the form that `schedule.problem.Model` takes, the same for every group;
- the replicas of a model are numbered as in its layout, whichever group they stand in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.schedule.layout import Parallelism, place


class LayoutError(ValueError):
    """Layouts that cannot be fused; says which ranks and models, and what would be right."""


@dataclass(frozen=True)
class DeviceMap:
    """How several models share ranks.

    Attributes:
        names, layouts: of the models
        groups: ranks of every device, [groups][devices][ranks]
        pipelines: devices of every pipeline, [models][pipelines][stages], in every group
    """

    names: tuple[str, ...]
    layouts: tuple[Layout, ...]
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    pipelines: tuple[tuple[tuple[int, ...], ...], ...]

    @property
    def devices(self) -> int:
        """Devices of a group."""
        return len(self.groups[0])

    def locate(self, rank: int) -> tuple[int, int]:
        """Group and device of a rank."""
        for g, devices in enumerate(self.groups):
            for d, ranks in enumerate(devices):
                if rank in ranks:
                    return g, d
        raise LayoutError(f"rank {rank} stands on no device")


def map_devices(names: Sequence[str], layouts: Sequence[Layout]) -> DeviceMap:
    """The devices and groups of models on the same ranks. Raises LayoutError."""
    _check_same_ranks(names, layouts)
    stages = [[stage for replica in layout.ranks for stage in replica] for layout in layouts]
    device_of = _connected(ranks for of_model in stages for ranks in of_model)
    paths = [_paths(name, layout, device_of) for name, layout in zip(names, layouts, strict=True)]
    group_of = _connected(path for of_model in paths for path in of_model)
    # Groups and their devices in the order in which the first model's replicas pass them.
    order: dict[int, list[int]] = {}
    for path in paths[0]:
        for device in path:
            members = order.setdefault(group_of[device], [])
            if device not in members:
                members.append(device)
    shapes = [_group_shape(group, devices, paths, group_of) for group, devices in order.items()]
    for number, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise LayoutError(
                f"the pipelines of {_join(names)} cross each other differently in different "
                f"parts of the job: group 0 has devices {shapes[0]}, group {number} {shape}; lay "
                "both models out regularly, as `opposite_layout` does"
            )
    ranks: dict[int, list[int]] = {}
    for rank in layouts[0].members:
        ranks.setdefault(device_of[rank], []).append(rank)
    sizes = sorted({len(members) for members in ranks.values()})
    if len(sizes) > 1:
        raise LayoutError(
            f"tensor parallelism of {_join(names)} ties some ranks together in sets of {sizes[0]}, "
            f"others in sets of {sizes[-1]}: the tensor-parallel groups of both models must nest"
        )
    groups = tuple(tuple(tuple(ranks[d]) for d in devices) for devices in order.values())
    return DeviceMap(tuple(names), tuple(layouts), groups, shapes[0])


def opposite_layout(
    layout: Layout, tensor: int, pipeline: int, names: tuple[str, str] = ("first", "second")
) -> Layout:
    """A second model's layout on the ranks of a first: its pipelines run the other way.

    Where one model has fewer stages, it has several pipelines on blocks of the other's stages
    (RLHFuse, section 5.1). Replicas are ordered by their lowest rank, so that a model without
    pipeline stages stands as in `Layout.contiguous`.

    Raises LayoutError where the sizes do not fit the first model's.
    """
    world = len(layout.members)
    if tensor < 1 or pipeline < 1 or world % (tensor * pipeline):
        raise LayoutError(
            f"{world} ranks cannot be split into replicas of {tensor} (tensor) x {pipeline} "
            "(pipeline) ranks"
        )
    first = Parallelism(tp=layout.tp, pp=layout.pp, dp=layout.dp)
    second = Parallelism(tp=tensor, pp=pipeline, dp=world // (tensor * pipeline))
    try:
        placement = place(first, second, names)
    except ValueError as error:
        raise LayoutError(str(error)) from error
    # `place` numbers ranks by itself: the first model says which rank each number is.
    numbered = Layout(placement.ranks(0))
    rank_of = dict(zip(numbered.members, layout.members, strict=True))
    replicas = [
        tuple(tuple(rank_of[number] for number in stage) for stage in replica)
        for replica in placement.ranks(1)
    ]
    return Layout(tuple(sorted(replicas, key=lambda replica: min(min(s) for s in replica))))


def _check_same_ranks(names: Sequence[str], layouts: Sequence[Layout]) -> None:
    everyone = set(layouts[0].members)
    for name, layout in zip(names, layouts, strict=True):
        missing = sorted(everyone ^ set(layout.members))
        if missing:
            raise LayoutError(
                f"{names[0]} and {name} must have parts on the same ranks; rank "
                f"{', '.join(map(str, missing[:8]))} has one of them only"
            )


def _connected(sets: Iterable[Sequence[int]]) -> dict[int, int]:
    """For every member the smallest one that a chain of overlapping sets ties it to."""
    parent: dict[int, int] = {}

    def root(member: int) -> int:
        parent.setdefault(member, member)
        while parent[member] != member:
            parent[member] = parent[parent[member]]
            member = parent[member]
        return member

    for members in sets:
        for member in members:
            one, other = sorted((root(members[0]), root(member)))
            parent[other] = one
    return {member: root(member) for member in parent}


def _paths(name: str, layout: Layout, device_of: dict[int, int]) -> list[tuple[int, ...]]:
    """The devices of every replica, stage by stage."""
    paths = [tuple(device_of[stage[0]] for stage in replica) for replica in layout.ranks]
    at: dict[int, tuple[int, ...]] = {}
    for path in paths:
        for device in path:
            if at.setdefault(device, path) != path:
                raise LayoutError(
                    f"{name}: its replicas {at[device]} and {path} share a device, a set of ranks "
                    "that tensor parallelism ties together, and part elsewhere; the tensor-"
                    "parallel groups of both models must nest"
                )
        if len(set(path)) < len(path):
            raise LayoutError(f"{name}: its replica {path} passes a device twice")
    return paths


def _group_shape(
    group: int,
    devices: Sequence[int],
    paths: Sequence[Sequence[tuple[int, ...]]],
    group_of: dict[int, int],
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """[models][pipelines][stages] with the group's devices numbered from 0; lanes count once."""
    number = {device: i for i, device in enumerate(devices)}
    return tuple(
        tuple(
            sorted(
                {
                    tuple(number[device] for device in path)
                    for path in of_model
                    if group_of[path[0]] == group
                },
                key=min,
            )
        )
        for of_model in paths
    )


def _join(names: Sequence[str]) -> str:
    return " and ".join(names)
