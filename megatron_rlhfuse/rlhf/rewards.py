"""From one score per sample to one reward per response token.

Ziegler et al. 2019 (arXiv 1909.08593), section 2: R = score - beta * KL(pi || pi_ref), where
the score falls due at the end of the response and the KL penalty at every token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhfuse.rlhf.kl import kl_estimate
from megatron_rlhfuse.rlhf.masking import masked, per_sample


@torch.no_grad()
def token_rewards(
    scores: Tensor,
    log_probs: Tensor,
    reference_log_probs: Tensor | None,
    mask: Tensor,
    kl_coefficient: float,
    kl_estimator: str,
    *,
    clip: float | None = None,
    missing_eos_penalty: float = 0.0,
    stopped_by_length: Tensor | None = None,
) -> Tensor:
    """Returns the reward of every response token, [batch, response] float32, no gradient.

    scores: [batch]; the last response token of a sample receives it. log_probs (of the actor that
    is about to be trained), reference_log_probs, mask: [batch, response].
    kl_coefficient: beta; 0 leaves KL out (it is in the loss, or nowhere), and the reference may
    then be None. kl_estimator: one of kl.KL_ESTIMATORS.
    clip: scores are clamped to [-clip, clip] first. missing_eos_penalty: subtracted after the
    clamp, so that it counts however bad the score, from samples where stopped_by_length
    ([batch] bool) is true.
    Raises ValueError for a sample without response tokens: its score has nowhere to go.
    """
    empty = (mask.sum(dim=1) == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"mask: samples {empty} hold no response token to carry their score")
    scores = per_sample(scores, mask, "scores")
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip is {clip}: it must be above 0, or None for no clipping")
        scores = scores.clamp(-clip, clip)
    if missing_eos_penalty != 0.0:
        if stopped_by_length is None:
            raise ValueError("missing_eos_penalty needs stopped_by_length, [batch] bool")
        stopped = per_sample(stopped_by_length, mask, "stopped_by_length").bool()
        scores = scores - missing_eos_penalty * stopped.to(scores.dtype)

    rewards = torch.zeros_like(masked(log_probs, mask, "log_probs"))
    if kl_coefficient != 0.0:
        if reference_log_probs is None:
            raise ValueError(
                f"kl_coefficient is {kl_coefficient} but reference_log_probs is None: "
                "pass them, or set the coefficient to 0"
            )
        rewards -= kl_coefficient * kl_estimate(kl_estimator, log_probs, reference_log_probs, mask)
    rewards[torch.arange(len(scores), device=mask.device), _last_token(mask)] += scores
    return rewards


def _last_token(mask: Tensor) -> Tensor:
    """Returns the position of the last response token of every sample, [batch] int64."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return positions.masked_fill(mask == 0, -1).amax(dim=1)
