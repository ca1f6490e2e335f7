"""Layout: which rank holds which part of a model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.pipeline.groups import Layout, Place

SIZES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


@given(SIZES, st.sampled_from([Layout.contiguous, Layout.blocks]))
def test_every_rank_has_one_place(sizes: tuple[int, int, int], order: object) -> None:
    replicas, stages, parts = sizes
    world = replicas * stages * parts
    layout = order(world, parts, stages)  # type: ignore[operator]
    assert (layout.dp, layout.pp, layout.tp) == sizes
    assert sorted(layout.members) == list(range(world))
    for data in range(replicas):
        for stage in range(stages):
            for part in range(parts):
                rank = layout.ranks[data][stage][part]
                assert layout.place(rank) == Place(data, stage, part)


@given(SIZES)
def test_blocks_keep_a_replica_on_neighbouring_ranks(sizes: tuple[int, int, int]) -> None:
    replicas, stages, parts = sizes
    size = stages * parts
    layout = Layout.blocks(replicas * size, parts, stages)
    for data, replica in enumerate(layout.ranks):
        ranks = [rank for stage in replica for rank in stage]
        assert ranks == list(range(data * size, (data + 1) * size))


def test_contiguous_counts_tensor_parts_then_replicas_then_stages() -> None:
    layout = Layout.contiguous(8, tensor=2, pipeline=2)
    assert layout.ranks == (((0, 1), (4, 5)), ((2, 3), (6, 7)))


def test_a_rank_outside_has_no_place() -> None:
    assert Layout((((3,), (1,)),)).place(2) is None


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ((), "as many stages"),
        ((((0,), (1,)), ((2,),)), "as many stages"),
        ((((0, 1), (2,)),), "as many stages"),
        ((((),),), "as many stages"),
        ((((0,), (0,)),), "twice"),
    ],
)
def test_a_layout_is_a_box_of_distinct_ranks(ranks: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(ranks)  # type: ignore[arg-type]


@pytest.mark.parametrize(("world", "tensor", "pipeline"), [(6, 2, 2), (2, 4, 1), (4, 0, 1)])
def test_sizes_that_do_not_divide_the_ranks_are_refused(
    world: int, tensor: int, pipeline: int
) -> None:
    with pytest.raises(ValueError, match="cannot be split"):
        Layout.contiguous(world, tensor, pipeline)
