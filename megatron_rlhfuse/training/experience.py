"""The rollout batch as training sees it: one row per sample, advantages worked out. PURE.

Every rank holds the whole batch and computes the same advantages from the same bytes, so nothing
about them needs to be communicated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rlhf.advantages import estimate_advantages
from megatron_rlhfuse.rlhf.rewards import token_rewards
from megatron_rlhfuse.training.batches import TokenBatch, pad_rows


@dataclass(frozen=True)
class AdvantageOptions:
    """How rewards become advantages; one object per run. Field names are the flags'."""

    estimator: str
    gamma: float
    lam: float
    whiten: bool
    normalize_std: bool
    kl_estimator: str
    kl_in_reward: bool
    reward_clip: float | None
    missing_eos_penalty: float
    samples_per_prompt: int


@dataclass(frozen=True)
class Experience:
    """A rollout batch, or some rows of it. Tensors are [batch, response] float32 unless said."""

    batch: TokenBatch
    mask: Tensor
    rollout_log_probs: Tensor
    old_log_probs: Tensor
    reference_log_probs: Tensor | None
    old_values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    scores: Tensor
    """[batch] float32: reward model plus reward function."""
    rewards: Tensor
    """What the advantages were computed from: score and KL penalty, per token."""
    weights: Tensor | None = None
    """Share of each token in its mini-batch; set once the mini-batch is known."""

    def select(self, rows: Tensor) -> Experience:
        """The given rows, [n] int64, cut to their longest sequence and response."""
        batch = self.batch.select(rows)
        width = batch.longest_response
        changed: dict[str, object] = {"batch": batch, "scores": self.scores[rows]}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in changed and value is not None:
                changed[field.name] = value[rows, :width]
        return replace(self, **changed)  # type: ignore[arg-type]

    def to(self, device: torch.device) -> Experience:
        """The same rows on another device."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None
        }
        return replace(self, **moved)


def build_experience(
    scored: Sequence[ScoredSample], options: AdvantageOptions, kl_coefficient: float, pad_token: int
) -> Experience:
    """Lays out a whole rollout batch, ordered by sample id, and estimates its advantages."""
    samples = [item.sample for item in scored]
    batch = TokenBatch.pad([s.prompt for s in samples], [s.response for s in samples], pad_token)
    mask = batch.response_mask()
    width = mask.shape[1]

    def padded(name: str) -> Tensor | None:
        rows = [getattr(item, name) for item in scored]
        return None if rows[0] is None else pad_rows(rows, width)

    old_log_probs = pad_rows([item.log_probs for item in scored], width)
    reference_log_probs, values = padded("reference_log_probs"), padded("values")
    scores = torch.tensor([item.score for item in scored], dtype=torch.float32)
    rewards = token_rewards(
        scores,
        old_log_probs,
        reference_log_probs,
        mask,
        kl_coefficient if options.kl_in_reward else 0.0,
        options.kl_estimator,
        clip=options.reward_clip,
        missing_eos_penalty=options.missing_eos_penalty,
        stopped_by_length=torch.tensor([s.stop_reason == "length" for s in samples]),
    )
    estimated = estimate_advantages(
        options.estimator,
        rewards,
        mask,
        whiten_advantages=options.whiten and options.estimator == "gae",
        values=values,
        group_ids=torch.tensor([s.sample_id // options.samples_per_prompt for s in samples]),
        gamma=options.gamma,
        lam=options.lam,
        normalize_std=options.normalize_std,
    )
    return Experience(
        batch=batch,
        mask=mask,
        rollout_log_probs=pad_rows([torch.tensor(s.log_probs) for s in samples], width),
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        old_values=values,
        advantages=estimated.advantages,
        returns=estimated.returns,
        scores=scores,
        rewards=rewards,
    )


def mini_batches(size: int, mini_batch: int, epochs: int, seed: int) -> list[list[Tensor]]:
    """Which samples make up each optimizer step.

    Returns one list per epoch of [mini_batch] int64 row numbers; every epoch is a permutation of
    all rows, drawn from `seed` alone, so every rank and every resumed run draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        list(torch.randperm(size, generator=generator).split(mini_batch)) for _ in range(epochs)
    ]
