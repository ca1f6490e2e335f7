"""Memory and time of log-probabilities and entropy, forward and backward, on one process.

    python benchmarks/dispatch_logprob.py

Prints JSON; `before` is the straightforward way, with float32 copies of the logits:
  logprob_memory_ratio, logprob_memory_ratio_before
                    most bytes alive at once over those of the logits, themselves included
  logprob_s, logprob_speedup
                    median seconds, and those of before over them; by turns, float32 logits, and on
                    a CPU one thread
The loss has an entropy term.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.models.logits import token_statistics

ROWS = 2048
VOCABULARY = 32768
TEMPERATURE = 0.7
REPEATS = 5

Way = Callable[[Tensor, Tensor, dist.ProcessGroup], tuple[Tensor, Tensor]]


def logprob() -> dict[str, Any]:
    platform.prepare()
    compat.apply()
    group = one_rank_group()
    # As torchrun's ranks; two threads would wait for each other wherever others use the machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[Way, list[float]] = {_ours: [], _before: []}
    for repeat in range(-1, REPEATS):  # the first one warms up
        for way in (_ours, _before) if repeat % 2 else (_before, _ours):
            logits, targets = _inputs()
            began = time.perf_counter()
            _forward_backward(way, logits, targets, group)
            if repeat >= 0:
                seconds[way].append(time.perf_counter() - began)
    ours, before = (statistics.median(seconds[way]) for way in (_ours, _before))
    torch.set_num_threads(threads)
    return {
        "logprob_memory_ratio": round(_memory_ratio(_ours, group), 3),
        "logprob_memory_ratio_before": round(_memory_ratio(_before, group), 3),
        "logprob_s": round(ours, 4),
        "logprob_speedup": round(before / ours, 2),
    }


class PeakBytes(TorchDispatchMode):
    """Follows the storages that operations make, and those of `known`, until they are freed.

    What an operation needs within itself is not seen.
    """

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes alive at once, so far."""
        self._alive: dict[StorageWeakRef, int] = {}
        self._follow(known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._follow(tree_leaves(result))
        return result

    def _follow(self, values: Any) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._alive[StorageWeakRef(storage)] = storage.nbytes()
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._alive.values()))


def one_rank_group() -> dist.ProcessGroup:
    """A tensor-parallel group of this process alone, that of the job or a new one."""
    if not dist.is_initialized():
        dist.init_process_group(platform.backend(), store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group([dist.get_rank()])
    assert isinstance(group, dist.ProcessGroup)
    return group


def _ours(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    log_probs, entropy = token_statistics(
        logits, targets, VOCABULARY, TEMPERATURE, group, with_entropy=True
    )
    assert entropy is not None
    return log_probs, entropy


def _before(logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """A float32 copy for Megatron's cross entropy, which overwrites it, and one for the entropy."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    entropy = _Entropy.apply(logits.to(torch.float32, copy=True).div_(TEMPERATURE), group)
    scaled = logits.to(torch.float32, copy=True).div_(TEMPERATURE)
    return -vocab_parallel_cross_entropy(scaled, targets, tp_group=group), entropy


class _Entropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scaled: Tensor, group: dist.ProcessGroup) -> Tensor:
        peak = scaled.max(dim=-1, keepdim=True).values
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        total = (scaled - peak).exp().sum(dim=-1, keepdim=True)
        dist.all_reduce(total, group=group)
        log_p = scaled - (peak + total.log())
        result = -(log_p.exp() * log_p).sum(dim=-1)
        dist.all_reduce(result, group=group)
        ctx.save_for_backward(log_p, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        log_p, result = ctx.saved_tensors
        slope = log_p.exp() * (log_p + result.unsqueeze(-1))
        return -grad_outputs[0].unsqueeze(-1) * slope, None


def _inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, ROWS // 2, VOCABULARY, generator=generator)
    targets = torch.randint(0, VOCABULARY, (2, ROWS // 2), generator=generator)
    device = platform.device()
    return logits.to(device).requires_grad_(), targets.to(device)


def _forward_backward(way: Way, logits: Tensor, targets: Tensor, group: dist.ProcessGroup) -> None:
    log_probs, entropy = way(logits, targets, group)
    (log_probs + entropy).sum().backward()
    platform.synchronize()


def _memory_ratio(way: Way, group: dist.ProcessGroup) -> float:
    logits, targets = _inputs()
    with PeakBytes(logits) as memory:
        _forward_backward(way, logits, targets, group)
    return memory.peak / logits.nbytes


if __name__ == "__main__":
    print(json.dumps(logprob()))
