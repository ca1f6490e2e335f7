"""Length distributions against plain arithmetic, and the memory of iterations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.migration.lengths import LengthDistribution, LengthHistory
from megatron_rlhfuse.schedule.errors import ProblemError

weighted = st.lists(st.tuples(st.integers(0, 60), st.floats(0.1, 5.0)), min_size=1, max_size=30)


def of(pairs: list[tuple[int, float]]) -> LengthDistribution:
    lengths, weights = zip(*pairs, strict=True)
    return LengthDistribution(lengths, weights)


@given(weighted, st.integers(0, 70))
def test_expected_remaining_is_the_mean_of_what_is_longer(
    pairs: list[tuple[int, float]], so_far: int
) -> None:
    longer = [(length - so_far, weight) for length, weight in pairs if length > so_far]
    expected = 1.0
    if longer:
        expected = sum(left * weight for left, weight in longer) / sum(w for _, w in longer)
    assert of(pairs).expected_remaining(so_far) == pytest.approx(expected)


@given(weighted, st.floats(0.001, 0.999))
def test_quantiles(pairs: list[tuple[int, float]], q: float) -> None:
    found = of(pairs).quantile(q)
    total = sum(weight for _, weight in pairs)
    assert found in {length for length, _ in pairs}
    assert sum(w for length, w in pairs if length <= found) / total >= q - 1e-9
    assert sum(w for length, w in pairs if length < found) / total < q + 1e-9


@given(weighted, st.integers(0, 70), st.integers(1, 20))
def test_remaining_are_quantiles_of_what_is_longer(
    pairs: list[tuple[int, float]], so_far: int, samples: int
) -> None:
    levels = (np.arange(samples) + 0.5) / samples
    left = of(pairs).remaining(np.full(samples, so_far), levels)
    longer = {length - so_far for length, _ in pairs if length > so_far} or {1}
    assert set(left.tolist()) <= longer
    assert left.tolist() == sorted(left.tolist())


def test_remaining_at_fine_levels_have_the_expected_mean() -> None:
    known = LengthDistribution.log_normal(100, 0.8, 1000)
    levels = (np.arange(20_000) + 0.5) / 20_000
    left = known.remaining(np.full(20_000, 150), levels)
    assert left.mean() == pytest.approx(known.expected_remaining(150), rel=1e-3)


def test_draws_follow_the_weights() -> None:
    known = LengthDistribution([5, 9], [3, 1])
    drawn = known.draw(np.random.default_rng(0), 20_000)
    assert set(drawn.tolist()) == {5, 9}
    assert (drawn == 5).mean() == pytest.approx(0.75, abs=0.02)
    assert known.mean == pytest.approx(6.0)


def test_a_log_normal_has_its_quantiles_and_is_cut() -> None:
    known = LengthDistribution.log_normal(200, 0.745, 2048)
    assert known.quantile(0.5) == pytest.approx(200, abs=1)
    assert known.quantile(0.999) == pytest.approx(200 * np.exp(0.745 * 3.0902), rel=0.02)
    assert LengthDistribution.log_normal(200, 0.745, 300).quantile(1.0) == 300
    assert LengthDistribution.log_normal(7, 0.0, 300).lengths.tolist() == [7]


@pytest.mark.parametrize(
    ("lengths", "weights"),
    [([], None), ([1], [0.0]), ([-1], None), ([1, 2], [1.0]), ([1], [np.inf])],
)
def test_what_is_no_distribution_is_refused(lengths: Any, weights: Any) -> None:
    with pytest.raises(ValueError, match="lengths"):
        LengthDistribution(lengths, weights)


def test_the_prior_goes_with_the_first_lengths() -> None:
    history = LengthHistory(800)
    prior = history.distribution()
    assert prior.quantile(0.5) == pytest.approx(100, abs=1)
    assert prior.lengths.max() == 800
    history.add([])
    assert history.distribution().lengths.max() == 800
    history.add([3, 3, 7])
    known = history.distribution()
    assert known.lengths.tolist() == [3, 7]
    assert known.weights == pytest.approx([2 / 3, 1 / 3])


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=5), min_size=1, max_size=6))
def test_iterations_are_forgotten_exponentially(iterations: list[list[int]]) -> None:
    history = LengthHistory(20, decay=0.5)
    weights = np.zeros(21)
    for age, lengths in enumerate(reversed(iterations)):
        for length in lengths:
            weights[length] += 0.5**age
    for lengths in iterations:
        history.add(lengths)
    known = history.distribution()
    assert known.lengths.tolist() == np.flatnonzero(weights).tolist()
    assert known.weights == pytest.approx(weights[weights > 0] / weights.sum())


def test_state_goes_through_json() -> None:
    history = LengthHistory(50)
    for lengths in ([1, 2, 50], [4, 4]):
        history.add(lengths)
    other = LengthHistory(50)
    other.add([33])
    other.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert other.state_dict() == history.state_dict()
    shorter = LengthHistory(10)
    shorter.load_state_dict(history.state_dict())
    assert shorter.distribution().lengths.tolist() == [1, 2, 4, 10]


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"lengths": [1]}, "weights: missing"),
        ({"lengths": 1, "weights": []}, "lengths: want a list"),
        ({"lengths": [-1], "weights": [1.0]}, r"lengths\[0\]: want a whole number"),
        ({"lengths": [1], "weights": [0]}, r"weights\[0\]: want a number above 0"),
        ({"lengths": [1], "weights": [1, 2]}, "weights: want a number, or one per length"),
        ({"lengths": [1], "weights": 1}, "weights: want a list"),
    ],
)
def test_a_bad_state_is_refused(state: Any, says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        LengthHistory(50).load_state_dict(state)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="max_tokens"):
        LengthHistory(0)
    with pytest.raises(ValueError, match="decay"):
        LengthHistory(5, decay=1.5)
    with pytest.raises(ValueError, match="max_tokens"):
        LengthHistory(5).add([6])
