"""Statistics against closed forms and the standard library."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.rlhf.statistics import explained_variance, policy_mismatch

floats = st.floats(-10, 10, width=32, allow_subnormal=False)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(floats, floats), min_size=1, max_size=8))
def test_mismatch_equals_the_loop(pairs: list[tuple[float, float]]) -> None:
    old, rollout = torch.tensor(pairs).T.unsqueeze(1)
    got = policy_mismatch(old, rollout, torch.ones_like(old))
    differences = [o - r for o, r in pairs]
    assert got.mean_abs == pytest.approx(statistics.fmean(map(abs, differences)), rel=1e-5)
    assert got.max_abs == pytest.approx(max(map(abs, differences)), rel=1e-6)
    k3 = statistics.fmean(math.exp(d) - 1 - d for d in differences)
    assert got.kl == pytest.approx(k3, rel=1e-4, abs=1e-6)


def test_equal_engines_have_no_mismatch() -> None:
    log_probs = torch.randn(3, 4)
    got = policy_mismatch(log_probs, log_probs, torch.ones(3, 4))
    assert (got.mean_abs, got.max_abs, got.kl) == (0.0, 0.0, 0.0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=8))
def test_explained_variance_equals_the_loop(pairs: list[tuple[float, float]]) -> None:
    values, returns = torch.tensor(pairs).T.unsqueeze(1)
    variance = statistics.pvariance([r for _, r in pairs])
    got = explained_variance(values, returns, torch.ones_like(values))
    if variance == 0:
        assert math.isnan(got)
    elif variance > 1e-6:
        residual = statistics.pvariance([r - v for v, r in pairs])
        assert got == pytest.approx(1 - residual / variance, rel=1e-3, abs=1e-3)


def test_explained_variance_of_known_critics() -> None:
    returns, mask = torch.tensor([[1.0, 2.0, 3.0, 100.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(returns + 7, returns, mask) == pytest.approx(1.0)
    assert explained_variance(torch.full((1, 4), 5.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)


@pytest.mark.parametrize("tokens", [3, 7, 11, 13])
def test_nothing_to_explain_in_equal_returns(tokens: int) -> None:
    values, returns = torch.randn(1, tokens), torch.full((1, tokens), 0.1)
    assert math.isnan(explained_variance(values, returns, torch.ones(1, tokens)))


def test_an_empty_batch_is_refused() -> None:
    zeros = torch.zeros(2, 2)
    with pytest.raises(ValueError, match="mask holds no response token"):
        policy_mismatch(zeros, zeros, zeros)
    with pytest.raises(ValueError, match="mask holds no response token"):
        explained_variance(zeros, zeros, zeros)
