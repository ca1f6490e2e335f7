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
from megatron_rlhfuse.dispatch.micro_batches import (
    Limit,
    Runs,
    deal,
    deal_in_order,
    measure,
    padded_cost,
    padded_tokens,
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


def check(lengths: list[int], replicas: int, dealt: list[Runs]) -> None:
    assert len(dealt) == replicas
    assert len({len(runs) for runs in dealt}) == 1
    samples = [sample for runs in dealt for run in runs for sample in run]
    assert sorted(samples) == list(range(len(lengths)))


@given(lengths_lists, st.integers(1, 4), st.integers(1, 5))
def test_micro_batches_of_so_many_rows(lengths: list[int], replicas: int, rows: int) -> None:
    lengths = lengths * replicas * rows
    dealt = deal(lengths, replicas, Limit(rows=rows), COST)
    check(lengths, replicas, dealt)
    assert {len(run) for runs in dealt for run in runs} == {rows}
    in_order = deal_in_order(len(lengths), replicas, rows)
    check(lengths, replicas, in_order)
    figures, before = (measure(lengths, each, COST) for each in (dealt, in_order))
    assert figures.tokens == before.tokens == sum(lengths)
    assert sum(lengths) <= figures.computed <= before.computed


@given(lengths_lists, st.integers(1, 4), st.integers(0, 2000))
def test_micro_batches_of_so_many_tokens(lengths: list[int], replicas: int, more: int) -> None:
    lengths = lengths * replicas
    limit = max(lengths) + more
    dealt = deal(lengths, replicas, Limit(tokens=limit), COST)
    check(lengths, replicas, dealt)
    assert all(padded_tokens(lengths, run) <= limit for runs in dealt for run in runs)
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
    assert max(padded_cost(lengths, run, COST) for run in runs) == pytest.approx(optimum)


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


@pytest.mark.parametrize(
    ("lengths", "replicas", "limit", "named"),
    [
        ([1] * 6, 4, Limit(rows=1), "6 samples"),
        ([1] * 6, 2, Limit(rows=2), "6 samples"),
        ([3, 9], 1, Limit(tokens=8), "sample 1 has 9 tokens"),
    ],
)
def test_what_cannot_be_dealt_is_refused(
    lengths: list[int], replicas: int, limit: Limit, named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        deal(lengths, replicas, limit, COST)


@pytest.mark.parametrize("fields", [{}, {"rows": 1, "tokens": 1}, {"rows": 0}, {"tokens": -1}])
def test_a_limit_is_one_of_two_numbers(fields: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="limit"):
        Limit(**fields)


def test_figures_are_those_of_a_sum_by_hand() -> None:
    figures = measure([4, 2, 3, 1], [[[0, 1]], [[2, 3]]], SequenceCost(1.0, 0.0))
    assert (figures.tokens, figures.computed) == (10, 8 + 6)
    assert figures.imbalance == pytest.approx(8 / 7)


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
