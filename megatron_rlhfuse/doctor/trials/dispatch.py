"""Compiled dispatch and packing on small data, against plain Python."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

COSTS = (11, 3, 8, 5, 2, 9, 6, 4, 7)
GROUPS = 3
LENGTHS = (5, 0, 9, 1, 16, 7)
WIDTH = 16
FILL = -1


def run(folder: Path) -> str:
    """Balances costs as well as can be, and packs samples as lists in Python do."""
    from megatron_rlhfuse import platform

    _balance()
    devices = ["cpu", "cuda"] if platform.has_cuda() else ["cpu"]
    for device in devices:
        _pack(device)
    return f"equal to plain Python on {' and '.join(devices)}"


def _balance() -> None:
    from megatron_rlhfuse.dispatch.balance import balance

    groups = balance(COSTS, GROUPS)
    if sorted(itertools.chain(*groups)) != list(range(len(COSTS))):
        raise RuntimeError(f"dispatch: {groups} does not hold each of {len(COSTS)} items once")
    found = max(sum(COSTS[item] for item in group) for group in groups)
    least = min(
        max(
            sum(c for c, g in zip(COSTS, choice, strict=True) if g == each)
            for each in range(GROUPS)
        )
        for choice in itertools.product(range(GROUPS), repeat=len(COSTS))
    )
    if found != least:
        raise RuntimeError(f"dispatch: the largest of {GROUPS} groups costs {found}, not {least}")


def _pack(device: str) -> None:
    import torch

    from megatron_rlhfuse.dispatch.packing import Field, Segments, move

    samples = [list(range(100 * n, 100 * n + length)) for n, length in enumerate(LENGTHS)]
    flat = torch.tensor(list(itertools.chain(*samples)), device=device)
    starts = [sum(LENGTHS[:n]) for n in range(len(LENGTHS))]
    rows: Any = torch.empty(len(LENGTHS), WIDTH, dtype=torch.int64, device=device)
    back = torch.empty_like(flat)
    there = Segments.to_rows(starts, LENGTHS, WIDTH)
    move([Field(there, rows, source=flat, fill=FILL)])
    move([Field(Segments.from_rows(LENGTHS, WIDTH), back, source=rows)])
    expected = [sample + [FILL] * (WIDTH - len(sample)) for sample in samples]
    if rows.tolist() != expected:
        raise RuntimeError(f"packing on {device}: rows are not those of plain Python")
    if back.tolist() != flat.tolist():
        raise RuntimeError(f"packing on {device}: samples do not come back out of rows")
