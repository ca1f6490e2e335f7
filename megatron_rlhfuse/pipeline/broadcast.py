"""Bytes from one rank to the others of a group, without pickle."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform


def broadcast_messages(
    messages: Sequence[bytes] | None, source: int, group: dist.ProcessGroup | None = None
) -> list[bytes]:
    """COLLECTIVE over `group`: every rank gets the messages of global rank `source`."""
    device = platform.device()
    mine = messages if messages is not None else []
    count = torch.tensor([len(mine)], device=device)
    dist.broadcast(count, source, group=group)
    sizes = torch.tensor([len(m) for m in mine], dtype=torch.int64, device=device)
    if dist.get_rank() != source:
        sizes = torch.empty(int(count), dtype=torch.int64, device=device)
    if not len(sizes):
        return []
    dist.broadcast(sizes, source, group=group)
    payload = torch.empty(int(sizes.sum()), dtype=torch.uint8, device=device)
    if dist.get_rank() == source:
        payload.copy_(torch.frombuffer(bytearray(b"".join(mine)), dtype=torch.uint8))
    dist.broadcast(payload, source, group=group)
    data = payload.cpu().numpy().tobytes()
    ends = sizes.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    return [data[start:end] for start, end in zip(starts, ends, strict=True)]
