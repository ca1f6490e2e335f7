"""PPO's two losses, as sums that add up over micro-batches and data-parallel ranks.

Invariant: `weights` [batch, response] sum to 1 over the whole mini-batch (`aggregation_weights`),
so a loss is a plain weighted sum, and so is every metric: adding those of all micro-batches on
all ranks gives exactly the loss, the gradient and the metrics of the mini-batch in one piece.
Nothing may average them again.
Gradients flow into `log_probs`, `entropy` and `values` only; all else is data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.rlhf.kl import KL_ESTIMATORS, MAX_LOG_RATIO, kl_estimate
from megatron_rlhfuse.rlhf.masking import masked, token_count

AGGREGATIONS = ("token-mean", "sequence-mean")


@dataclass(frozen=True)
class LossOutput:
    """loss: scalar with gradient. metrics: name -> detached scalar, weighted as the loss is."""

    loss: Tensor
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class PolicyLossOptions:
    """The terms of the policy loss; one object per run."""

    clip_low: float = 0.2
    """The ratio is clipped from below at 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio is clipped from above at 1 + clip_high; above clip_low it is DAPO's clip-higher."""
    dual_clip: float | None = None
    """c > 1: bounds the loss of a token with negative advantage at c * |advantage|. None: off."""
    tis_cap: float | None = None
    """Cap of the truncated importance weight from rollout to training policy. None: off."""
    entropy_coefficient: float = 0.0
    """Weight of the entropy bonus."""
    kl_coefficient: float = 0.0
    """Weight of the KL to the reference in the loss."""
    kl_estimator: str = "k3"
    """One of kl.KL_ESTIMATORS; kl.py says what gradient each one has."""

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1:
            raise ValueError(f"clip_low is {self.clip_low}: it must be from 0 to 1")
        if not self.clip_high >= 0:
            raise ValueError(f"clip_high is {self.clip_high}: it must be 0 or more")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"dual_clip is {self.dual_clip}: it must be above 1, or None")
        if self.tis_cap is not None and not self.tis_cap > 0:
            raise ValueError(f"tis_cap is {self.tis_cap}: it must be above 0, or None")
        if not self.kl_coefficient >= 0:
            raise ValueError(f"kl_coefficient is {self.kl_coefficient}: it must be 0 or more")
        if not math.isfinite(self.entropy_coefficient):
            raise ValueError(
                f"entropy_coefficient is {self.entropy_coefficient}: it must be a finite number"
            )
        if self.kl_estimator not in KL_ESTIMATORS:
            raise ValueError(
                f"kl_estimator is {self.kl_estimator!r}: choose one of {', '.join(KL_ESTIMATORS)}"
            )


@dataclass(frozen=True)
class PolicyBatch:
    """A micro-batch of the actor. Every tensor is [batch, response] float32."""

    log_probs: Tensor
    """Of the response tokens under the actor in training; carries the gradient."""
    old_log_probs: Tensor
    """The same under the actor as it was when the iteration began, by the training engine."""
    advantages: Tensor
    mask: Tensor
    weights: Tensor
    """Share of each token in the mini-batch: see aggregation_weights."""
    rollout_log_probs: Tensor | None = None
    """Under the generation engine; needed by tis_cap."""
    reference_log_probs: Tensor | None = None
    """Under the reference model; needed by kl_coefficient."""
    entropy: Tensor | None = None
    """Of the actor's distribution at each token, in nats; needed by entropy_coefficient."""


@dataclass(frozen=True)
class ValueBatch:
    """A micro-batch of the critic. Every tensor is [batch, response] float32."""

    values: Tensor
    """Of the critic in training; carries the gradient."""
    old_values: Tensor
    """Of the critic as it was when the iteration began."""
    returns: Tensor
    mask: Tensor
    weights: Tensor
    """Share of each token in the mini-batch: see aggregation_weights."""


def aggregation_weights(mask: Tensor, kind: str) -> Tensor:
    """Returns each token's share in the loss, [batch, response] float32, summing to 1.

    mask: [batch, response] of the WHOLE mini-batch, all micro-batches and ranks; the caller then
    slices the rows it needs. kind "token-mean": all tokens alike; "sequence-mean": the mean over
    samples of the mean over each one's tokens. A sample without tokens does not count.
    """
    count = token_count(mask)
    if kind == "token-mean":
        return mask / count
    if kind == "sequence-mean":
        lengths = mask.sum(dim=1, keepdim=True)
        return mask / lengths.clamp(min=1) / (lengths > 0).sum()
    raise ValueError(f"loss aggregation {kind!r}: choose one of {', '.join(AGGREGATIONS)}")


def policy_loss(batch: PolicyBatch, options: PolicyLossOptions) -> LossOutput:
    """PPO's clipped surrogate, to be minimised, with its optional terms.

    With ratio r = pi / pi_old and advantage A, per token:
      max(-A * r, -A * clip(r, 1 - clip_low, 1 + clip_high))
        Schulman et al. 2017 (arXiv 1707.06347), equation 7; two bounds: Yu et al. 2025 (DAPO,
        arXiv 2503.14476), Clip-Higher;
      at most -A * c where A < 0: dual clip, Ye et al. 2020 (arXiv 1912.09729), equation 5;
      times min(pi_old / pi_rollout, cap): truncated importance sampling, Yao et al. 2025;
      minus entropy_coefficient * entropy, plus kl_coefficient * KL estimate.
    log r is taken no larger than kl.MAX_LOG_RATIO, with zero gradient beyond.

    Metrics: policy_loss (with TIS, without entropy and KL), ratio, clip_fraction (tokens whose
    gradient the clip cuts), approx_kl (k3 of KL(old || new)); and, where their input or option is
    given, dual_clip_fraction, tis_weight, tis_truncated_fraction, entropy, kl_loss.
    """
    mask = batch.mask
    weights = _data(batch.weights, mask, "weights")
    old_log_probs = _data(batch.old_log_probs, mask, "old_log_probs")
    advantages = _data(batch.advantages, mask, "advantages")
    log_ratio = masked(batch.log_probs, mask, "log_probs") - old_log_probs
    ratio = log_ratio.clamp(max=MAX_LOG_RATIO).exp()

    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    surrogate = torch.maximum(unclipped, clipped)
    per_token = {
        "ratio": ratio,
        "clip_fraction": clipped > unclipped,
        "approx_kl": kl_estimate("k3", old_log_probs, batch.log_probs.detach(), mask),
    }
    if options.dual_clip is not None:
        bound = -advantages * options.dual_clip
        cut = (advantages < 0) & (surrogate > bound)
        surrogate = torch.where(cut, bound, surrogate)
        per_token["dual_clip_fraction"] = cut
    if options.tis_cap is not None:
        weight, truncated = _truncated_importance(batch, options.tis_cap)
        surrogate = surrogate * weight
        per_token |= {"tis_weight": weight, "tis_truncated_fraction": truncated}
    per_token["policy_loss"] = surrogate

    loss = (weights * surrogate).sum()
    if batch.entropy is not None:
        per_token["entropy"] = masked(batch.entropy, mask, "entropy")
    if options.entropy_coefficient != 0.0:
        _needed(batch.entropy, "entropy", "entropy_coefficient")
        loss = loss - options.entropy_coefficient * (weights * per_token["entropy"]).sum()
    if options.kl_coefficient != 0.0:
        reference = _needed(batch.reference_log_probs, "reference_log_probs", "kl_coefficient")
        kl = kl_estimate(options.kl_estimator, batch.log_probs, reference.detach(), mask)
        per_token["kl_loss"] = kl
        loss = loss + options.kl_coefficient * (weights * kl).sum()
    return LossOutput(loss, _weighted_sums(per_token, weights))


def value_loss(batch: ValueBatch, clip: float | None) -> LossOutput:
    """The critic's regression onto returns, with the change of its values clipped.

    0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) per token: the clipping of
    OpenAI baselines' PPO, described by Engstrom et al. 2020 (arXiv 2005.12729).
    clip: None for 0.5 * (V - R)^2. Metrics: value_loss, value (the mean of V), and, with clip,
    value_clip_fraction (tokens whose gradient the clip cuts).
    """
    mask = batch.mask
    weights = _data(batch.weights, mask, "weights")
    returns = _data(batch.returns, mask, "returns")
    values = masked(batch.values, mask, "values")
    error = (values - returns).square()
    per_token = {"value": values}
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"value clip is {clip}: it must be above 0, or None for no clipping")
        old_values = _data(batch.old_values, mask, "old_values")
        change = values - old_values
        # Not old_values + clamp(change): inside the range that is off by a rounding error, which
        # would count as clipped.
        near = torch.where(change.abs() > clip, old_values + change.clamp(-clip, clip), values)
        clipped_error = (near - returns).square()
        per_token["value_clip_fraction"] = clipped_error > error
        error = torch.maximum(error, clipped_error)
    per_token["value_loss"] = 0.5 * error
    return LossOutput((weights * 0.5 * error).sum(), _weighted_sums(per_token, weights))


def _truncated_importance(batch: PolicyBatch, cap: float) -> tuple[Tensor, Tensor]:
    """Returns min(pi_old / pi_rollout, cap) and where the cap was met, [batch, response] each."""
    rollout = _needed(batch.rollout_log_probs, "rollout_log_probs", "tis_cap")
    log_weight = _data(batch.old_log_probs, batch.mask, "old_log_probs") - _data(
        rollout, batch.mask, "rollout_log_probs"
    )
    log_cap = math.log(cap)
    return log_weight.clamp(max=log_cap).exp(), log_weight > log_cap


def _data(x: Tensor, mask: Tensor, name: str) -> Tensor:
    """masked(), and no gradient flows back into x."""
    return masked(x.detach(), mask, name)


def _needed(x: Tensor | None, name: str, option: str) -> Tensor:
    if x is None:
        raise ValueError(f"{option} is set, so {name} is needed: pass it, or turn {option} off")
    return x


def _weighted_sums(per_token: dict[str, Tensor], weights: Tensor) -> dict[str, Tensor]:
    return {name: (weights * x.detach()).sum() for name, x in per_token.items()}
