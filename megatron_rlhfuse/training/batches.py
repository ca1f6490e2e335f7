"""From samples of unequal length to padded tensors, and from positions to responses. PURE.

Sequences are padded on the right: attention is causal, so what stands behind a sequence cannot
reach it, and no mask is needed. Position t of a model's output speaks of token t + 1, so the
response of a sample is read off the positions `prompt_length - 1 ... prompt_length - 2 + length`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenBatch:
    """Padded sequences.

    tokens: [batch, sequence] int64; prompt_lengths, response_lengths: [batch] int64.
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @classmethod
    def pad(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_token: int
    ) -> TokenBatch:
        """Lays prompt and response of each sample side by side."""
        rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
        longest = max(len(row) for row in rows)
        return cls(
            tokens=torch.tensor([row + [pad_token] * (longest - len(row)) for row in rows]),
            prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
            response_lengths=torch.tensor([len(response) for response in responses]),
        )

    @property
    def size(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def longest_response(self) -> int:
        """Width of response-shaped tensors of this batch."""
        return int(self.response_lengths.max())

    def select(self, rows: Tensor) -> TokenBatch:
        """The given rows, [n] int64, cut to their longest sequence."""
        prompt_lengths, response_lengths = self.prompt_lengths[rows], self.response_lengths[rows]
        longest = int((prompt_lengths + response_lengths).max())
        return TokenBatch(self.tokens[rows, :longest], prompt_lengths, response_lengths)

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(
            self.tokens.to(device, non_blocking=True),
            self.prompt_lengths.to(device, non_blocking=True),
            self.response_lengths.to(device, non_blocking=True),
        )

    def position_ids(self) -> Tensor:
        """[batch, sequence] int64: 0, 1, 2, ... in every row."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device).expand_as(self.tokens)

    def next_tokens(self) -> Tensor:
        """[batch, sequence] int64: the token that position t predicts; the last one wraps."""
        return self.tokens.roll(-1, dims=1)

    def response_mask(self) -> Tensor:
        """[batch, response] float32: 1 on response tokens."""
        columns = torch.arange(self.longest_response, device=self.tokens.device)
        return (columns < self.response_lengths.unsqueeze(1)).float()

    def gather_response(self, per_position: Tensor) -> Tensor:
        """Reads [batch, sequence] outputs at the positions that predict the response.

        Returns [batch, response]; garbage outside the response, as `response_mask` tells.
        """
        columns = torch.arange(self.longest_response, device=per_position.device)
        index = self.prompt_lengths.unsqueeze(1) - 1 + columns
        return per_position.gather(1, index.clamp(max=per_position.shape[1] - 1))

    def last_positions(self) -> Tensor:
        """[batch] int64: the position of each sequence's last token."""
        return self.prompt_lengths + self.response_lengths - 1


def pad_rows(rows: Sequence[Tensor], width: int) -> Tensor:
    """[response] tensors of unequal length as one [batch, width] tensor, zeros on the right."""
    padded = rows[0].new_zeros(len(rows), width)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
