"""Log-probabilities and entropy of tokens from logits that are split over tensor ranks.

Invariants
- Padding columns of the vocabulary are outside the softmax: a zero row would count e^0.
- All arithmetic is float32, whatever the logits are; the logits themselves stay untouched.
- Results and gradients are the same on all tensor-parallel ranks as for whole logits on one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def token_log_probs(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup,
) -> Tensor:
    """log softmax(logits / temperature) at the targets, differentiable in the logits.

    Collective over `tp_group`.

    Args:
        logits: [batch, sequence, padded vocabulary / tp], this rank's columns
        targets: [batch, sequence] int64, the token to score at each place (shift them first)
        vocab_size: real columns; the rest is padding
        temperature: > 0

    Returns:
        [batch, sequence] float32
    """
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    scaled = _scaled(logits, vocab_size, temperature, tp_group)
    return -vocab_parallel_cross_entropy(scaled, targets, tp_group=tp_group)


def entropy(
    logits: Tensor, vocab_size: int, temperature: float, tp_group: dist.ProcessGroup
) -> Tensor:
    """Entropy, in nats, of softmax(logits / temperature), differentiable in the logits.

    Collective over `tp_group`. Arguments as for `token_log_probs`.

    Returns:
        [batch, sequence] float32
    """
    scaled = _scaled(logits, vocab_size, temperature, tp_group)
    return _Entropy.apply(scaled, tp_group)


def _scaled(
    logits: Tensor, vocab_size: int, temperature: float, tp_group: dist.ProcessGroup
) -> Tensor:
    """A float32 copy that later steps may overwrite (Megatron's cross entropy does)."""
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    scaled = logits.to(torch.float32, copy=True).div_(temperature)
    columns = logits.shape[-1]
    real = min(max(vocab_size - tp_group.rank() * columns, 0), columns)
    if real < columns:  # finite, so that probability 0 times it is 0 and not NaN
        scaled[..., real:] = torch.finfo(torch.float32).min
    return scaled


class _Entropy(torch.autograd.Function):
    """H = -sum_j p_j log p_j over columns on all ranks; dH/dx_j = -p_j (log p_j + H)."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
        peak = scaled.max(dim=-1, keepdim=True).values
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=tp_group)
        total = (scaled - peak).exp().sum(dim=-1, keepdim=True)
        dist.all_reduce(total, group=tp_group)
        log_p = scaled - (peak + total.log())
        result = -(log_p.exp() * log_p).sum(dim=-1)
        dist.all_reduce(result, group=tp_group)
        ctx.save_for_backward(log_p, result)
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        log_p, result = ctx.saved_tensors
        slope = log_p.exp() * (log_p + result.unsqueeze(-1))
        return -grad_outputs[0].unsqueeze(-1) * slope, None
