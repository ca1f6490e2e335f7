"""What training needs of a rollout batch: nothing padded, until a micro-batch is laid out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse.dispatch.packing import Field, Segments, move, starts_of
from megatron_rlhfuse.training.batches import RaggedTokens, TokenBatch
from megatron_rlhfuse.training.experience import Experience

_PER_TOKEN = (
    "rollout_log_probs",
    "old_log_probs",
    "advantages",
    "reference_log_probs",
    "old_values",
    "returns",
)
"""The fields of an Experience that losses read; an experience may lack the last three."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward pass. Tensors are [batch, response] float32, 0 outside responses.

    weights: share of each token in the mini-batch
    """

    batch: TokenBatch
    mask: Tensor
    weights: Tensor
    rollout_log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    reference_log_probs: Tensor | None = None
    old_values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True)
class TrainingData:
    """A rollout batch on the device that trains, its samples one behind the other.

    per_token: by field of MicroBatch, [response tokens] float32
    """

    sequences: RaggedTokens
    per_token: dict[str, Tensor]

    @classmethod
    def of(cls, experience: Experience, device: torch.device) -> TrainingData:
        """Drops the padding, then moves what is left."""
        lengths = experience.sequences.response_lengths
        segments = Segments.from_rows(lengths, experience.mask.shape[1])
        padded = {name: getattr(experience, name) for name in _PER_TOKEN}
        flat = {
            name: torch.empty(int(lengths.sum()))
            for name, values in padded.items()
            if values is not None
        }
        move([Field(segments, flat[name], padded[name]) for name in flat])
        return cls(
            experience.sequences.to(device),
            {name: values.to(device) for name, values in flat.items()},
        )

    def micro_batch(self, rows: Tensor, weights: Tensor, packed: bool) -> MicroBatch:
        """Lays samples out for a forward pass, all fields in one pass.

        Args:
            rows: [n] int64, the samples, in host memory
            weights: [n] float32, of each of their tokens in the mini-batch, in host memory
            packed: without padding in the model's forward pass
        """
        batch, parts = self.sequences.lay_out(rows, packed)
        lengths = self.sequences.response_lengths
        segments = Segments.to_rows(starts_of(lengths)[rows], lengths[rows], batch.longest_response)
        device = self.sequences.tokens.device

        def made() -> Tensor:
            return torch.empty(len(rows), batch.longest_response, device=device)

        laid_out = {name: made() for name in self.per_token}
        mask, of_tokens = made(), made()
        move(
            [
                *parts,
                Field(segments, mask, each=torch.ones(len(rows), device=device)),
                Field(segments, of_tokens, each=weights.to(device, non_blocking=True)),
                *(Field(segments, laid_out[name], self.per_token[name]) for name in laid_out),
            ]
        )
        return MicroBatch(batch=batch, mask=mask, weights=of_tokens, **laid_out)


@dataclass(frozen=True)
class MiniBatch:
    """The samples of one optimizer step.

    rows: [mini-batch] int64, their numbers; weights: [mini-batch] float32, of each of their tokens
    """

    data: TrainingData
    rows: Tensor
    weights: Tensor

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, prompt and response."""
        return self.data.sequences.lengths[self.rows].tolist()

    def micro_batch(self, samples: Sequence[int], packed: bool) -> MicroBatch:
        """The given ones of its samples, by position in `rows`, laid out."""
        chosen = torch.tensor(samples)
        return self.data.micro_batch(self.rows[chosen], self.weights[chosen], packed)
