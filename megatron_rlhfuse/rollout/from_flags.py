"""What the flags say to engines and to the planner of migrations."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from megatron_rlhfuse import platform
from megatron_rlhfuse.migration.planner import MigrationOptions
from megatron_rlhfuse.rollout.engine import EngineOptions
from megatron_rlhfuse.rollout.samples import SamplingOptions


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """The `--rollout-*` sampling flags."""
    return SamplingOptions(
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        top_k=args.rollout_top_k,
        repetition_penalty=args.rollout_repetition_penalty,
        presence_penalty=args.rollout_presence_penalty,
        frequency_penalty=args.rollout_frequency_penalty,
        max_new_tokens=args.rollout_max_new_tokens,
        min_new_tokens=args.rollout_min_new_tokens,
        stop_token_ids=tuple(args.rollout_stop_token_ids),
        ignore_eos=args.rollout_ignore_eos,
    )


def migration_options(args: argparse.Namespace) -> MigrationOptions:
    """The `--rlhfuse-migration-*` flags."""
    return MigrationOptions(
        threshold=args.rlhfuse_migration_threshold or 0.0,
        max_tokens=args.rollout_max_new_tokens,
        policy=args.rlhfuse_migration_policy,
        inference_instances=tuple(args.rlhfuse_migration_instances),
        transfer=args.rlhfuse_migration_transfer,
        batch_capacity=args.rlhfuse_migration_batch,
        rebalance=args.rlhfuse_migration_rebalance,
        max_num_seqs=args.rollout_max_num_seqs,
    )


def engine_options(args: argparse.Namespace, instance: int) -> EngineOptions:
    """How an instance's engine runs on this machine."""
    machine = platform.engine_defaults()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    log = Path(args.rlhfuse_run_dir) / "logs" / f"engine{instance}.log"
    return EngineOptions(
        model=args.actor_model,
        tensor_parallel_size=args.rollout_tensor_parallel_size,
        dtype=args.rollout_dtype,
        max_model_len=args.seq_length,
        max_num_seqs=args.rollout_max_num_seqs,
        kv_cache_bytes=args.rollout_kv_cache_bytes,
        gpu_memory_utilization=args.rollout_gpu_memory_utilization,
        enforce_eager=machine["enforce_eager"],
        block_size=None,
        seed=args.seed,
        device=machine["device"],
        visible_devices=platform.visible_devices(local_rank, args.rollout_tensor_parallel_size),
        log_file=str(log),
        start_timeout_s=args.rollout_start_timeout,
        step_timeout_s=args.rollout_step_timeout,
        enable_sleep=machine["can_sleep"],
        # A threshold of None is chosen anew in every iteration.
        migrates=args.fuses_rollout
        and args.rollout_instances > 1
        and args.rlhfuse_migration_threshold != 0,
        pace_s=args.rollout_pace,
    )
