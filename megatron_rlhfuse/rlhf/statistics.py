"""What a run logs about its critic and about the two engines that compute the same policy.

Called once per iteration on the whole rollout batch; results are Python floats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.rlhf.kl import kl_estimate
from megatron_rlhfuse.rlhf.masking import masked, token_count


@dataclass(frozen=True)
class PolicyMismatch:
    """How far the generation engine's log-probabilities are from the training engine's."""

    mean_abs: float
    """Mean of |log pi_old - log pi_rollout| over response tokens, in nats."""
    max_abs: float
    """The largest such difference, in nats."""
    kl: float
    """k3 estimate of KL(pi_rollout || pi_old) per token, in nats: the tokens are pi_rollout's."""


@torch.no_grad()
def policy_mismatch(
    old_log_probs: Tensor, rollout_log_probs: Tensor, mask: Tensor
) -> PolicyMismatch:
    """Compares two engines on the same weights and tokens.

    old_log_probs (training engine), rollout_log_probs (generation engine), mask:
    [batch, response]. Raises ValueError for a batch without response tokens.
    """
    count = token_count(mask)
    difference = (
        masked(old_log_probs, mask, "old_log_probs")
        - masked(rollout_log_probs, mask, "rollout_log_probs")
    ).abs()
    kl = kl_estimate("k3", rollout_log_probs, old_log_probs, mask)
    return PolicyMismatch(
        mean_abs=(difference.sum() / count).item(),
        max_abs=difference.max().item(),
        kl=(kl.sum() / count).item(),
    )


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over response tokens.

    1 is a perfect critic, 0 one no better than a constant. values, returns, mask:
    [batch, response]. nan when the returns do not vary, since there is nothing to explain.
    """
    returns = masked(returns, mask, "returns")
    residual = returns - masked(values, mask, "values")
    variance = _variance(returns, mask)
    if variance == 0:
        return float("nan")
    return (1 - _variance(residual, mask) / variance).item()


def _variance(x: Tensor, mask: Tensor) -> Tensor:
    x = x.double()  # so that values all equal have a variance of exactly zero
    count = token_count(mask)
    return masked(x - x.sum() / count, mask, "x").square().sum() / count
