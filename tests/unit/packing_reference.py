"""What packing is defined to do, element by element."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_rlhfuse.dispatch.packing import Field

POSITION_DTYPES = [torch.int64, torch.int32, torch.int16, torch.uint8]
DTYPES = [
    *POSITION_DTYPES,
    *(torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64),
]


def move_plainly(field: Field) -> None:
    """One field of a pass, on the host."""
    segments, target = field.segments, field.target.view(-1)
    tables = (segments.source_starts, segments.target_starts, segments.lengths, segments.rooms)
    for i, (source, start, length, room) in enumerate(
        zip(*(table.tolist() for table in tables), strict=True)
    ):
        target[start : start + room] = field.fill
        if field.source is not None:
            target[start : start + length] = field.source.view(-1)[source : source + length]
        elif field.each is not None:
            target[start : start + length] = field.each[i]
        else:
            target[start : start + length] = torch.arange(length)


def random_values(count: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Any bits, those of not-a-number included; booleans are 0 or 1."""
    generator = torch.Generator().manual_seed(seed)
    if dtype is torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool()
    size = (count * dtype.itemsize,)
    return torch.randint(0, 256, size, dtype=torch.uint8, generator=generator).view(dtype)


def bits(tensor: Tensor) -> Tensor:
    """The bytes [n], which compare equal where not-a-numbers do not."""
    return tensor.cpu().contiguous().view(-1).view(torch.uint8)
