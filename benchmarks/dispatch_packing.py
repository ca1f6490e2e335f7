"""How fast samples are packed and padded, against a plain copy of as many bytes.

    python benchmarks/dispatch_packing.py

Samples have log-normal lengths and are taken in random order, as micro-batches take them from a
batch. The last line of standard output is JSON; bandwidths are medians, of bytes read and written:
  pack_padded_gb_s    into rows, the rest of each filled
  pack_packed_gb_s    one behind the other
  unpack_gb_s         out of rows again
  copy_gb_s           torch's copy of one tensor to another
  pack_bandwidth_fraction
                      of the copy's: the worse of padded and packed, each against the copies beside
                      it, by turns
  pack_bandwidth_fraction_cuda, cuda_device
                      the same on a GPU, where there is one
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from megatron_rlhfuse.dispatch.packing import Field, Segments, move

HOST_TOKENS, GPU_TOKENS = 16 << 20, 64 << 20
"""128 MiB and 512 MiB: beyond what caches hold."""
WIDTH = 4096
MEDIAN_LENGTH, SPREAD = 665, 1.0
TURNS = 8
IN_A_ROW = 4
"""Of which the first does not count: torch's threads spin for a while after a copy of theirs, and
would keep a core from what comes next."""


def packing() -> dict[str, Any]:
    rates = measure(torch.device("cpu"), HOST_TOKENS)
    found = {f"{side}_gb_s": round(rate, 1) for side, rate in _medians(rates).items()}
    found["pack_bandwidth_fraction"] = fraction(rates)
    if torch.cuda.is_available():
        rates = measure(torch.device("cuda"), GPU_TOKENS)
        found |= {f"{side}_cuda_gb_s": round(rate, 1) for side, rate in _medians(rates).items()}
        found["pack_bandwidth_fraction_cuda"] = fraction(rates)
        found["cuda_device"] = torch.cuda.get_device_name()
    return found


def measure(device: torch.device, tokens: int) -> dict[str, list[float]]:
    """Bandwidths of each side, GB/s by turn."""
    generator = torch.Generator().manual_seed(0)
    mean = MEDIAN_LENGTH * 2.718281828 ** (SPREAD**2 / 2)
    normal = torch.randn(int(tokens / mean), generator=generator)
    lengths = (MEDIAN_LENGTH * (SPREAD * normal).exp()).long().clamp(1, WIDTH)
    starts = lengths.cumsum(0) - lengths
    order = torch.randperm(len(lengths), generator=generator)
    total, samples = int(lengths.sum()), len(lengths)

    def memory(*shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.long, device=device)

    source, packed, rows = memory(total), memory(total), memory(samples, WIDTH)
    copied = memory(total)
    to_rows = Segments.to_rows(starts[order], lengths[order], WIDTH)
    to_packed = Segments.to_packed(starts[order], lengths[order])
    from_rows = Segments.from_rows(lengths[order], WIDTH)
    sides: dict[str, tuple[int, Callable[[], Any]]] = {
        "pack_padded": (total + rows.numel(), lambda: move([Field(to_rows, rows, source)])),
        "pack_packed": (2 * total, lambda: move([Field(to_packed, packed, source)])),
        "unpack": (2 * total, lambda: move([Field(from_rows, packed, rows)])),
        "copy": (2 * total, lambda: copied.copy_(source)),
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(TURNS):
        for side, (elements, run) in sides.items():
            seconds = statistics.median([_seconds(run, device) for _ in range(IN_A_ROW)][1:])
            rates[side].append(elements * source.itemsize / seconds / 1e9)
    return rates


def fraction(rates: dict[str, list[float]]) -> float:
    """Turn by turn, so that what else the machine does hits both sides."""
    return round(
        min(
            statistics.median(
                packed / copy for packed, copy in zip(rates[side], rates["copy"], strict=True)
            )
            for side in ("pack_padded", "pack_packed")
        ),
        3,
    )


def _medians(rates: dict[str, list[float]]) -> dict[str, float]:
    return {side: statistics.median(values) for side, values in rates.items()}


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        began = time.perf_counter()
        run()
        return time.perf_counter() - began
    began_at, ended_at = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    began_at.record()
    run()
    ended_at.record()
    torch.cuda.synchronize()
    return began_at.elapsed_time(ended_at) / 1e3


if __name__ == "__main__":
    print(json.dumps(packing()))
    sys.exit(0)
