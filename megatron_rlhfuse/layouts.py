"""Which ranks train which part of actor and critic, by the flags. PURE."""

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
