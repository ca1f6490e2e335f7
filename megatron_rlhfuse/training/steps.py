"""Megatron `forward_step_func`s: what each model does with a micro-batch.

Losses are sums over the mini-batch by construction (`MicroBatch.weights`), but the stock schedule
divides a loss by the number of micro-batches, and DDP averages gradients over data-parallel
replicas; `LossScale` undoes both, so that the gradient is that of the mini-batch in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.model import ForwardStep
from megatron_rlhfuse.rlhf.losses import (
    LossOutput,
    PolicyBatch,
    PolicyLossOptions,
    ValueBatch,
    policy_loss,
    value_loss,
)
from megatron_rlhfuse.training.batches import TokenBatch
from megatron_rlhfuse.training.heads import PolicyHead, response_values
from megatron_rlhfuse.training.training_data import MicroBatch


@dataclass(frozen=True)
class LossScale:
    """micro_batches: of this replica; replicas: data-parallel copies of the model."""

    micro_batches: int
    replicas: int

    def __call__(self, output: LossOutput) -> tuple[Tensor, dict[str, Tensor]]:
        """What the schedule expects of a loss function: (loss, metrics)."""
        return output.loss * (self.micro_batches * self.replicas), output.metrics


def forward(model: torch.nn.Module, batch: TokenBatch) -> Tensor:
    """Runs this stage on a batch; no attention mask, see batches.py."""
    packed = batch.packed_seq_params()
    return model(batch.tokens, batch.positions, None, packed_seq_params=packed)


def policy_metrics(options: PolicyLossOptions) -> list[str]:
    """Names of what `policy_loss` reports under these options."""
    names = ["policy_loss", "ratio", "clip_fraction", "approx_kl", "entropy"]
    if options.dual_clip is not None:
        names.append("dual_clip_fraction")
    if options.tis_cap is not None:
        names += ["tis_weight", "tis_truncated_fraction"]
    if options.kl_coefficient:
        names.append("kl_loss")
    return names


def value_metrics(clip: float | None) -> list[str]:
    """Names of what `value_loss` reports."""
    return ["value_loss", "value", *(["value_clip_fraction"] if clip is not None else [])]


def policy_step(head: PolicyHead, options: PolicyLossOptions, scale: LossScale) -> ForwardStep:
    """The actor's training step; micro-batches are `MicroBatch`es."""

    def loss_of(rows: MicroBatch, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # The loss takes a gradient of the entropy where it has that term; else it is a metric.
        log_probs, entropy = head.log_probs_and_entropy(logits, rows.batch)
        batch = PolicyBatch(
            log_probs=log_probs,
            old_log_probs=rows.old_log_probs,
            advantages=rows.advantages,
            mask=rows.mask,
            weights=rows.weights,
            rollout_log_probs=rows.rollout_log_probs,
            reference_log_probs=rows.reference_log_probs,
            entropy=entropy,
        )
        return scale(policy_loss(batch, options))

    return _training_step(loss_of)


def value_step(clip: float | None, scale: LossScale) -> ForwardStep:
    """The critic's training step; micro-batches are `MicroBatch`es."""

    def loss_of(rows: MicroBatch, output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        assert rows.old_values is not None and rows.returns is not None
        batch = ValueBatch(
            values=response_values(output, rows.batch),
            old_values=rows.old_values,
            returns=rows.returns,
            mask=rows.mask,
            weights=rows.weights,
        )
        return scale(value_loss(batch, clip))

    return _training_step(loss_of)


def scoring_step(read: Callable[[Tensor, TokenBatch], Tensor]) -> ForwardStep:
    """A forward-only step; micro-batches are `TokenBatch`es, results what `read` makes of them."""

    def step(batches: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches).to(platform.device())

        def collect(output: Tensor, non_loss_data: bool = True) -> Tensor:
            return read(output, batch).cpu()

        return forward(model, batch), collect

    return step


def _training_step(
    loss_of: Callable[[MicroBatch, Tensor], tuple[Tensor, dict[str, Tensor]]],
) -> ForwardStep:
    def step(rows: Iterator[Any], model: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(rows)
        output = forward(model, micro_batch.batch)
        return output, lambda output: loss_of(micro_batch, output)

    return step
