"""Layouts of two models on the same ranks: the devices and groups on which their pipelines meet."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise, product
from random import Random
from typing import NamedTuple

import pytest

from megatron_rlhfuse.pipeline.devices import (
    DeviceMap,
    LayoutError,
    map_devices,
    opposite_layout,
)
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.schedule.errors import ProblemError
from megatron_rlhfuse.schedule.layout import Parallelism, place
from megatron_rlhfuse.schedule.problem import Model, Problem, parse_problem, problem_to_json

NAMES = ("actor", "critic")
WORLDS = [1, 2, 4, 8, 12, 16]
Ranks = tuple[tuple[tuple[int, ...], ...], ...]


class Sizes(NamedTuple):
    """Tensor and pipeline parallelism; the rest is data parallelism."""

    tensor: int
    pipeline: int


def sizes(world: int) -> list[Sizes]:
    """All that a model can have on `world` ranks, with tensor parallelism a power of two."""
    divisors = [n for n in range(1, world + 1) if world % n == 0]
    return [
        Sizes(tensor, pipeline)
        for tensor, pipeline in product(divisors, divisors)
        if not tensor & (tensor - 1) and world % (tensor * pipeline) == 0
    ]


def parallelism(world: int, one: Sizes) -> Parallelism:
    return Parallelism(one.tensor, one.pipeline, world // (one.tensor * one.pipeline))


def opposites(world: int) -> Iterator[tuple[Layout, Layout]]:
    """A first model in Megatron's order with every second one that runs the other way."""
    for first, second in product(sizes(world), sizes(world)):
        layout = Layout.contiguous(world, *first)
        try:
            place(parallelism(world, first), parallelism(world, second))
        except ProblemError:
            continue
        yield layout, opposite_layout(layout, *second)


def regular(world: int) -> Iterator[tuple[Layout, Layout]]:
    """Both models in orders of Megatron's or in blocks, wherever these can be fused."""
    orders = (Layout.contiguous, Layout.blocks)
    for first, second in product(sizes(world), sizes(world)):
        for one, other in product(orders, orders):
            layouts = one(world, *first), other(world, *second)
            try:
                map_devices(NAMES, layouts)
            except LayoutError:
                continue
            yield layouts


def check(devices: DeviceMap, layouts: tuple[Layout, ...]) -> None:
    """The invariants of the module's header, from `groups` and `pipelines` alone."""
    assert devices.layouts == layouts
    at = {
        rank: (g, d)
        for g, group in enumerate(devices.groups)
        for d, ranks in enumerate(group)
        for rank in ranks
    }
    everyone = [rank for group in devices.groups for ranks in group for rank in ranks]
    assert sorted(everyone) == sorted(layouts[0].members)
    assert {len(group) for group in devices.groups} == {devices.devices}
    for layout, pipelines in zip(layouts, devices.pipelines, strict=True):
        assert sorted(sum(pipelines, ())) == list(range(devices.devices))
        lanes: Counter[tuple[int, tuple[int, ...]]] = Counter()
        for replica in layout.ranks:
            places = [{at[rank] for rank in stage} for stage in replica]
            assert {len(each) for each in places} == {1}  # a stage stands on one device
            path = [place for each in places for place in each]
            assert len({group for group, _ in path}) == 1
            lanes[path[0][0], tuple(device for _, device in path)] += 1
        every = set(product(range(len(devices.groups)), pipelines))
        assert set(lanes) == every
        for (group, pipeline), count in lanes.items():
            assert {len(devices.groups[group][d]) for d in pipeline} == {count * layout.tp}


@pytest.mark.parametrize("world", WORLDS)
def test_opposite_models_keep_the_invariants(world: int) -> None:
    for layouts in opposites(world):
        check(map_devices(NAMES, layouts), layouts)


@pytest.mark.parametrize("world", WORLDS)
def test_models_in_any_regular_order_keep_the_invariants(world: int) -> None:
    fused = list(regular(world))
    # At the least a model fits one like it, and one without stages fits one without them.
    assert len(fused) >= 2 * len(sizes(world))
    for layouts in fused:
        check(map_devices(NAMES, layouts), layouts)


@pytest.mark.parametrize("world", WORLDS)
def test_the_pipelines_are_those_of_a_problem(world: int) -> None:
    for layouts in [*opposites(world), *regular(world)]:
        devices = map_devices(NAMES, layouts)
        models = tuple(
            Model(name, 1, *((1.0,) * layout.pp,) * 3, pipelines)
            for name, layout, pipelines in zip(NAMES, layouts, devices.pipelines, strict=True)
        )
        problem = Problem(devices.devices, models)
        assert parse_problem(problem_to_json(problem)) == problem


@pytest.mark.parametrize("world", WORLDS)
def test_a_device_is_what_tensor_parallel_groups_tie_together(world: int) -> None:
    """Every such group stands on one device, and a device falls into no smaller such sets."""
    for layouts in [*opposites(world), *regular(world)]:
        tied = [set(stage) for layout in layouts for replica in layout.ranks for stage in replica]
        devices = map_devices(NAMES, layouts)
        for ranks in (ranks for group in devices.groups for ranks in group):
            inside = [each for each in tied if each & set(ranks)]
            reached = set(ranks[:1])
            for _ in inside:
                reached |= set().union(*(each for each in inside if each & reached))
            assert reached == set(ranks)


@pytest.mark.parametrize("world", WORLDS)
def test_a_group_is_what_pipelines_tie_together(world: int) -> None:
    for layouts in [*opposites(world), *regular(world)]:
        devices = map_devices(NAMES, layouts)
        paths = [set(path) for pipelines in devices.pipelines for path in pipelines]
        reached = {0}
        for _ in paths:
            reached |= set().union(*(path for path in paths if path & reached))
        assert reached == set(range(devices.devices))


@pytest.mark.parametrize("world", WORLDS)
def test_groups_and_pipelines_come_as_the_first_models_replicas(world: int) -> None:
    for layouts in [*opposites(world), *regular(world)]:
        devices = map_devices(NAMES, layouts)
        firsts = [group[0] for group in devices.groups]
        lowest = [min(layouts[0].place(rank).data for rank in ranks) for ranks in firsts]
        assert lowest == sorted(lowest)
        for group in devices.groups:
            path = [layouts[0].place(group[pipeline[0]][0]) for pipeline in devices.pipelines[0]]
            assert [each.stage for each in path] == [0] * len(path)
            assert [each.data for each in path] == sorted(each.data for each in path)


@pytest.mark.parametrize("world", WORLDS)
def test_locate_finds_the_group_and_device(world: int) -> None:
    for layouts in opposites(world):
        devices = map_devices(NAMES, layouts)
        for rank in range(world):
            group, device = devices.locate(rank)
            assert rank in devices.groups[group][device]
        with pytest.raises(LayoutError, match=f"rank {world} stands on no device"):
            devices.locate(world)


@pytest.mark.parametrize("world", WORLDS)
def test_an_opposite_model_runs_the_other_way(world: int) -> None:
    """On neighbouring devices, as the paper has it: up for the first model, down for the second."""
    for layouts in opposites(world):
        devices = map_devices(NAMES, layouts)
        assert devices.devices == math.lcm(layouts[0].pp, layouts[1].pp)
        for step, pipelines in zip((1, -1), devices.pipelines, strict=True):
            for pipeline in pipelines:
                assert all(after - before == step for before, after in pairwise(pipeline))


@pytest.mark.parametrize("world", WORLDS)
def test_the_map_agrees_with_the_planners_placement(world: int) -> None:
    for first, second in opposites(world):
        devices = map_devices(NAMES, (first, second))
        placed = place(
            Parallelism(first.tp, first.pp, first.dp), Parallelism(second.tp, second.pp, second.dp)
        )
        assert devices.pipelines == tuple(model.pipelines for model in placed.models)
        assert len(devices.groups) == placed.groups
        assert {len(ranks) for group in devices.groups for ranks in group} == {
            placed.ranks_per_device
        }


@pytest.mark.parametrize("world", WORLDS)
def test_the_opposite_of_blocks_is_the_planners_placement(world: int) -> None:
    """Where the planner numbers ranks as the first model does, its second model is the same."""
    compared = 0
    for first, second in opposites(world):
        placed = place(
            Parallelism(first.tp, first.pp, first.dp), Parallelism(second.tp, second.pp, second.dp)
        )
        numbered = Layout(placed.ranks(0))
        made = opposite_layout(numbered, second.tp, second.pp)
        assert set(made.ranks) == set(placed.ranks(1))
        compared += 1
    assert compared >= len(sizes(world))


@pytest.mark.parametrize("world", WORLDS)
def test_an_opposite_model_has_the_sizes_asked_for_and_counts_replicas_by_rank(world: int) -> None:
    for first, second in product(sizes(world), sizes(world)):
        wanted = parallelism(world, second)
        try:
            place(parallelism(world, first), wanted)
        except ProblemError:
            continue
        made = opposite_layout(Layout.contiguous(world, *first), *second)
        assert (made.tp, made.pp, made.dp) == (wanted.tp, wanted.pp, wanted.dp)
        lowest = [min(rank for stage in replica for rank in stage) for replica in made.ranks]
        assert lowest == sorted(lowest)


@pytest.mark.parametrize("world", WORLDS)
def test_a_model_without_stages_stands_in_megatrons_order(world: int) -> None:
    compared = 0
    for _, second in opposites(world):
        if second.pp == 1:
            assert second == Layout.contiguous(world, second.tp, 1)
            compared += 1
    assert compared >= len(sizes(world))


@pytest.mark.parametrize("world", WORLDS)
def test_the_opposite_of_as_many_stages_is_the_first_reversed(world: int) -> None:
    for first in (Layout.contiguous(world, *each) for each in sizes(world)):
        made = opposite_layout(first, first.tp, first.pp)
        assert set(made.ranks) == {replica[::-1] for replica in first.ranks}


@pytest.mark.parametrize("world", WORLDS)
def test_ranks_may_have_any_numbers(world: int) -> None:
    """The same first model on other ranks: the second one's replicas follow."""
    numbers = list(range(3, 3 + 2 * world, 2))
    Random(world).shuffle(numbers)

    def renumbered(ranks: Ranks) -> Ranks:
        return tuple(
            tuple(tuple(numbers[rank] for rank in stage) for stage in replica) for replica in ranks
        )

    for first, second in opposites(world):
        moved = Layout(renumbered(first.ranks))
        made = opposite_layout(moved, second.tp, second.pp)
        assert set(made.ranks) == set(renumbered(second.ranks))
        devices = map_devices(NAMES, (moved, made))
        check(devices, (moved, made))
        assert devices.pipelines == map_devices(NAMES, (first, second)).pipelines


def test_unequal_tensor_parallelism_makes_lanes() -> None:
    """Two replicas of the critic stand on a device, each with half of its ranks."""
    actor = Layout.contiguous(8, tensor=4, pipeline=2)
    critic = opposite_layout(actor, tensor=2, pipeline=2)
    assert critic.ranks == (((4, 5), (0, 1)), ((6, 7), (2, 3)))
    devices = map_devices(NAMES, (actor, critic))
    assert devices.groups == (((0, 1, 2, 3), (4, 5, 6, 7)),)
    assert devices.pipelines == (((0, 1),), ((1, 0),))


def test_fewer_stages_make_several_pipelines() -> None:
    """Two groups; in each the critic has a pipeline on either half of the actor's stages."""
    actor = Layout.contiguous(8, tensor=1, pipeline=4)
    critic = opposite_layout(actor, tensor=1, pipeline=2)
    assert critic.ranks == (((2,), (0,)), ((3,), (1,)), ((6,), (4,)), ((7,), (5,)))
    devices = map_devices(NAMES, (actor, critic))
    assert devices.groups == (((0,), (2,), (4,), (6,)), ((1,), (3,), (5,), (7,)))
    assert devices.pipelines == (((0, 1, 2, 3),), ((1, 0), (3, 2)))


def test_models_may_be_one_or_three() -> None:
    actor = Layout.contiguous(4, tensor=1, pipeline=2)
    critic = opposite_layout(actor, tensor=1, pipeline=2)
    assert map_devices(("actor",), (actor,)).pipelines == (((0, 1),),)
    three = map_devices(("actor", "critic", "reward"), (actor, critic, actor))
    assert three.pipelines == (((0, 1),), ((1, 0),), ((0, 1),))
    check(three, (actor, critic, actor))


# What cannot be fused


@pytest.mark.parametrize(("tensor", "pipeline"), [(3, 1), (1, 3), (4, 4), (0, 1), (1, 0), (-2, 2)])
def test_sizes_that_do_not_divide_the_ranks_are_refused(tensor: int, pipeline: int) -> None:
    said = rf"8 ranks cannot be split into replicas of {tensor} \(tensor\) x {pipeline} \(pipeline"
    with pytest.raises(LayoutError, match=said):
        opposite_layout(Layout.contiguous(8, 1, 2), tensor, pipeline)


def test_tensor_parallelism_must_be_a_power_of_two() -> None:
    with pytest.raises(LayoutError, match=r"second\.tp: want a power of two.*got 3"):
        opposite_layout(Layout.contiguous(6, 1, 2), tensor=3, pipeline=1)
    with pytest.raises(LayoutError, match=r"first\.tp: want a power of two.*got 3"):
        opposite_layout(Layout.contiguous(6, 3, 2), tensor=1, pipeline=1)


def test_a_tensor_parallel_group_must_hold_replicas_of_the_other_model() -> None:
    with pytest.raises(LayoutError, match=r"first\.dp: .* holds 2 of first .* multiple of 2"):
        opposite_layout(Layout.contiguous(4, 1, 4), tensor=2, pipeline=2)


@pytest.mark.parametrize("world", WORLDS)
def test_an_opposite_is_refused_where_the_planner_has_no_placement(world: int) -> None:
    for first, second in product(sizes(world), sizes(world)):
        try:
            place(parallelism(world, first), parallelism(world, second), ("first", "second"))
        except ProblemError as error:
            with pytest.raises(LayoutError) as caught:
                opposite_layout(Layout.contiguous(world, *first), *second)
            assert str(caught.value) == str(error)


@pytest.mark.parametrize(
    ("second", "said"),
    [
        (Layout.contiguous(8, 1, 2), "rank 4, 5, 6, 7 has one of them only"),
        (Layout.contiguous(2, 1, 2), "rank 2, 3 has one of them only"),
        (Layout((((0,), (1,)), ((2,), (5,)))), "rank 3, 5 has one of them only"),
        (Layout.contiguous(64, 1, 2), "rank 4, 5, 6, 7, 8, 9, 10, 11 has one of them only"),
    ],
)
def test_models_on_different_ranks_are_refused(second: Layout, said: str) -> None:
    with pytest.raises(LayoutError, match=f"actor and critic must have .* same ranks; {said}"):
        map_devices(NAMES, (Layout.contiguous(4, 1, 2), second))


def test_tensor_parallel_groups_that_cross_are_refused() -> None:
    """The actor's replicas 0 and 1 share a device on the first stage and part on the second."""
    actor = Layout(tuple(((2 * r, 2 * r + 1), (8 + 2 * r, 9 + 2 * r)) for r in range(4)))
    pairs = [(0, 1), (2, 3)], [(0, 2), (1, 3)]
    groups = [
        tuple(rank for r in pair for rank in actor.ranks[r][stage])
        for stage in range(2)
        for pair in pairs[stage]
    ]
    critic = Layout(tuple((ranks,) for ranks in groups))
    with pytest.raises(LayoutError, match=r"^actor: .*share a device.*groups of both models must"):
        map_devices(NAMES, (actor, critic))


def test_a_tensor_parallel_group_over_two_stages_is_refused() -> None:
    layouts = Layout.contiguous(2, 1, 2), Layout.contiguous(2, 2, 1)
    with pytest.raises(LayoutError, match=r"^actor: its replica .* passes a device twice"):
        map_devices(NAMES, layouts)
    with pytest.raises(LayoutError, match=r"^critic: its replica .* passes a device twice"):
        map_devices(NAMES, layouts[::-1])


@pytest.mark.parametrize(
    "critic",
    [
        (((1,), (0,)), ((2,), (3,))),  # against the first actor replica, with the second
        (((1,), (0,)), ((3,), (2,)), ((4,), (6,)), ((5,), (7,))),  # groups of 2, 2 and 4 devices
        (((1,), (2,)), ((3,), (0,)), ((5,), (4,)), ((7,), (6,))),  # groups of 4, 2 and 2 devices
    ],
)
def test_pipelines_that_cross_differently_are_refused(critic: Ranks) -> None:
    actor = Layout.blocks(2 * len(critic), tensor=1, pipeline=2)
    said = "actor and critic cross each other differently .* group 0 has devices .*, group [12] "
    with pytest.raises(LayoutError, match=said):
        map_devices(NAMES, (actor, Layout(critic)))
