"""Samples dealt out: against brute force, and against a plain simulation of what is promised."""

from __future__ import annotations

import itertools
import runpy
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.dispatch.balance import balance
from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import PACKED, PADDED, Layout, Runs
from megatron_rlhfuse.dispatch.micro_batches import (
    Limit,
    deal,
    deal_in_order,
    fused_order,
    measure,
    pipeline_order,
)
from megatron_rlhfuse.models.hf_config import ModelShape

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = runpy.run_path(str(ROOT / "benchmarks/dispatch_reference.py"))

COST = SequenceCost(3.0, 0.01)

costs_lists = st.lists(st.integers(0, 40), max_size=40)
small = st.lists(st.integers(1, 30), min_size=1, max_size=7)
lengths_lists = st.lists(st.integers(1, 400), min_size=1, max_size=60)


def largest(costs: Sequence[float], groups: Sequence[Sequence[int]]) -> float:
    return max(sum(costs[item] for item in group) for group in groups)


def best(costs: Sequence[int], groups: int, equal_counts: bool) -> int:
    """The least that the heaviest group can be made, by trying everything."""
    found = sum(costs)
    for placed in itertools.product(range(groups), repeat=len(costs)):
        sizes = [placed.count(group) for group in range(groups)]
        if equal_counts and max(sizes) - min(sizes) > 1:
            continue
        sums = [0] * groups
        for item, group in enumerate(placed):
            sums[group] += costs[item]
        found = min(found, max(sums))
    return found


@given(costs_lists, st.integers(1, 9), st.booleans())
def test_every_item_is_in_one_group(costs: list[int], groups: int, equal_counts: bool) -> None:
    found = balance(costs, groups, equal_counts)
    assert len(found) == groups
    assert sorted(item for group in found for item in group) == list(range(len(costs)))
    assert all(group == sorted(group) for group in found)
    sums = [sum(costs[item] for item in group) for group in found]
    assert sums == sorted(sums, reverse=True)
    if equal_counts:
        sizes = [len(group) for group in found]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(small, st.integers(1, 3), st.booleans())
def test_groups_are_nearly_as_balanced_as_they_can_be(
    costs: list[int], groups: int, equal_counts: bool
) -> None:
    # What is proven of largest differencing (Michiels et al., 2003 and 2007), in m groups.
    bound = 2 if equal_counts else 4 / 3 - 1 / (3 * groups)
    found = largest(costs, balance(costs, groups, equal_counts))
    optimum = best(costs, groups, equal_counts)
    assert optimum <= found <= bound * optimum


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e6), max_size=60), st.integers(1, 9), st.booleans())
def test_groups_are_those_of_the_plain_reference(
    costs: list[float], groups: int, equal_counts: bool
) -> None:
    assert balance(costs, groups, equal_counts) == REFERENCE["balance"](costs, groups, equal_counts)


def test_most_small_cases_are_solved_exactly() -> None:
    rng = np.random.default_rng(5)
    misses = 0
    for _ in range(200):
        costs = rng.integers(1, 31, rng.integers(2, 9)).tolist()
        groups, equal_counts = int(rng.integers(2, 4)), bool(rng.integers(2))
        misses += largest(costs, balance(costs, groups, equal_counts)) > best(
            costs, groups, equal_counts
        )
    assert misses <= 10


@pytest.mark.parametrize("equal_counts", [False, True])
def test_many_items_are_balanced_to_a_thousandth(equal_counts: bool) -> None:
    lengths = np.clip(np.rint(np.random.default_rng(0).lognormal(6, 1, 20_000)), 1, 8192)
    costs = lengths * (1 + lengths / 8192)
    sums = [costs[group].sum() for group in balance(costs.tolist(), 100, equal_counts)]
    assert max(sums) / statistics.mean(sums) < 1.001


@pytest.mark.parametrize(
    ("costs", "groups", "named"),
    [
        ([1.0, -1.0], 2, "costs[1]"),
        ([float("nan")], 2, "costs[0]"),
        ([1.0, float("inf")], 2, "costs[1]"),
        ([1.0], 0, "groups"),
        ([[1.0]], 1, "costs"),
    ],
)
def test_what_cannot_be_balanced_is_refused(costs: list[float], groups: int, named: str) -> None:
    with pytest.raises(ValueError, match=named.replace("[", r"\[").replace("]", r"\]")):
        balance(costs, groups)


both_layouts = pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])


def check(lengths: list[int], replicas: int, dealt: list[Runs]) -> None:
    assert len(dealt) == replicas
    assert len({len(runs) for runs in dealt}) == 1
    assert all(run for runs in dealt for run in runs)
    samples = [sample for runs in dealt for run in runs for sample in run]
    assert sorted(samples) == list(range(len(lengths)))


@both_layouts
@given(lengths=lengths_lists, replicas=st.integers(1, 4), rows=st.integers(1, 5))
def test_micro_batches_of_so_many_rows(
    lengths: list[int], replicas: int, rows: int, layout: Layout
) -> None:
    lengths = lengths * replicas * rows
    dealt = deal(lengths, replicas, Limit(rows=rows), COST, layout)
    check(lengths, replicas, dealt)
    assert {len(run) for runs in dealt for run in runs} == {rows}
    in_order = deal_in_order(len(lengths), replicas, rows)
    check(lengths, replicas, in_order)
    figures, before = (measure(lengths, each, COST, layout) for each in (dealt, in_order))
    assert figures.tokens == before.tokens == sum(lengths)
    assert sum(lengths) <= figures.computed <= before.computed
    assert figures.micro_batches == before.micro_batches == len(lengths) // (replicas * rows)


@given(lengths_lists, st.integers(1, 4), st.integers(0, 2000))
def test_micro_batches_of_so_many_tokens(lengths: list[int], replicas: int, more: int) -> None:
    lengths = lengths * replicas
    limit = max(lengths) + more
    dealt = deal(lengths, replicas, Limit(tokens=limit), COST)
    check(lengths, replicas, dealt)
    assert all(PADDED.tokens(lengths, run) <= limit for runs in dealt for run in runs)
    # No fewer would do: runs from the longest on are the fewest, up to equal numbers.
    fewest, start, falling = 0, 0, sorted(lengths, reverse=True)
    while start < len(falling):
        start += limit // falling[start]
        fewest += 1
    assert len(dealt[0]) == -(-fewest // replicas)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=7), st.integers(1, 3))
@settings(deadline=None)
def test_the_dearest_run_is_as_cheap_as_it_can_be(lengths: list[int], count: int) -> None:
    count = min(count, len(lengths))
    falling = sorted(lengths, reverse=True)
    limit = max(
        -(-len(lengths) // count) * falling[0], falling[0]
    )  # so that the fewest runs are at most `count`
    (runs,) = deal(lengths, 1, Limit(tokens=limit), COST)
    cuts = itertools.combinations(range(1, len(falling)), len(runs) - 1)
    optimum = min(
        max(
            (end - start) * COST(falling[start])
            for start, end in itertools.pairwise((0, *cut, len(falling)))
        )
        for cut in cuts
        if all(
            (end - start) * falling[start] <= limit
            for start, end in itertools.pairwise((0, *cut, len(falling)))
        )
    )
    assert max(PADDED.cost(lengths, run, COST) for run in runs) == pytest.approx(optimum)


def needed(lengths: list[int], tokens: int) -> int:
    """The fewest packed micro-batches of at most so many tokens, by trying everything."""
    found, falling = len(lengths), sorted(lengths, reverse=True)
    sums: list[int] = []

    def place(sample: int) -> None:
        nonlocal found
        if sample == len(falling):
            found = len(sums)
            return
        for i in range(len(sums)):
            if sums[i] + falling[sample] <= tokens and sums[i] not in sums[:i]:
                sums[i] += falling[sample]
                place(sample + 1)
                sums[i] -= falling[sample]
        if len(sums) + 1 < found:
            sums.append(falling[sample])
            place(sample + 1)
            sums.pop()

    place(0)
    return found


def first_fit(lengths: list[int], tokens: int) -> int:
    """Packed micro-batches that first fit by falling length takes."""
    sums: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, total in enumerate(sums) if total + length <= tokens]
        if fitting:
            sums[fitting[0]] += length
        else:
            sums.append(length)
    return len(sums)


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 4), st.integers(0, 2000))
def test_packed_micro_batches_of_so_many_tokens(
    lengths: list[int], replicas: int, more: int
) -> None:
    lengths = lengths * replicas
    limit = max(lengths) + more
    dealt = deal(lengths, replicas, Limit(tokens=limit), COST, PACKED)
    check(lengths, replicas, dealt)
    assert all(PACKED.tokens(lengths, run) <= limit for runs in dealt for run in runs)
    count = replicas * len(dealt[0])
    assert sum(lengths) <= count * limit
    assert count <= -(-first_fit(lengths, limit) // replicas) * replicas
    figures = measure(lengths, dealt, COST, PACKED)
    assert figures.computed == figures.tokens == sum(lengths)
    assert figures.micro_batches == len(dealt[0])


@settings(deadline=None)
@given(lengths_lists, st.integers(1, 4), st.integers(0, 2000))
def test_packing_computes_no_more_than_padding(
    lengths: list[int], replicas: int, more: int
) -> None:
    lengths = lengths * replicas
    limit = Limit(tokens=max(lengths) + more)
    packed, padded = (
        measure(lengths, deal(lengths, replicas, limit, COST, layout), COST, layout)
        for layout in (PACKED, PADDED)
    )
    assert packed.computed <= padded.computed


def test_packed_micro_batches_are_hardly_ever_more_than_needed() -> None:
    rng = np.random.default_rng(3)
    misses = 0
    for _ in range(400):
        replicas, longest = int(rng.integers(1, 4)), int(rng.choice([5, 10, 40]))
        size = replicas * int(rng.integers(1, 8 // replicas + 1))
        lengths = rng.integers(1, longest + 1, size).tolist()
        limit = max(lengths) + int(rng.choice([0, 1, rng.integers(0, 3 * longest)]))
        (runs, *_) = deal(lengths, replicas, Limit(tokens=limit), COST, PACKED)
        fewest = -(-needed(lengths, limit) // replicas)
        assert len(runs) >= fewest
        misses += len(runs) > fewest
    assert misses <= 2


@pytest.mark.parametrize("seed", range(10))
def test_packed_micro_batches_are_better_balanced_than_in_order(seed: int) -> None:
    drawn = np.clip(np.rint(np.random.default_rng(seed).lognormal(5, 1, 64)), 1, 2048)
    lengths = drawn.astype(int).tolist()
    dealt = deal(lengths, 4, Limit(rows=4), COST, PACKED)
    in_order = deal_in_order(64, 4, 4)
    figures, before = (measure(lengths, each, COST, PACKED) for each in (dealt, in_order))
    assert figures.imbalance <= before.imbalance
    dearest, dearest_before = (
        max(PACKED.cost(lengths, run, COST) for runs in each for run in runs)
        for each in (dealt, in_order)
    )
    assert dearest <= dearest_before


def test_packed_micro_batches_cost_nearly_the_same() -> None:
    lengths = np.random.default_rng(0).integers(1, 1025, 256).tolist()
    for limit in (Limit(rows=8), Limit(tokens=8192)):
        dealt = deal(lengths, 2, limit, COST, PACKED)
        costs = [PACKED.cost(lengths, run, COST) for runs in dealt for run in runs]
        assert max(costs) / statistics.mean(costs) < 1.01
        assert measure(lengths, dealt, COST, PACKED).imbalance < 1.001


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9))
def test_beside_another_pipeline_costs_never_fall(costs: list[int]) -> None:
    order = fused_order(costs, list(range(len(costs))))
    assert sorted(order) == list(range(len(costs)))
    assert [costs[i] for i in order] == sorted(costs)


def test_what_runs_beside_it_decides_the_order() -> None:
    lengths = [10, 20, 30, 40, 50]
    (alone,) = deal(lengths, 1, Limit(rows=1), COST)
    (beside,) = deal(lengths, 1, Limit(rows=1), COST, beside_another=True)
    assert [lengths[run[0]] for run in alone] == [10, 30, 50, 40, 20]
    assert [lengths[run[0]] for run in beside] == lengths


def test_samples_of_like_length_share_a_micro_batch() -> None:
    (runs,) = deal([5, 90, 6, 91, 40, 41], 1, Limit(rows=2), COST)
    assert sorted(map(sorted, runs)) == [[0, 2], [1, 3], [4, 5]]


@given(st.lists(st.integers(0, 50), max_size=20))
def test_the_dearest_run_in_the_middle(costs: list[int]) -> None:
    items = list(range(100, 100 + len(costs)))
    order = pipeline_order(costs, items)
    assert sorted(order) == items
    run = [costs[item - 100] for item in order]
    top = run.index(max(run)) if run else 0
    assert run[:top] == sorted(run[:top])
    assert run[top:] == sorted(run[top:], reverse=True)
    if len(run) > 1:
        assert sorted((run[0], run[-1])) == sorted(costs)[:2]


@both_layouts
@pytest.mark.parametrize(
    ("lengths", "replicas", "limit", "named"),
    [
        ([1] * 6, 4, Limit(rows=1), "6 samples"),
        ([1] * 6, 2, Limit(rows=2), "6 samples"),
        ([1] * 6, 4, Limit(tokens=9), "6 samples"),
        ([3, 9, 1], 1, Limit(tokens=8), "sample 1 has 9 tokens, more than a micro-batch's 8"),
    ],
)
def test_what_cannot_be_dealt_is_refused(
    lengths: list[int], replicas: int, limit: Limit, named: str, layout: Layout
) -> None:
    with pytest.raises(ValueError, match=named):
        deal(lengths, replicas, limit, COST, layout)


@pytest.mark.parametrize("fields", [{}, {"rows": 1, "tokens": 1}, {"rows": 0}, {"tokens": -1}])
def test_a_limit_is_one_of_two_numbers(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="limit"):
        Limit(**fields)


def test_figures_are_those_of_a_sum_by_hand() -> None:
    lengths, dealt = [4, 2, 3, 1, 5, 5], [[[0, 1], [4]], [[2, 3], [5]]]
    figures = measure(lengths, dealt, SequenceCost(1.0, 0.0))
    assert (figures.tokens, figures.computed, figures.micro_batches) == (20, 13 + 11, 2)
    assert figures.imbalance == pytest.approx(13 / 12)
    figures = measure(lengths, dealt, SequenceCost(1.0, 0.0), PACKED)
    assert (figures.tokens, figures.computed, figures.micro_batches) == (20, 20, 2)
    assert figures.imbalance == pytest.approx(11 / 10)


def test_attention_of_a_packed_micro_batch_is_that_of_each_sequence() -> None:
    cost = SequenceCost(0.0, 1.0)
    assert PADDED.cost([4, 2, 7], [0, 1], cost) == 4**2 + 4**2
    assert PACKED.cost([4, 2, 7], [0, 1], cost) == 4**2 + 2**2


def test_cost_is_that_of_the_matrices_and_of_attention() -> None:
    shape = ModelShape(
        model_type="llama", head="language", stored_head="language", num_layers=3,
        hidden_size=8, ffn_hidden_size=20, num_attention_heads=4, num_query_groups=2, head_dim=2,
        vocab_size=50, max_position_embeddings=64, norm_epsilon=1e-6, rotary_base=1e4,
        rope_scaling_factor=None, qkv_bias=False, qk_layernorm=False, tied_embeddings=False,
        folder=None,  # type: ignore[arg-type]
    )  # fmt: skip
    query = output = 8 * 8
    key = value = 8 * 4
    weights = 3 * (query + key + value + output + 3 * 8 * 20) + 8 * 50
    seen = 3 * 4 * 2  # layers, heads and their dimensions, for every pair of tokens
    tokens = 10
    pairs = tokens * tokens / 2
    assert SequenceCost.of(shape)(tokens) == 2 * weights * tokens + 4 * seen * pairs
