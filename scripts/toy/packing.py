"""Token documents packed into rows, so that skewed lengths waste no computation on padding.

Invariants: a document lies in one row, starts at position 0 and attends to itself alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Document = tuple[list[int], int]
"""Tokens of prompt and response, and the number of them that are the prompt's."""

IGNORED = -100
"""Label of a token that is not trained on: the default of torch's cross_entropy."""


@dataclass(frozen=True)
class PackedRows:
    """`tokens`, `positions`, `labels`: [rows, row_length] int64.

    `labels` holds the next response token, IGNORED elsewhere; `attention`: [rows, 1, row_length,
    row_length] bool, True where a query may look; `ends`: [documents] int64, each document's last
    token in the flattened rows, in the order given.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    attention: Tensor
    ends: Tensor


def pack(documents: Sequence[Document], row_length: int, pad: int) -> PackedRows:
    """Packs documents, longest first, each into the first row with room.

    Raises ValueError for a document longer than a row.
    """
    rows: list[list[int]] = []  # document numbers of each row
    used: list[int] = []
    for number in sorted(range(len(documents)), key=lambda n: -len(documents[n][0])):
        length = len(documents[number][0])
        if length > row_length:
            raise ValueError(f"a document of {length} tokens does not fit a row of {row_length}")
        row = next((r for r, taken in enumerate(used) if taken + length <= row_length), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(number)
        used[row] += length

    tokens = torch.full((len(rows), row_length), pad)
    labels = torch.full_like(tokens, IGNORED)
    positions = torch.zeros_like(tokens)
    owners = torch.full_like(tokens, -1)
    ends = torch.zeros(len(documents), dtype=torch.int64)
    for row, numbers in enumerate(rows):
        start = 0
        for number in numbers:
            content, prompt_length = documents[number]
            stop = start + len(content)
            tokens[row, start:stop] = torch.tensor(content)
            labels[row, start + prompt_length - 1 : stop - 1] = tokens[
                row, start + prompt_length : stop
            ]
            positions[row, start:stop] = torch.arange(len(content))
            owners[row, start:stop] = number
            ends[number] = row * row_length + stop - 1
            start = stop
    same = owners[:, None, :, None] == owners[:, None, None, :]
    causal = torch.ones(row_length, row_length, dtype=torch.bool).tril()
    return PackedRows(tokens, positions, labels, same & causal, ends)
