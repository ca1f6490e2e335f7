"""Two models on the same ranks: who stands where, and the problem that follows."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.schedule.errors import ProblemError, ScheduleError
from megatron_rlhfuse.schedule.layout import (
    Parallelism,
    Placement,
    StageCosts,
    fusion_problem,
    place,
)
from megatron_rlhfuse.schedule.problem import load_problem

PROBLEMS = Path(__file__).resolve().parents[2] / "examples" / "problems"


def uniform(
    stages: int, forward: float = 1.0, activation: float = 1.0, resident: float = 0.0
) -> StageCosts:
    return StageCosts(
        forward=(forward,) * stages,
        backward=(2 * forward,) * stages,
        activation=(activation,) * stages,
        resident=(resident,) * stages,
    )


@st.composite
def sizes_of_two_models(draw: st.DrawFn) -> tuple[Parallelism, Parallelism]:
    """Sizes on equal world sizes whose stages divide the devices."""
    tps = [2 ** draw(st.integers(0, 3)) for _ in range(2)]
    pps = [draw(st.integers(1, 6)) for _ in range(2)]
    world = max(tps) * math.lcm(*pps) * draw(st.integers(1, 3))
    a, b = (Parallelism(tp, pp, world // (tp * pp)) for tp, pp in zip(tps, pps, strict=True))
    return a, b


@given(sizes_of_two_models())
def test_both_models_stand_on_every_rank_once(sizes: tuple[Parallelism, Parallelism]) -> None:
    placement = place(*sizes)
    for model, wanted in enumerate(sizes):
        layout = Layout(placement.ranks(model))  # refuses a rank that stands twice
        assert sorted(layout.members) == list(range(wanted.world_size))
        assert (layout.tp, layout.pp, layout.dp) == (wanted.tp, wanted.pp, wanted.dp)


@given(sizes_of_two_models())
def test_the_papers_transformation(sizes: tuple[Parallelism, Parallelism]) -> None:
    placement = place(*sizes)
    for placed, wanted in zip(placement.models, sizes, strict=True):
        assert len(placed.pipelines) * wanted.pp == placement.devices  # K x N_model = N
        assert placement.groups * len(placed.pipelines) * placed.lanes == wanted.dp
        assert sorted(sum(placed.pipelines, ())) == list(range(placement.devices))
    assert placement.devices == math.lcm(sizes[0].pp, sizes[1].pp)
    for forward, placed in zip((1, -1), placement.models, strict=True):
        for pipeline in placed.pipelines:
            steps = {after - before for before, after in pairwise(pipeline)}
            assert steps <= {forward}


@given(sizes_of_two_models())
def test_a_stage_stands_on_the_device_that_the_problem_names(
    sizes: tuple[Parallelism, Parallelism],
) -> None:
    placement = place(*sizes)
    for model, placed in enumerate(placement.models):
        replicas = iter(placement.ranks(model))
        for group in range(placement.groups):
            for pipeline in placed.pipelines:
                for _ in range(placed.lanes):
                    for device, ranks in zip(pipeline, next(replicas), strict=True):
                        assert set(ranks) <= set(placement.device_ranks(group, device))
                        assert {placement.locate(rank) for rank in ranks} == {(group, device)}


@given(sizes_of_two_models(), st.sampled_from([1, 2, 4, 8, 16]))
def test_spans_nodes_agrees_with_looking_at_every_pipeline(
    sizes: tuple[Parallelism, Parallelism], gpus_per_node: int
) -> None:
    placement = place(*sizes)
    if gpus_per_node % placement.ranks_per_device:
        return  # a tensor-parallel group in two nodes: no cluster description has that
    crossing = {
        len({rank // gpus_per_node for stage in replica for rank in stage}) > 1
        for model in range(2)
        for replica in placement.ranks(model)
    }
    assert placement.spans_nodes(gpus_per_node) == (True in crossing)


@pytest.mark.parametrize("number", range(12))
def test_published_instances_follow_from_their_parallel_sizes(number: int) -> None:
    published = load_problem(PROBLEMS / f"published-{number:02}.json")
    actor, critic = published.models
    # One group: the model with as many stages as devices has one replica. Any equal TP will do.
    a, b = (
        Parallelism(4, model.stages, published.devices // model.stages) for model in (actor, critic)
    )
    costs = [
        StageCosts(m.forward, m.backward, m.activation, (0.0,) * m.stages) for m in (actor, critic)
    ]
    count = actor.micro_batches * a.dp
    made = fusion_problem(
        place(a, b, (actor.name, critic.name)), (costs[0], costs[1]), (count, count)
    )
    assert made == published


def test_the_actor_of_a_placement_is_a_layout_of_blocks() -> None:
    placement = place(Parallelism(2, 4, 4), Parallelism(2, 2, 8))
    assert placement.ranks(0) == Layout.blocks(32, tensor=2, pipeline=4).ranks


def test_unequal_tensor_parallelism_makes_replicas() -> None:
    # 2 groups of 2 devices of 4 ranks; a device holds two tensor-parallel groups of the critic.
    placement = place(Parallelism(4, 2, 2), Parallelism(2, 2, 4))
    assert (placement.groups, placement.devices, placement.ranks_per_device) == (2, 2, 4)
    assert placement.ranks(0) == (((0, 1, 2, 3), (4, 5, 6, 7)), ((8, 9, 10, 11), (12, 13, 14, 15)))
    assert placement.ranks(1) == (
        ((4, 5), (0, 1)),
        ((6, 7), (2, 3)),
        ((12, 13), (8, 9)),
        ((14, 15), (10, 11)),
    )
    problem = fusion_problem(placement, (uniform(2), uniform(2)), (16, 16))
    # The problem has one pipeline for both lanes, and every replica its share of 16.
    assert [model.pipelines for model in problem.models] == [((0, 1),), ((1, 0),)]
    assert [model.micro_batches for model in problem.models] == [8, 4]


def test_the_smaller_groups_may_be_the_actors() -> None:
    placement = place(Parallelism(1, 2, 4), Parallelism(4, 2, 1))
    assert [placed.lanes for placed in placement.models] == [4, 1]
    assert placement.ranks(0) == tuple(((lane,), (4 + lane,)) for lane in range(4))
    assert placement.ranks(1) == (((4, 5, 6, 7), (0, 1, 2, 3)),)


def test_what_stays_resident_is_taken_off_the_memory() -> None:
    actor = StageCosts((1, 1), (2, 2), (1, 1), resident=(10, 20))
    critic = StageCosts((1, 1), (2, 2), (1, 1), resident=(1, 2))
    placement = place(Parallelism(1, 2, 1), Parallelism(1, 2, 1))
    problem = fusion_problem(placement, (actor, critic), (4, 4), memory=80, p2p=0.5)
    assert problem.memory_limit == (80 - 10 - 2, 80 - 20 - 1)  # the critic runs in reverse
    assert problem.p2p == 0.5


@pytest.mark.parametrize(
    ("a", "b", "field", "says"),
    [
        (Parallelism(4, 8, 8), Parallelism(4, 4, 8), "critic.dp", "critic.dp 16 would fit"),
        (Parallelism(1, 3, 1), Parallelism(1, 2, 1), "critic.dp", "same ranks"),
        (Parallelism(3, 2, 1), Parallelism(3, 2, 1), "actor.tp", "power of two"),
        (Parallelism(4, 2, 1), Parallelism(0, 2, 1), "critic.tp", "from 1"),
        (Parallelism(4, 0, 1), Parallelism(4, 2, 1), "actor.pp", "from 1"),
        (Parallelism(2, 4, 1), Parallelism(1, 8, 1), "critic.dp", "want a multiple of 2"),
    ],
)
def test_what_cannot_be_laid_out_is_named(
    a: Parallelism, b: Parallelism, field: str, says: str
) -> None:
    with pytest.raises(ScheduleError) as caught:
        place(a, b)
    assert isinstance(caught.value, ProblemError)
    assert caught.value.field == field
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def two_stages() -> Placement:
    return place(Parallelism(1, 2, 2), Parallelism(1, 2, 2))


@pytest.mark.parametrize(
    ("costs", "micro_batches", "memory", "field", "says"),
    [
        (uniform(2), 7, math.inf, "critic.dp", "7 micro-batches"),
        (uniform(2), 0, math.inf, "critic.dp", "0 micro-batches"),
        (uniform(3), 8, math.inf, "critic.forward", "one number per stage (2), got 3"),
        (uniform(2, resident=50), 8, 80, "memory", "100.0 of the 80.0"),
    ],
)
def test_costs_that_do_not_fit_are_named(
    costs: StageCosts, micro_batches: int, memory: float, field: str, says: str
) -> None:
    actor = uniform(2, resident=50)
    with pytest.raises(ProblemError) as caught:
        fusion_problem(two_stages(), (actor, costs), (8, micro_batches), memory=memory)
    assert caught.value.field == field
    assert says in str(caught.value)
