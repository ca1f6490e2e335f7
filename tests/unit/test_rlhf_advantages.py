"""Advantage estimators against loops written from the papers' formulas, and their invariants."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.advantages import (
    estimate_advantages,
    gae,
    grpo,
    reinforce_plus_plus,
    rloo,
    whiten,
)

seeds = st.integers(0, 2**31)
length_lists = st.lists(st.integers(1, 7), min_size=1, max_size=5)
groups_of_scores = st.lists(
    st.lists(st.floats(-10, 10, width=32, allow_subnormal=False), min_size=2, max_size=5),
    min_size=1,
    max_size=4,
)
WIDTH = 7


def right_padded_mask(lengths: list[int]) -> Tensor:
    return torch.tensor([[float(t < length) for t in range(WIDTH)] for length in lengths])


def random_batch(lengths: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token_rewards, values, mask), with numbers in the padding too."""
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, len(lengths), WIDTH, generator=generator)
    return rewards, values, right_padded_mask(lengths)


def gae_by_definition(
    rewards: list[float], values: list[float], gamma: float, lam: float
) -> list[float]:
    """The double sum: A_t = sum over l of (gamma * lam)^l * delta_{t+l}."""
    after = [*values[1:], 0.0]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def flatten(groups: list[list[float]], seed: int) -> tuple[Tensor, Tensor]:
    """Shuffled (scores, group_ids); ids are neither sorted nor consecutive."""
    scores = torch.tensor([s for group in groups for s in group])
    ids = torch.tensor([1000 - 7 * g for g, group in enumerate(groups) for _ in group])
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed))
    return scores[order], ids[order]


@settings(deadline=None, max_examples=50)
@given(length_lists, seeds, st.floats(0, 1), st.floats(0, 1))
def test_gae_equals_its_double_sum(lengths: list[int], seed: int, gamma: float, lam: float) -> None:
    rewards, values, mask = random_batch(lengths, seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(lengths):
        expected = gae_by_definition(rewards[i, :n].tolist(), values[i, :n].tolist(), gamma, lam)
        torch.testing.assert_close(advantages[i, :n], torch.tensor(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(returns[i, :n], advantages[i, :n] + values[i, :n])
        assert (advantages[i, n:] == 0).all() and (returns[i, n:] == 0).all()


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds)
def test_gae_without_discount_is_the_reward_to_go_minus_the_value(
    lengths: list[int], seed: int
) -> None:
    rewards, values, mask = random_batch(lengths, seed)
    advantages, returns = gae(rewards, values, mask, gamma=1.0, lam=1.0)
    to_go = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    torch.testing.assert_close(returns, to_go, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(advantages, (to_go - values) * mask, rtol=1e-5, atol=1e-5)


def test_gae_with_lambda_zero_is_the_temporal_difference() -> None:
    rewards, values, mask = random_batch([WIDTH], 0)
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.0)
    after = torch.cat([values[:, 1:], torch.zeros(1, 1)], dim=1)
    torch.testing.assert_close(advantages, rewards + 0.9 * after - values)


@settings(deadline=None, max_examples=30)
@given(seeds, st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH))
def test_gae_skips_holes_in_the_mask(seed: int, present: list[bool]) -> None:
    rewards, values, _ = random_batch([WIDTH], seed)
    mask = torch.tensor([[float(p) for p in present]])
    kept = torch.tensor(present).nonzero().flatten()
    advantages, _ = gae(rewards, values, mask, gamma=0.9, lam=0.8)
    closed, _ = gae(rewards[:, kept], values[:, kept], mask[:, kept], gamma=0.9, lam=0.8)
    torch.testing.assert_close(advantages[:, kept], closed)
    assert (advantages[mask == 0] == 0).all()


@settings(deadline=None, max_examples=50)
@given(groups_of_scores, seeds, st.booleans())
def test_grpo_equals_the_loop(groups: list[list[float]], seed: int, normalize_std: bool) -> None:
    scores, ids = flatten(groups, seed)
    got = grpo(scores, ids, normalize_std)
    for i, group_id in enumerate(ids.tolist()):
        peers = [s for s, g in zip(scores.tolist(), ids.tolist(), strict=True) if g == group_id]
        expected = scores[i].item() - statistics.fmean(peers)
        if normalize_std:
            expected /= statistics.stdev(peers) + 1e-6
        assert got[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(deadline=None, max_examples=50)
@given(groups_of_scores, seeds)
def test_rloo_equals_the_loop(groups: list[list[float]], seed: int) -> None:
    scores, ids = flatten(groups, seed)
    got = rloo(scores, ids)
    for i, group_id in enumerate(ids.tolist()):
        others = [
            s
            for j, (s, g) in enumerate(zip(scores.tolist(), ids.tolist(), strict=True))
            if g == group_id and j != i
        ]
        expected = scores[i].item() - statistics.fmean(others)
        assert got[i].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("estimate", [grpo, lambda s, g: grpo(s, g, False), rloo])
@settings(deadline=None, max_examples=30)
@given(groups=groups_of_scores, seed=seeds)
def test_group_advantages_sum_to_zero_and_follow_a_permutation(
    estimate: Callable[[Tensor, Tensor], Tensor], groups: list[list[float]], seed: int
) -> None:
    scores, ids = flatten(groups, seed)
    got = estimate(scores, ids)
    for group_id in ids.unique():
        assert got[ids == group_id].sum().item() == pytest.approx(0.0, abs=1e-4)
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(estimate(scores[order], ids[order]), got[order])


@pytest.mark.parametrize("score", [0.1, -3.3, 123456.7])
def test_a_group_of_equal_scores_has_no_advantage(score: float) -> None:
    scores, ids = torch.full((7,), score), torch.zeros(7, dtype=torch.int64)
    for got in (grpo(scores, ids), grpo(scores, ids, normalize_std=False), rloo(scores, ids)):
        assert got.abs().max().item() < 1e-3


@pytest.mark.parametrize("estimate", [grpo, rloo])
def test_a_group_of_one_names_the_flag(estimate: Callable[[Tensor, Tensor], Tensor]) -> None:
    ids = torch.tensor([4, 4, 9])
    with pytest.raises(ValueError, match=r"groups \[9\].*--rollout-samples-per-prompt to 2"):
        estimate(torch.zeros(3), ids)
    with pytest.raises(ValueError, match=r"both must be \[batch\]"):
        estimate(torch.zeros(3, 1), ids)


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds, st.floats(0, 1))
def test_reinforce_plus_plus_equals_the_loop(lengths: list[int], seed: int, gamma: float) -> None:
    rewards, _, mask = random_batch(lengths, seed)
    got = reinforce_plus_plus(rewards, mask, gamma)
    to_go = [
        sum(gamma ** (s - t) * rewards[i, s].item() for s in range(t, n))
        for i, n in enumerate(lengths)
        for t in range(n)
    ]
    mean, variance = statistics.fmean(to_go), statistics.pvariance(to_go)
    expected = torch.tensor([(g - mean) / (variance + 1e-8) ** 0.5 for g in to_go])
    torch.testing.assert_close(got[mask == 1], expected, rtol=1e-3, atol=1e-3)
    assert (got[mask == 0] == 0).all()


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds, st.floats(-100, 100), st.floats(0.1, 100))
def test_whitening_gives_unit_variance_and_the_mean_asked_for(
    lengths: list[int], seed: int, shift: float, scale: float
) -> None:
    x, _, mask = random_batch([7, *lengths], seed)
    x = x * scale + shift
    tokens = x[mask == 1]
    for shift_mean in (True, False):
        got = whiten(x, mask, shift_mean)
        mean = 0.0 if shift_mean else tokens.mean().item()
        assert got[mask == 1].mean().item() == pytest.approx(mean, rel=1e-5, abs=1e-4)
        assert got[mask == 1].var(correction=0).item() == pytest.approx(1.0, rel=1e-3)
        assert (got[mask == 0] == 0).all()


def test_whitening_equal_numbers_gives_zero_and_nothing_is_refused() -> None:
    assert whiten(torch.full((3, 5), 100.1), torch.ones(3, 5)).abs().max().item() < 1e-3
    with pytest.raises(ValueError, match="mask holds no response token"):
        whiten(torch.ones(2, 2), torch.zeros(2, 2))


def test_dispatcher_runs_the_estimator_asked_for() -> None:
    rewards, values, mask = random_batch([3, 7, 1, 5], 3)
    ids = torch.tensor([0, 1, 0, 1])
    scores = (rewards * mask).sum(1)

    raw = estimate_advantages(
        "gae", rewards, mask, whiten_advantages=False, values=values, gamma=0.9, lam=0.8
    )
    advantages, returns = gae(rewards, values, mask, 0.9, 0.8)
    torch.testing.assert_close(raw.advantages, advantages)
    torch.testing.assert_close(raw.returns, returns)

    white = estimate_advantages(
        "gae", rewards, mask, whiten_advantages=True, values=values, gamma=0.9, lam=0.8
    )
    torch.testing.assert_close(white.advantages, whiten(advantages, mask))
    torch.testing.assert_close(white.returns, returns)

    per_sample = {
        ("grpo", True): grpo(scores, ids),
        ("grpo", False): grpo(scores, ids, normalize_std=False),
        ("rloo", True): rloo(scores, ids),
    }
    for (kind, normalize_std), expected in per_sample.items():
        got = estimate_advantages(
            kind,
            rewards,
            mask,
            whiten_advantages=False,
            group_ids=ids,
            normalize_std=normalize_std,
        )
        torch.testing.assert_close(got.advantages, expected.unsqueeze(1) * mask)
        assert got.returns is None

    got = estimate_advantages("reinforce++", rewards, mask, whiten_advantages=False, gamma=0.5)
    torch.testing.assert_close(got.advantages, reinforce_plus_plus(rewards, mask, 0.5))
    assert got.returns is None


def test_dispatcher_names_what_is_missing() -> None:
    rewards = mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match="'gae' needs values"):
        estimate_advantages("gae", rewards, mask, whiten_advantages=True)
    with pytest.raises(ValueError, match="'rloo' needs group_ids"):
        estimate_advantages("rloo", rewards, mask, whiten_advantages=True)
    with pytest.raises(ValueError, match="group_ids has shape"):
        estimate_advantages("grpo", rewards, mask, whiten_advantages=True, group_ids=torch.zeros(3))
    with pytest.raises(ValueError, match="choose one of gae, grpo, rloo, reinforce"):
        estimate_advantages("td", rewards, mask, whiten_advantages=True)
