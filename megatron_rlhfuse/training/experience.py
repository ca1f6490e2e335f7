"""The rollout batch with its advantages worked out: one row per sample. PURE.

Every rank holds the whole batch and computes the same advantages from the same bytes, so nothing
about them needs to be communicated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.dispatch.packing import Field, Segments, move, starts_of
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rlhf.advantages import estimate_advantages
from megatron_rlhfuse.rlhf.rewards import token_rewards
from megatron_rlhfuse.training.batches import RaggedTokens


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
    """A whole rollout batch, ordered by sample id, in host memory.

    Tensors are [batch, response] float32 unless said, and 0 outside the responses.
    """

    sequences: RaggedTokens
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


def build_experience(
    scored: Sequence[ScoredSample], options: AdvantageOptions, kl_coefficient: float
) -> Experience:
    """Lays out a whole rollout batch, ordered by sample id, and estimates its advantages."""
    samples = [item.sample for item in scored]
    sequences = RaggedTokens.of([s.prompt for s in samples], [s.response for s in samples])
    mask, columns = _padded(
        sequences.response_lengths,
        {
            "rollout_log_probs": [torch.tensor(s.log_probs) for s in samples],
            "log_probs": [item.log_probs for item in scored],
            "reference_log_probs": [item.reference_log_probs for item in scored],
            "values": [item.values for item in scored],
        },
    )
    old_log_probs = columns["log_probs"]
    reference_log_probs, values = columns.get("reference_log_probs"), columns.get("values")
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
        sequences=sequences,
        mask=mask,
        rollout_log_probs=columns["rollout_log_probs"],
        old_log_probs=old_log_probs,
        reference_log_probs=reference_log_probs,
        old_values=values,
        advantages=estimated.advantages,
        returns=estimated.returns,
        scores=scores,
        rewards=rewards,
    )


def _padded(
    lengths: Tensor, columns: Mapping[str, Sequence[Tensor | None]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The mask of the responses, and every column padded to the longest, if there are values.

    columns: one [response] float32 tensor per sample each, or None for all of them
    """
    width = int(lengths.max())
    segments = Segments.to_rows(starts_of(lengths), lengths, width)
    shape = (len(lengths), width)
    mask = torch.empty(shape)
    fields = [Field(segments, mask, each=torch.ones(len(lengths)))]
    targets = {}
    for name, column in columns.items():
        rows = [row for row in column if row is not None]
        if not rows:
            continue
        for sample, (row, length) in enumerate(zip(column, lengths.tolist(), strict=True)):
            if row is None or len(row) != length:
                found = "none" if row is None else len(row)
                raise ValueError(f"samples[{sample}].{name}: want {length} values, got {found}")
        targets[name] = torch.empty(shape)
        fields.append(Field(segments, targets[name], torch.cat(rows)))
    move(fields)
    return mask, targets


def mini_batches(size: int, mini_batch: int, epochs: int, seed: int) -> list[list[Tensor]]:
    """Which samples make up each optimizer step.

    Returns one list per epoch of [mini_batch] int64 row numbers; every epoch is a permutation of
    all rows, drawn from `seed` alone, so every rank and every resumed run draws the same.
    """
    generator = torch.Generator().manual_seed(seed)
    return [
        list(torch.randperm(size, generator=generator).split(mini_batch)) for _ in range(epochs)
    ]
