"""Expected lengths of responses, against sums written out."""

from __future__ import annotations

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.migration.prompt_lengths import WEIGHT, PromptLengths

PROMPTS = range(6)
iterations = st.lists(
    st.lists(st.tuples(st.sampled_from(PROMPTS), st.integers(1, 10**6)), max_size=12),
    max_size=6,
)


def known(*iterations: list[tuple[int, int]]) -> PromptLengths:
    lengths = PromptLengths()
    for iteration in iterations:
        lengths.add(iteration)
    return lengths


def mean(lengths: PromptLengths, prompt: int) -> float:
    state = lengths.state_dict()
    return float(dict(zip(state["prompts"], state["means"], strict=True))[prompt])


def expectations(lengths: PromptLengths) -> list[float]:
    """Of all prompts, and of one that was never answered."""
    return [lengths.expected(prompt) for prompt in (*PROMPTS, len(PROMPTS))]


def test_before_the_first_iteration_all_prompts_are_alike() -> None:
    (tokens,) = set(expectations(known()))
    assert tokens > 0


def test_samples_of_a_prompt_are_averaged() -> None:
    assert mean(known([(0, 10), (1, 7), (0, 20), (0, 60)]), 0) == 30


def test_an_unknown_prompt_is_as_long_as_the_average_one() -> None:
    lengths = known([(0, 10), (0, 20), (0, 30)], [(1, 60)])
    assert lengths.expected(5) == (20 + 60) / 2  # of prompts, however many samples each has
    lengths.add([(0, 40)])
    assert lengths.expected(5) == (30 + 60) / 2


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8))
def test_older_epochs_count_for_less(tokens: list[int]) -> None:
    lengths = known(*([(3, each)] for each in tokens))
    last = len(tokens) - 1
    weights = [(WEIGHT if age < last else 1) * (1 - WEIGHT) ** age for age in range(last + 1)]
    assert sum(weights) == pytest.approx(1)
    assert weights == sorted(weights, reverse=True)  # the latest is of age 0
    wanted = sum(weight * each for weight, each in zip(weights, reversed(tokens), strict=True))
    assert lengths.expected(3) == pytest.approx(wanted)


def test_other_prompts_do_not_age_a_length() -> None:
    lengths = known([(0, 100)], [(1, 4)], [(1, 4)])
    assert mean(lengths, 0) == 100


def test_before_prompts_are_answered_twice_all_are_expected_alike() -> None:
    lengths = known([(prompt, 10 * prompt + 1) for prompt in PROMPTS])
    assert lengths.slope == 0
    assert len(set(expectations(lengths))) == 1


def test_means_that_tell_lengths_are_believed() -> None:
    lengths = known(*[[(prompt, 10 * prompt + 1) for prompt in PROMPTS]] * 2)
    assert lengths.slope == pytest.approx(1)
    assert [lengths.expected(each) for each in PROMPTS] == pytest.approx(
        [10 * each + 1 for each in PROMPTS]
    )


def test_means_that_tell_half_of_it_are_believed_by_half() -> None:
    lengths = known(
        [(prompt, 10 * prompt + 100) for prompt in PROMPTS],
        [(prompt, 5 * prompt + 100) for prompt in PROMPTS],
    )
    assert lengths.slope == pytest.approx(0.5)


def test_noise_deals_no_prompt_out_differently() -> None:
    rng = random.Random(1)
    lengths = PromptLengths()
    for _ in range(20):
        lengths.add((prompt, round(rng.lognormvariate(4, 1))) for prompt in range(200))
    assert lengths.slope < 0.1
    falling = known([(prompt, 10 + prompt) for prompt in PROMPTS])
    falling.add([(prompt, 100 - prompt) for prompt in PROMPTS])  # the other way round
    assert falling.slope == 0


@given(iterations, st.integers())
def test_the_order_in_which_samples_arrive_is_irrelevant(
    iterations: list[list[tuple[int, int]]], seed: int
) -> None:
    rng = random.Random(seed)
    shuffled = [rng.sample(each, len(each)) for each in iterations]
    assert expectations(known(*shuffled)) == expectations(known(*iterations))


@given(iterations, iterations)
def test_a_resumed_job_expects_the_same(
    before: list[list[tuple[int, int]]], after: list[list[tuple[int, int]]]
) -> None:
    whole, resumed = known(*before), known([(4, 3), (5, 1)])
    resumed.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert expectations(resumed) == expectations(whole)
    for iteration in after:
        whole.add(iteration)
        resumed.add(iteration)
        assert expectations(resumed) == expectations(whole)
