"""Log-probabilities and entropy of tokens from logits that are split over tensor ranks.

Logits are by far the largest activation where the vocabulary is large. They are worked on a few
rows at a time, and their gradient takes their place: forward and backward need hardly more memory
than the logits themselves.

Invariants
- Padding columns of the vocabulary are outside the softmax (a zero row would count e^0), and
  their gradient is exactly 0.
- All arithmetic is float32, whatever the logits are.
- Results and gradients are the same on all tensor-parallel ranks as for whole logits on one.
- How many rows are worked on at a time changes nothing but the speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

# A CPU works within its caches; a GPU's kernels should take longer than their launch.
CHUNK_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}
"""Of a float32 buffer, of which there are two. A chunk has at least one row."""

_LOWEST = torch.finfo(torch.float32).min


def token_statistics(
    logits: Tensor,
    targets: Tensor,
    vocab_size: int,
    temperature: float,
    tp_group: dist.ProcessGroup,
    *,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(logits / temperature) at the targets, and the entropy of that softmax.

    Both are differentiable in the logits, once: a backward puts the gradient in the place of the
    logits, which are gone after it, so a second one is wrong (autograd refuses it, but not under
    hooks on saved tensors). Without a backward they stay as they are. Collective over `tp_group`.

    Args:
        logits: [batch, sequence, padded vocabulary / tp], this rank's columns; a view will do, but
            no expanded one
        targets: [batch, sequence] int64, the token to score at each place (shift them first)
        vocab_size: real columns; the rest is padding
        temperature: > 0

    Returns:
        log-probabilities, [batch, sequence] float32
        entropies in nats, [batch, sequence] float32; None without `with_entropy`
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    first = tp_group.rank() * logits.shape[-1]
    real = min(max(vocab_size - first, 0), logits.shape[-1])
    return _TokenStatistics.apply(
        logits, targets - first, real, temperature, tp_group, with_entropy
    )


class _TokenStatistics(torch.autograd.Function):
    """With d_j = (x_j - max x) / temperature, S = sum_j e^d_j and p_j = e^d_j / S:

    log p_j = d_j - log S, and H = log S - sum_j p_j d_j, in which nothing cancels;
    d(log p_i)/dx_j = ([i = j] - p_j) / temperature;
    dH/dx_j = -p_j (log p_j + H) / temperature.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        real: int,
        temperature: float,
        tp_group: dist.ProcessGroup,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """targets: as columns of this rank; real: how many columns are not padding."""
        columns = logits[..., :real]
        own_peak = logits.new_full(targets.shape, _LOWEST, dtype=torch.float32)
        sums = own_peak.new_zeros(3 if with_entropy else 2, *targets.shape)
        total, at_target = sums[:2]  # the third one: sum_j e^d_j d_j
        for chunk in _chunks(columns):
            own_peak[chunk] = columns[chunk].amax(-1)
            d = _below_peak(columns[chunk], own_peak[chunk], temperature)
            if with_entropy:
                exp = d.exp()
                total[chunk] = exp.sum(-1)
                sums[2][chunk] = d.mul_(exp).sum(-1)
            else:
                total[chunk] = d.exp_().sum(-1)
        peak = own_peak.clone()
        _all_reduce(peak, dist.ReduceOp.MAX, tp_group)
        if real:
            if with_entropy:
                sums[2] += total * (own_peak - peak) / temperature
            sums *= ((own_peak - peak) / temperature).exp()
            column, here = _own_columns(targets, real)
            d = _below_peak(columns.gather(-1, column), peak, temperature).squeeze(-1)
            at_target.copy_(d.where(here, 0.0))
        _all_reduce(sums, dist.ReduceOp.SUM, tp_group)
        log_total = total.log()
        entropy = log_total - sums[2] / total if with_entropy else None
        ctx.save_for_backward(logits, targets, peak, log_total, entropy)
        ctx.real, ctx.temperature = real, temperature
        ctx.set_materialize_grads(False)
        return at_target - log_total, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_log_probs: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor | None, None, None, None, None, None]:
        """The gradient, [(factor + slope d_j) e^d_j + (at_target where j = i)], over the logits.

        Writing there raises the version of the logits; by that autograd refuses a second backward.
        """
        saved, targets, peak, log_total, entropy = ctx.saved_tensors
        logits, real, temperature = saved.detach(), ctx.real, ctx.temperature
        scale = (-log_total).exp() / -temperature
        factor, slope, at_target = torch.zeros_like(scale), None, None
        if of_log_probs is not None:
            factor = of_log_probs * scale
            at_target = of_log_probs / temperature
        if of_entropy is not None:
            slope = of_entropy * scale
            factor = factor + slope * (entropy - log_total)
        columns = logits[..., :real]
        for chunk in _chunks(columns):
            d = _below_peak(columns[chunk], peak[chunk], temperature)
            if slope is None:
                gradient = d.exp_().mul_(factor[chunk].unsqueeze(-1))
            else:
                gradient = d.exp()
                d.mul_(slope[chunk].unsqueeze(-1)).add_(factor[chunk].unsqueeze(-1))
                gradient.mul_(d)
            if at_target is not None:
                column, here = _own_columns(targets[chunk], real)
                added = at_target[chunk].where(here, 0.0).unsqueeze(-1)
                gradient.scatter_add_(-1, column, added)
            columns[chunk].copy_(gradient)
        logits[..., real:].zero_()
        return logits, None, None, None, None, None


def _chunks(columns: Tensor) -> Iterator[tuple[slice, slice]]:
    """Parts of [batch, sequence, columns] of at most CHUNK_BYTES as float32, or of one row.

    By slices of both axes: to make rows of a transposed tensor's axes would copy it.
    """
    batch, sequence, width = columns.shape
    if not columns.numel():
        return
    rows = max(1, CHUNK_BYTES[columns.device.type] // (4 * width))
    high, long = max(1, rows // sequence), min(rows, sequence)
    for top in range(0, batch, high):
        for left in range(0, sequence, long):
            yield slice(top, top + high), slice(left, left + long)


def _below_peak(columns: Tensor, peak: Tensor, temperature: float) -> Tensor:
    """(columns - peak) / temperature in float32, a new tensor.

    In this order the largest logits lose no digits, however far from 0 they are.
    """
    return torch.sub(columns, peak.unsqueeze(-1)).div_(temperature)


def _own_columns(targets: Tensor, real: int) -> tuple[Tensor, Tensor]:
    """Columns to read, [batch, sequence, 1], and where the targets are this rank's at all."""
    return targets.clamp(0, real - 1).unsqueeze(-1), (targets >= 0) & (targets < real)


def _all_reduce(rows: Tensor, op: Any, tp_group: dist.ProcessGroup) -> None:
    if tp_group.size() > 1:
        dist.all_reduce(rows, op=op, group=tp_group)
