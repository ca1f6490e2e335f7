"""Distance from the reference policy: per-token estimators and the coefficient that weighs them.

Estimators: J. Schulman, "Approximating KL Divergence" (2020). With tokens drawn from pi and
r = pi_ref / pi, each estimates KL(pi || pi_ref) in nats:
  k1 = -log r            unbiased, high variance, may be negative
  k2 = (log r)^2 / 2     biased, low variance
  k3 = (r - 1) - log r   unbiased, low variance, never negative
As a *loss*, what counts is the expected gradient, and on policy that is another matter: k1 has
none (E[grad log pi] = 0), k2 has that of KL(pi || pi_ref), k3 that of KL(pi_ref || pi).

Controllers keep the coefficient of the penalty ("beta"). Settings come from flags at every start;
only what a run has learned (the adaptive beta) is state, and travels through checkpoints.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_rlhfuse.rlhf.masking import masked

KL_ESTIMATORS = ("k1", "k2", "k3")
KL_CONTROLLERS = ("fixed", "adaptive")

# Log-ratios enter exp() no larger than this. exp(20) = 5e8 is far beyond any clip range, while
# exp(89) is infinite in float32 and turns gradients that a clip sets to zero into 0 * inf = nan.
MAX_LOG_RATIO = 20.0

# Ziegler et al. 2019: one update follows at most this relative error.
_MAX_RELATIVE_ERROR = 0.2


def kl_estimate(kind: str, log_probs: Tensor, reference_log_probs: Tensor, mask: Tensor) -> Tensor:
    """Estimates KL(pi || pi_ref) at every response token from the tokens drawn from pi.

    kind: one of KL_ESTIMATORS. log_probs (of pi, the policy that drew the tokens),
    reference_log_probs, mask: [batch, response] float32.
    Returns [batch, response] float32 in nats, zero where mask is 0; differentiable in both
    log-probabilities. k3 takes log r no larger than MAX_LOG_RATIO, with zero gradient beyond.
    """
    log_r = masked(reference_log_probs, mask, "reference_log_probs") - masked(
        log_probs, mask, "log_probs"
    )
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r.square() / 2
    if kind == "k3":
        log_r = log_r.clamp(max=MAX_LOG_RATIO)
        return torch.expm1(log_r) - log_r
    raise ValueError(f"KL estimator {kind!r} is unknown: choose one of {', '.join(KL_ESTIMATORS)}")


class KLController(Protocol):
    """What a trainer needs of the KL coefficient, fixed or adaptive."""

    @property
    def value(self) -> float:
        """The coefficient to use now."""

    def update(self, observed_kl: float, n_samples: int) -> None:
        """Learns from an iteration: its mean KL (nats, in the target's unit) and its samples."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the state of a checkpoint of the same kind of controller."""


class FixedKLController:
    """A coefficient that never changes. It has no state: on resume the flag decides."""

    def __init__(self, coefficient: float) -> None:
        if not coefficient >= 0:
            raise ValueError(f"KL coefficient is {coefficient}: it must be 0 or more")
        self._value = float(coefficient)

    @property
    def value(self) -> float:
        """The coefficient."""
        return self._value

    def update(self, observed_kl: float, n_samples: int) -> None:
        """Does nothing: fixed is fixed."""

    def state_dict(self) -> dict[str, Any]:
        """Returns the kind only."""
        return {"kind": "fixed"}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError unless the checkpoint is of a fixed controller too."""
        _check_kind(state, "fixed")


class AdaptiveKLController:
    """A coefficient steered so that the observed KL meets a target.

    Ziegler et al. 2019 (arXiv 1909.08593), section 2.2:
      e = clip((KL - target) / target, -0.2, 0.2);  beta <- beta * (1 + K * e),
    with K = n_samples / horizon, so that the speed per sample does not depend on the batch size.
    target: in nats, in the unit of the KL passed to `update` (per sample or per token).
    horizon: in samples; a sustained error of 0.2 changes beta by a factor e^0.2 in that many.
    """

    def __init__(self, coefficient: float, target: float, horizon: int) -> None:
        if not coefficient > 0:
            raise ValueError(
                f"KL coefficient is {coefficient}: an adaptive one is scaled by factors, "
                "so it must start above 0"
            )
        if not target > 0:
            raise ValueError(f"KL target is {target}: it must be above 0")
        if not horizon > 0:
            raise ValueError(f"KL horizon is {horizon}: it must be above 0")
        self._value = float(coefficient)
        self._target = float(target)
        self._horizon = int(horizon)

    @property
    def value(self) -> float:
        """The coefficient to use now."""
        return self._value

    def update(self, observed_kl: float, n_samples: int) -> None:
        """Applies the formula above once.

        Raises ValueError if n_samples is so large against the horizon that beta could become
        zero or negative, or if observed_kl is not a number.
        """
        if observed_kl != observed_kl:
            raise ValueError("observed KL is nan: the coefficient cannot follow it")
        if n_samples * _MAX_RELATIVE_ERROR >= self._horizon:
            raise ValueError(
                f"KL horizon {self._horizon} is too short for {n_samples} samples per update: "
                f"it must be above {n_samples * _MAX_RELATIVE_ERROR:g}"
            )
        error = observed_kl / self._target - 1.0
        error = min(max(error, -_MAX_RELATIVE_ERROR), _MAX_RELATIVE_ERROR)
        self._value *= 1.0 + error * n_samples / self._horizon

    def state_dict(self) -> dict[str, Any]:
        """Returns the kind and the coefficient reached."""
        return {"kind": "adaptive", "value": self._value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the coefficient; target and horizon stay those of this run's flags."""
        _check_kind(state, "adaptive")
        self._value = float(state["value"])


def make_kl_controller(
    kind: str, coefficient: float, *, target: float | None = None, horizon: int | None = None
) -> KLController:
    """Returns the controller of a kind in KL_CONTROLLERS; only the adaptive one reads the rest."""
    if kind == "fixed":
        return FixedKLController(coefficient)
    if kind == "adaptive":
        if target is None or horizon is None:
            raise ValueError("an adaptive KL controller needs both a KL target and a KL horizon")
        return AdaptiveKLController(coefficient, target, horizon)
    raise ValueError(
        f"KL controller {kind!r} is unknown: choose one of {', '.join(KL_CONTROLLERS)}"
    )


def _check_kind(state: dict[str, Any], kind: str) -> None:
    if state.get("kind") != kind:
        raise ValueError(
            f"the checkpoint's KL controller is {state.get('kind')!r} and this run's is {kind!r}: "
            "resume with the kind that the checkpoint was written with"
        )
