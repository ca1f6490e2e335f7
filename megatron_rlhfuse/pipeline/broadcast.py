"""Bytes from one rank to the others of a group, without pickle.

Sizes come from another rank and are looked at before memory is taken for them. There is nothing to
be dropped here: a rank that does not take part in a collective holds all others up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform


def broadcast_messages(
    messages: Sequence[bytes] | None, source: int, group: dist.ProcessGroup | None = None
) -> list[bytes]:
    """COLLECTIVE over `group`: every rank gets the messages of global rank `source`.

    Raises ValueError where their number or sizes cannot be right.
    """
    device = platform.device()
    mine = messages if messages is not None else []
    count = torch.tensor([len(mine)], device=device)
    dist.broadcast(count, source, group=group)
    sizes = torch.tensor([len(m) for m in mine], dtype=torch.int64, device=device)
    require_sizes([8 * int(count)], f"sizes of messages from rank {source}")
    if dist.get_rank() != source:
        sizes = torch.empty(int(count), dtype=torch.int64, device=device)
    if not len(sizes):
        return []
    dist.broadcast(sizes, source, group=group)
    require_sizes(sizes.tolist(), f"messages from rank {source}")
    payload = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    if dist.get_rank() == source:
        payload.copy_(torch.frombuffer(bytearray(b"".join(mine)), dtype=torch.uint8))
    dist.broadcast(payload, source, group=group)
    data = payload.cpu().numpy().tobytes()
    ends = sizes.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]


def require_sizes(sizes: Sequence[int], what: str) -> None:
    """Raises ValueError where sizes in bytes that another rank has told cannot be right."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if any(size < 0 for size in sizes) or sum(sizes) > memory:
        raise ValueError(
            f"{what}: {min(sizes)} to {max(sizes)} bytes each, {sum(sizes)} in all, do not fit the "
            f"{memory} bytes of this machine: do all ranks run the same version?"
        )
