"""A model in training: Megatron's DDP, optimizer and learning-rate schedule around its stage."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import (
    OptimizerParamScheduler,
    get_canonical_lr_for_logging,
)
from megatron.training.training import get_megatron_optimizer_config
from megatron.training.utils import (
    logical_and_across_model_parallel_group,
    reduce_max_stat_across_model_parallel_group,
)
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.models.build import build_model, wrap_for_training
from megatron_rlhfuse.models.export import stream_hf_weights
from megatron_rlhfuse.models.hf_config import Head, ModelShape
from megatron_rlhfuse.models.load import load_hf_weights
from megatron_rlhfuse.pipeline.groups import ModelGroups
from megatron_rlhfuse.pipeline.model import ForwardStep, PipelinedModel
from megatron_rlhfuse.training.training_data import MicroBatch


@dataclass(frozen=True)
class StepResult:
    """One optimizer step. metrics: sums over the whole mini-batch, the same on every rank."""

    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float
    applied: bool
    """False where the optimizer skipped the step (overflow with fp16, or a gradient not finite)."""


class TrainedModel(PipelinedModel):
    """Actor or critic. `args` are Megatron's, describing this model and its optimizer."""

    def __init__(
        self,
        name: str,
        args: argparse.Namespace,
        shape: ModelShape,
        folder: str,
        head: Head,
        groups: ModelGroups,
        steps_per_iteration: int,
    ) -> None:
        self.name = name
        self.args = args
        self.shape = shape
        model = build_model(args, groups, head, args.rlhfuse_pack_sequences)
        load_hf_weights(model, folder, shape, groups)
        self._ddp = wrap_for_training(model, args, model.config, groups)
        super().__init__(self._ddp, groups)
        config, overrides = get_megatron_optimizer_config(args)
        self.optimizer = get_megatron_optimizer(
            config,
            [self.model],
            config_overrides=overrides,
            use_gloo_process_groups=False,
            pg_collection=groups.pgc,
        )
        self.scheduler = _scheduler(args, self.optimizer, steps_per_iteration)
        self.has_stepped = False
        """Whether the optimizer has a state: after its first step, or loaded from a checkpoint."""
        self.config.grad_scale_func = self.optimizer.scale_loss
        self.config.finalize_model_grads_func = finalize_model_grads
        if args.overlap_grad_reduce:
            self.config.no_sync_func = self._ddp.no_sync

    @property
    def replicas(self) -> int:
        """Data-parallel copies of this model."""
        return self.groups.layout.dp

    def hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The weights under their Hugging Face names, one whole tensor at a time, on every rank.

        COLLECTIVE over all ranks; consume it to the end.
        """
        return stream_hf_weights(
            self.module, self.shape, self.groups.layout, self.args.params_dtype
        )

    def step(
        self, forward_step: ForwardStep, micro_batches: Sequence[MicroBatch], metrics: Sequence[str]
    ) -> StepResult:
        """Forward and backward over this replica's micro-batches, then one optimizer step.

        COLLECTIVE over all ranks. `metrics` names what the loss function reports, since ranks
        before the last stage never see it.
        """
        self.zero_grad()
        reported = self.run(forward_step, micro_batches, forward_only=False)
        return self.finish_step(reported, metrics)

    def zero_grad(self) -> None:
        """Before the forwards and backwards of a step."""
        self._ddp.zero_grad_buffer()
        self.optimizer.zero_grad()

    def finish_step(
        self, reported: Sequence[dict[str, Tensor]], metrics: Sequence[str]
    ) -> StepResult:
        """The optimizer's part of a step, once gradients are final. COLLECTIVE over all ranks.

        reported: by the loss function, per micro-batch; empty before the last stage
        """
        applied, grad_norm, _ = self.optimizer.step()
        self.has_stepped = True
        model_parallel = self.groups.pgc.mp
        applied = logical_and_across_model_parallel_group(applied, group=model_parallel)
        grad_norm = reduce_max_stat_across_model_parallel_group(grad_norm, group=model_parallel)
        learning_rate = get_canonical_lr_for_logging(self.optimizer.param_groups)
        if applied:
            self.scheduler.step(increment=1)
        return StepResult(
            metrics=self._sum_metrics(reported, metrics),
            grad_norm=float(grad_norm),
            learning_rate=float(learning_rate or 0.0),
            applied=bool(applied),
        )

    def skip_step(self) -> None:
        """Leaves an optimizer step out; the learning rate counts iterations, so it moves on."""
        self.scheduler.step(increment=1)

    def _sum_metrics(
        self, reported: Sequence[dict[str, Tensor]], names: Sequence[str]
    ) -> dict[str, float]:
        """Adds the micro-batches of all replicas; every rank gets the sums."""
        sums = torch.zeros(len(names), dtype=torch.float64)
        # Tensor-parallel ranks of the last stage hold equal copies: one of them speaks.
        if self.is_last_stage and self.groups.pgc.tp.rank() == 0:
            for micro_batch in reported:
                sums += torch.stack([micro_batch[name].double().cpu() for name in names])
        sums = sums.to(platform.device())
        # In the layout's order, so that the last bit does not depend on where its ranks are.
        torch.distributed.all_reduce(sums, group=self.groups.pgc.intra_dist_opt)
        return dict(zip(names, sums.tolist(), strict=True))


@dataclass(frozen=True)
class TrainedModels:
    """What the job trains; no critic for a critic-free advantage estimator."""

    actor: TrainedModel
    critic: TrainedModel | None

    def by_name(self) -> dict[str, TrainedModel]:
        """The models by the name they have in checkpoints."""
        models = {"actor": self.actor}
        if self.critic is not None:
            models["critic"] = self.critic
        return models


def critic_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """A copy of the actor's arguments with the critic's optimizer settings."""
    critic = copy.copy(args)
    for name in ("lr", "min_lr", "lr_warmup_iters", "clip_grad", "weight_decay"):
        setattr(critic, name, getattr(args, f"critic_{name}"))
    if args.weight_decay_incr_style == "constant":
        critic.start_weight_decay = critic.end_weight_decay = critic.weight_decay
    critic.micro_batch_size = args.critic_micro_batch_size
    critic.micro_batch_tokens = args.critic_micro_batch_tokens
    return critic


def _scheduler(
    args: argparse.Namespace, optimizer: object, steps_per_iteration: int
) -> OptimizerParamScheduler:
    """Megatron's schedule, counted in optimizer steps; the flags count PPO iterations."""
    decay_iterations = args.lr_decay_iters or args.train_iters
    decay_steps = decay_iterations * steps_per_iteration
    warmup_steps = args.lr_warmup_iters * steps_per_iteration
    if args.lr_warmup_fraction is not None:
        warmup_steps = args.lr_warmup_fraction * decay_steps
    wsd_decay = args.lr_wsd_decay_iters
    return OptimizerParamScheduler(
        optimizer,
        init_lr=args.lr_warmup_init,
        max_lr=args.lr,
        min_lr=args.min_lr or 0.0,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_steps,
        lr_decay_style=args.lr_decay_style,
        start_wd=args.start_weight_decay,
        end_wd=args.end_weight_decay,
        wd_incr_steps=decay_steps,  # a run may be extended where --lr-decay-iters says how far
        wd_incr_style=args.weight_decay_incr_style,
        use_checkpoint_opt_param_scheduler=args.use_checkpoint_opt_param_scheduler,
        override_opt_param_scheduler=args.override_opt_param_scheduler,
        wsd_decay_steps=None if wsd_decay is None else wsd_decay * steps_per_iteration,
        lr_wsd_decay_style=args.lr_wsd_decay_style,
    )
