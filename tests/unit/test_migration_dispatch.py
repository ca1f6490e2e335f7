"""Who answers which prompt: the invariants of dispatch.py, and Graham's bound on the load."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.migration.dispatch import DISPATCHES, Dispatch, dispatch_prompts

expected = st.lists(
    st.floats(0, 1e9) | st.integers(0, 5).map(float),  # ties as well
    max_size=40,
)
instances = st.integers(1, 9)


@given(expected, instances, st.sampled_from(DISPATCHES))
def test_every_prompt_is_given_to_one_instance(
    tokens: list[float], instances: int, dispatch: Dispatch
) -> None:
    held = dispatch_prompts(tokens, instances, dispatch)
    assert len(held) == instances
    assert sorted(itertools.chain(*held)) == list(range(len(tokens)))


@given(st.floats(0, 1e9), st.integers(0, 40), instances)
def test_without_predictions_longest_first_is_round_robin(
    tokens: float, prompts: int, instances: int
) -> None:
    given_out = [dispatch_prompts([tokens] * prompts, instances, each) for each in DISPATCHES]
    assert given_out[0] == given_out[1]


@given(expected, instances)
def test_an_instance_admits_its_longest_first(tokens: list[float], instances: int) -> None:
    for prompts in dispatch_prompts(tokens, instances, "longest-first"):
        own = [tokens[prompt] for prompt in prompts]
        assert own == sorted(own, reverse=True)


@given(expected, instances)
def test_round_robin_heeds_only_the_number(tokens: list[float], instances: int) -> None:
    held = dispatch_prompts(tokens, instances, "round-robin")
    for instance, prompts in enumerate(held):
        assert prompts == [p for p in range(len(tokens)) if p % instances == instance]


def smallest_makespan(tokens: Sequence[int], instances: int) -> int:
    """The optimum, by brute force."""
    best = sum(tokens)
    for owners in itertools.product(range(instances), repeat=len(tokens)):
        load = [0] * instances
        for owner, each in zip(owners, tokens, strict=True):
            load[owner] += each
        best = min(best, max(load))
    return best


@given(st.lists(st.integers(0, 12), max_size=6), st.integers(1, 3))
def test_the_largest_load_is_within_grahams_bound(tokens: list[int], instances: int) -> None:
    held = dispatch_prompts(tokens, instances, "longest-first")
    largest = max(sum(tokens[prompt] for prompt in prompts) for prompts in held)
    # R. L. Graham, Bounds on Multiprocessing Timing Anomalies, 1969: at most 4/3 - 1/(3m) of it.
    assert 3 * instances * largest <= (4 * instances - 1) * smallest_makespan(tokens, instances)


@pytest.mark.parametrize(
    ("tokens", "held"),
    [
        # Graham's own worst case for two instances: 7 where 6 would do.
        ([3.0, 3.0, 2.0, 2.0, 2.0], [[0, 2, 4], [1, 3]]),
        ([2.0, 9.0, 2.0, 5.0], [[1], [3, 0, 2]]),
    ],
)
def test_each_prompt_goes_where_the_fewest_tokens_are(
    tokens: list[float], held: list[list[int]]
) -> None:
    assert dispatch_prompts(tokens, 2, "longest-first") == held
