"""KL estimators against exact expectations over a categorical; controllers by their formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.kl import (
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    AdaptiveKLController,
    FixedKLController,
    kl_estimate,
    make_kl_controller,
)

VOCABULARY = 5
logit_lists = st.lists(
    st.floats(-3, 3, allow_subnormal=False), min_size=VOCABULARY, max_size=VOCABULARY
)


def estimate_every_token(kind: str, policy: Tensor, reference: Tensor) -> Tensor:
    """The estimate at each token of the vocabulary, as one sample of VOCABULARY tokens."""
    mask = torch.ones(1, VOCABULARY, dtype=policy.dtype)
    return kl_estimate(kind, policy.unsqueeze(0), reference.unsqueeze(0), mask).squeeze(0)


def log_softmax(logits: list[float]) -> Tensor:
    return torch.tensor(logits, dtype=torch.float64).log_softmax(0)


def exact_kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


@settings(deadline=None)
@given(logit_lists, logit_lists)
def test_k1_and_k3_are_unbiased(policy_logits: list[float], reference_logits: list[float]) -> None:
    policy, reference = log_softmax(policy_logits), log_softmax(reference_logits)
    for kind in ("k1", "k3"):
        expectation = (policy.exp() * estimate_every_token(kind, policy, reference)).sum()
        torch.testing.assert_close(expectation, exact_kl(policy, reference), rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(logit_lists, logit_lists)
def test_k2_and_k3_are_never_negative(
    policy_logits: list[float], reference_logits: list[float]
) -> None:
    policy, reference = log_softmax(policy_logits), log_softmax(reference_logits)
    for kind in ("k2", "k3"):
        assert (estimate_every_token(kind, policy, reference) >= 0).all()


@settings(deadline=None)
@given(logit_lists, logit_lists)
def test_expected_gradient_on_policy(
    policy_logits: list[float], reference_logits: list[float]
) -> None:
    """k1 has no gradient, k2 that of KL(pi || ref), k3 that of KL(ref || pi)."""
    logits = torch.tensor(policy_logits, dtype=torch.float64, requires_grad=True)
    reference = log_softmax(reference_logits)

    def gradient(scalar: Tensor) -> Tensor:
        return torch.autograd.grad(scalar, logits)[0]

    expected = {
        "k1": torch.zeros_like(reference),
        "k2": gradient(exact_kl(logits.log_softmax(0), reference)),
        "k3": gradient(exact_kl(reference, logits.log_softmax(0))),
    }
    for kind in KL_ESTIMATORS:
        policy = logits.log_softmax(0)
        drawn_with = policy.detach().exp()
        got = gradient((drawn_with * estimate_every_token(kind, policy, reference)).sum())
        torch.testing.assert_close(got, expected[kind], rtol=1e-9, atol=1e-12)


def test_k2_is_half_the_squared_log_ratio() -> None:
    policy, reference = log_softmax([0, 1, 2, 3, 4]), log_softmax([1, 1, 0, 2, -1])
    got = estimate_every_token("k2", policy, reference)
    expected = torch.tensor(
        [0.5 * (p - q) ** 2 for p, q in zip(policy.tolist(), reference.tolist(), strict=True)],
        dtype=torch.float64,
    )
    torch.testing.assert_close(got, expected)


def test_k3_keeps_precision_for_tiny_differences() -> None:
    mask = torch.ones(1, 1)
    difference = 3e-4  # where float32's exp(x) - 1 - x has lost every digit
    got = kl_estimate("k3", torch.zeros(1, 1), torch.full((1, 1), difference), mask).item()
    assert got == pytest.approx(difference**2 / 2, rel=1e-2)


def test_k3_stays_finite_for_any_finite_log_probs() -> None:
    policy = torch.full((1, 1), -1e4, requires_grad=True)
    kl = kl_estimate("k3", policy, torch.zeros(1, 1), torch.ones(1, 1))
    kl.sum().backward()
    assert kl.item() == pytest.approx(math.expm1(MAX_LOG_RATIO) - MAX_LOG_RATIO, rel=1e-6)
    assert policy.grad is not None and policy.grad.item() == 0.0


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="'k4' is unknown: choose one of k1, k2, k3"):
        kl_estimate("k4", torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1))


@given(
    st.floats(1e-4, 10),
    st.floats(0.1, 20),
    st.lists(st.tuples(st.floats(-5, 100), st.integers(1, 512)), max_size=8),
)
def test_adaptive_controller_follows_the_formula(
    coefficient: float, target: float, observations: list[tuple[float, int]]
) -> None:
    horizon = 10_000
    controller = AdaptiveKLController(coefficient, target, horizon)
    beta = coefficient
    for kl, n_samples in observations:
        controller.update(kl, n_samples)
        error = (kl - target) / target
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        beta = beta * (1 + (n_samples / horizon) * error)
        assert controller.value == pytest.approx(beta, rel=1e-9)
        assert controller.value > 0


def test_adaptive_controller_moves_towards_its_target() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=1000)
    controller.update(6.0, 100)
    assert controller.value == pytest.approx(0.1, rel=1e-12)
    controller.update(60.0, 100)
    assert controller.value == pytest.approx(0.1 * 1.02)
    controller.update(0.0, 100)
    assert controller.value == pytest.approx(0.1 * 1.02 * 0.98)


def test_adaptive_controller_resumes_exactly_and_keeps_its_flags() -> None:
    first = AdaptiveKLController(0.05, target=6.0, horizon=10_000)
    first.update(9.0, 512)
    resumed = AdaptiveKLController(0.2, target=6.0, horizon=10_000)
    resumed.load_state_dict(first.state_dict())
    assert resumed.value == first.value
    first.update(3.0, 512)
    resumed.update(3.0, 512)
    assert resumed.value == first.value


def test_fixed_controller_never_moves_and_its_flag_wins_on_resume() -> None:
    controller = FixedKLController(0.05)
    controller.update(100.0, 512)
    assert controller.value == 0.05
    resumed = FixedKLController(0.01)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.value == 0.01


def test_a_checkpoint_of_the_other_kind_is_refused() -> None:
    fixed = make_kl_controller("fixed", 0.1)
    adaptive = make_kl_controller("adaptive", 0.1, target=6.0, horizon=1000)
    with pytest.raises(ValueError, match="checkpoint's KL controller is 'fixed'"):
        adaptive.load_state_dict(fixed.state_dict())
    with pytest.raises(ValueError, match="this run's is 'fixed'"):
        fixed.load_state_dict(adaptive.state_dict())


@pytest.mark.parametrize(
    ("kind", "settings_", "message"),
    [
        ("fixed", {"coefficient": -0.1}, "KL coefficient is -0.1"),
        ("fixed", {"coefficient": math.nan}, "KL coefficient is nan"),
        ("adaptive", {"coefficient": 0.0, "target": 6.0, "horizon": 10}, "must start above 0"),
        ("adaptive", {"coefficient": 0.1, "target": 0.0, "horizon": 10}, "KL target is 0"),
        ("adaptive", {"coefficient": 0.1, "target": 6.0, "horizon": 0}, "KL horizon is 0"),
        ("adaptive", {"coefficient": 0.1, "target": 6.0}, "needs both"),
        ("adaptive", {"coefficient": 0.1, "horizon": 10}, "needs both"),
        ("linear", {"coefficient": 0.1}, "choose one of fixed, adaptive"),
    ],
)
def test_bad_controller_settings_are_refused(
    kind: str, settings_: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_kl_controller(kind, **settings_)  # type: ignore[arg-type]


def test_updates_that_could_turn_the_coefficient_negative_are_refused() -> None:
    controller = AdaptiveKLController(0.1, target=6.0, horizon=100)
    with pytest.raises(ValueError, match="horizon 100 is too short for 512 samples"):
        controller.update(0.0, 512)
    with pytest.raises(ValueError, match="observed KL is nan"):
        controller.update(math.nan, 10)
    assert controller.value == 0.1
