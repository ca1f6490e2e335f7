"""Which ranks train which part of actor and critic, and in how many micro-batches. PURE."""

from __future__ import annotations

import argparse

from megatron_rlhfuse.pipeline.devices import opposite_layout
from megatron_rlhfuse.pipeline.groups import Layout


def training_layouts(args: argparse.Namespace) -> tuple[Layout, Layout]:
    """Where actor and critic are trained: both in Megatron's order, or the critic opposite.

    Raises LayoutError where the critic's sizes do not fit the actor's.
    """
    actor = Layout.contiguous(
        args.world_size, args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    )
    critic = args.critic_tensor_model_parallel_size, args.critic_pipeline_model_parallel_size
    if args.fuses_training:
        return actor, opposite_layout(actor, *critic, names=("actor", "critic"))
    return actor, Layout.contiguous(args.world_size, *critic)


def micro_batches_per_step(args: argparse.Namespace) -> tuple[int, int]:
    """Micro-batches of a replica of actor and critic in one optimizer step."""
    actor, critic = training_layouts(args)
    return (
        args.global_batch_size // (args.micro_batch_size * actor.dp),
        args.global_batch_size // (args.critic_micro_batch_size * critic.dp),
    )
