"""Samples of unequal length: stored one behind the other, laid out for a forward pass.

Laid out padded, every sequence is a row, with zeros behind it (a token that
every model has): attention is causal, so what stands behind a sequence cannot reach it, and no mask
is needed. Laid out packed, all sequences share one row, and attention is told where each ends.

Position t of a model's output speaks of token t + 1, so the response of a sample is read off the
positions `prompt_length - 1 ... prompt_length - 2 + response_length` of its sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_rlhfuse.dispatch.packing import Field, Segments, move, starts_of

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams


@dataclass(frozen=True)
class RaggedTokens:
    """Prompt and response of every sample, one sequence behind the other.

    tokens: [tokens] int64; prompt_lengths, response_lengths: [batch] int64, in host memory
    """

    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor

    @classmethod
    def of(
        cls, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]
    ) -> RaggedTokens:
        """Of token ids; prompts have at least one."""
        pairs = list(zip(prompts, responses, strict=True))
        return cls(
            tokens=torch.tensor(list(chain.from_iterable(chain.from_iterable(pairs)))),
            prompt_lengths=torch.tensor([len(prompt) for prompt, _ in pairs]),
            response_lengths=torch.tensor([len(response) for _, response in pairs]),
        )

    @property
    def lengths(self) -> Tensor:
        """[batch] int64: tokens of prompt and response."""
        return self.prompt_lengths + self.response_lengths

    def to(self, device: torch.device) -> RaggedTokens:
        """The same with the tokens on another device."""
        return RaggedTokens(self.tokens.to(device), self.prompt_lengths, self.response_lengths)

    def lay_out(
        self, rows: Tensor | None = None, packed: bool = False
    ) -> tuple[TokenBatch, list[Field]]:
        """A batch of the given samples (default: all) and what is still to be moved into it.

        rows: [n] int64 in host memory
        """
        lengths, starts = self.lengths, starts_of(self.lengths)
        prompts, responses = self.prompt_lengths, self.response_lengths
        if rows is not None:
            lengths, starts = lengths[rows], starts[rows]
            prompts, responses = prompts[rows], responses[rows]
        longest = int(lengths.max())
        if packed:
            segments = Segments.to_packed(starts, lengths)
            shape = (1, int(lengths.sum()))
        else:
            segments = Segments.to_rows(starts, lengths, longest)
            shape = (len(lengths), longest)
        device = self.tokens.device
        tokens, positions = (torch.empty(shape, dtype=torch.int64, device=device) for _ in range(2))
        ends = segments.target_starts + lengths
        batch = TokenBatch(
            tokens=tokens,
            positions=positions,
            first=_moved(segments.target_starts + prompts - 1, device),
            last=_moved(ends - 1, device),
            ends=_moved(ends.to(torch.int32), device) if packed else None,
            lengths=tuple(lengths.tolist()),
            longest_response=int(responses.max()),
        )
        return batch, [Field(segments, tokens, self.tokens), Field(segments, positions)]

    def batch(self, rows: Tensor | None = None, packed: bool = False) -> TokenBatch:
        """The given samples (default: all), [n] int64, laid out."""
        batch, fields = self.lay_out(rows, packed)
        move(fields)
        return batch


@dataclass(frozen=True)
class TokenBatch:
    """RaggedTokens laid out for a forward pass: padded [batch, longest], or packed [1, tokens].

    Attributes:
        tokens, positions: int64; a position counts from 0 in every sequence
        first, last: [batch] int64, positions in the flattened layout that predict the first token
            of the response, and that hold the last one
        ends: [batch] int32, where each sequence ends, if packed
        lengths: of each sequence
    """

    tokens: Tensor
    positions: Tensor
    first: Tensor
    last: Tensor
    ends: Tensor | None
    lengths: tuple[int, ...]
    longest_response: int

    @property
    def size(self) -> int:
        """Number of sequences."""
        return len(self.lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return TokenBatch(
            tokens=_moved(self.tokens, device),
            positions=_moved(self.positions, device),
            first=_moved(self.first, device),
            last=_moved(self.last, device),
            ends=None if self.ends is None else _moved(self.ends, device),
            lengths=self.lengths,
            longest_response=self.longest_response,
        )

    def next_tokens(self) -> Tensor:
        """The token that each position predicts; behind the last one of a sequence any token."""
        return self.tokens.flatten().roll(-1).view_as(self.tokens)

    def gather_response(self, per_position: Tensor) -> Tensor:
        """Reads outputs, of the layout's shape, at the positions that predict the response.

        Returns [batch, longest_response]; beyond a response its last position over again.
        """
        columns = torch.arange(self.longest_response, device=per_position.device)
        index = torch.minimum(self.first.unsqueeze(1) + columns, self.last.unsqueeze(1))
        return per_position.flatten().gather(0, index.flatten()).view_as(index)

    def gather_last(self, per_position: Tensor) -> Tensor:
        """[batch]: the output at the last token of each sequence."""
        return per_position.flatten().gather(0, self.last)

    def packed_seq_params(self) -> PackedSeqParams | None:
        """What attention has to know of a packed batch; None of a padded one."""
        if self.ends is None:
            return None
        from megatron_rlhfuse.models.packed_attention import PackedSequences

        starts_and_end = torch.nn.functional.pad(self.ends, (1, 0))
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=starts_and_end,
            cu_seqlens_kv=starts_and_end,
            max_seqlen_q=self.longest,
            max_seqlen_kv=self.longest,
            lengths=self.lengths,
        )


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, non_blocking=True)
