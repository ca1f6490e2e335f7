"""From the flags a user gave to the arguments of a job: what depends on folders and on the world.

`complete_flags` fills in what follows from other flags and from the model folders, and refuses
what does not fit together. flag_rules.py has looked at the flags by themselves before.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

from megatron_rlhfuse import platform
from megatron_rlhfuse.flag_error import FlagError, flag
from megatron_rlhfuse.flag_rules import check_schedules
from megatron_rlhfuse.inference.reward_function import RewardFunctionError, load_reward_function
from megatron_rlhfuse.layouts import micro_batches_per_step, training_layouts
from megatron_rlhfuse.models.hf_config import Head, ModelShape, apply_shape, read_shape
from megatron_rlhfuse.pipeline.devices import LayoutError, map_devices
from megatron_rlhfuse.pipeline.errors import PlanMismatchError
from megatron_rlhfuse.pipeline.plan_file import check_plan
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.plan import load_plan

# A fault is reported of the first model that has it: those before others that default to them.
_MODELS = ("actor", "reward", "reference", "critic")


def complete_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with defaults that depend on others, and the actor's architecture.

    Adds `uses_critic`, `uses_reference`, `fuses_training`, `fuses_rollout`, and `actor_shape`,
    `critic_shape`, `reward_shape`, `reference_shape` (None where there is no such model). Raises
    `FlagError`.
    """
    args.uses_critic = args.advantage_estimator == "gae"
    args.uses_reference = args.ppo_kl_coef != 0
    args.reference_model = args.reference_model or args.actor_model
    args.critic_model = args.critic_model or args.reward_model or args.actor_model
    _inherit(args)
    check_schedules(args)
    _check_layouts(args)
    _complete_fusion(args)
    _check_migration_instances(args)
    _check_batches(args)
    _check_folders(args)
    _check_plan(args)
    _read_shapes(args)
    _check_models(args)
    _check_reward_function(args)
    _complete_lengths(args)
    for name in _MODELS:
        folder = getattr(args, f"{name}_model")
        if folder:
            setattr(args, f"{name}_model", str(Path(folder).resolve()))
    return _apply_shapes(args)


def _inherit(args: argparse.Namespace) -> None:
    """Flags that default to another flag's value."""
    for name, source in (
        ("critic_tensor_model_parallel_size", "tensor_model_parallel_size"),
        ("critic_pipeline_model_parallel_size", "pipeline_model_parallel_size"),
        ("critic_micro_batch_size", "micro_batch_size"),
        ("critic_micro_batch_tokens", "micro_batch_tokens"),
        ("critic_lr", "lr"),
        ("critic_min_lr", "min_lr"),
        ("critic_lr_warmup_iters", "lr_warmup_iters"),
        ("critic_clip_grad", "clip_grad"),
        ("critic_weight_decay", "weight_decay"),
        ("rlhfuse_inference_tensor_parallel_size", "tensor_model_parallel_size"),
        ("ppo_clip_high", "ppo_clip"),
    ):
        if getattr(args, name) is None:
            setattr(args, name, getattr(args, source))
    if args.rollout_instances is None:
        args.rollout_instances = max(1, args.world_size // args.rollout_tensor_parallel_size)
    if args.ppo_kl_estimator is None:
        args.ppo_kl_estimator = "k1" if args.ppo_kl_placement == "reward" else "k3"
    if args.save and args.save_interval is None:
        args.save_interval = args.train_iters  # once, at the end
    # Ranks wait for each other in collectives while a stage or an engine's start takes its time.
    longest = max(args.rlhfuse_stage_timeout, args.rollout_start_timeout)
    args.distributed_timeout_minutes = max(
        args.distributed_timeout_minutes, math.ceil(longest / 60) + 1
    )
    engine = platform.engine_defaults()
    if args.rollout_dtype is None:
        args.rollout_dtype = engine["dtype"]
    if args.rollout_kv_cache_bytes is None and engine["device"] == "cpu":
        args.rollout_kv_cache_bytes = 64 << 20


def _check_layouts(args: argparse.Namespace) -> None:
    world = args.world_size
    for tensor, pipeline in (
        ("tensor_model_parallel_size", "pipeline_model_parallel_size"),
        ("critic_tensor_model_parallel_size", "critic_pipeline_model_parallel_size"),
        ("rlhfuse_inference_tensor_parallel_size", "rlhfuse_inference_pipeline_parallel_size"),
    ):
        size = getattr(args, tensor) * getattr(args, pipeline)
        if world % size:
            raise FlagError(
                f"{flag(tensor)} x {flag(pipeline)} = {size} does not divide the {world} "
                "process(es): start a multiple of it with torchrun --nproc-per-node"
            )
    if world % args.rollout_instances:
        raise FlagError(
            f"--rollout-instances {args.rollout_instances} does not divide the {world} "
            "process(es): every instance is led by one rank of an equal block"
        )
    block = world // args.rollout_instances
    on_node = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    leaders = range(0, world, block)
    if platform.has_cuda() and any(
        leader % on_node + args.rollout_tensor_parallel_size > on_node for leader in leaders
    ):
        raise FlagError(
            f"--rollout-tensor-parallel-size {args.rollout_tensor_parallel_size} takes an engine "
            f"over the edge of a node of {on_node} GPUs: choose it and --rollout-instances so "
            "that every engine lies within one"
        )
    if platform.has_cuda() and args.rollout_tensor_parallel_size > block:
        raise FlagError(
            f"--rollout-tensor-parallel-size {args.rollout_tensor_parallel_size} needs more than "
            f"the {block} GPU(s) of an instance: lower it or --rollout-instances"
        )


def _check_migration_instances(args: argparse.Namespace) -> None:
    if len(set(args.rlhfuse_migration_instances)) < len(args.rlhfuse_migration_instances):
        raise FlagError("--rlhfuse-migration-instances: want every number once")
    for instance in args.rlhfuse_migration_instances:
        if not 0 <= instance < args.rollout_instances:
            raise FlagError(
                f"--rlhfuse-migration-instances {instance}: want numbers from 0, below "
                f"--rollout-instances {args.rollout_instances}"
            )


def _complete_fusion(args: argparse.Namespace) -> None:
    """Adds `fuses_rollout` and `fuses_training`; what was asked for must be possible."""
    asked = args.rlhfuse_fusion
    args.fuses_rollout = asked in (None, "inter", "both")
    args.fuses_training = args.uses_critic and asked in (None, "intra", "both")
    if not args.fuses_training:
        return
    stages = (args.pipeline_model_parallel_size, args.critic_pipeline_model_parallel_size)
    if asked is None and args.rlhfuse_plan is None and max(stages) == 1:
        args.fuses_training = False  # without a pipeline there are no bubbles to fill
        return
    try:
        _check_fused_layout(args)
    except FlagError:
        if asked is not None or args.rlhfuse_plan is not None:
            raise
        args.fuses_training = False


def _check_fused_layout(args: argparse.Namespace) -> None:
    try:
        training_layouts(args)
    except LayoutError as fault:
        raise FlagError(
            f"--critic-tensor-model-parallel-size {args.critic_tensor_model_parallel_size} and "
            f"--critic-pipeline-model-parallel-size {args.critic_pipeline_model_parallel_size} do "
            f"not fit the actor's sizes for a fused pipeline: {fault}; choose others, or "
            "--rlhfuse-fusion none"
        ) from fault


def _check_plan(args: argparse.Namespace) -> None:
    """That the plan can be run by this job; the file need not be there on ranks other than 0."""
    if args.rlhfuse_plan is None or args.rank != 0:
        return
    try:
        plan = load_plan(args.rlhfuse_plan)
        devices = map_devices(("actor", "critic"), training_layouts(args))
        check_plan(plan.timeline, devices, micro_batches_per_step(args))
    except OSError as fault:
        raise FlagError(
            f"--rlhfuse-plan {args.rlhfuse_plan}: {fault.strerror}: make it with `rlhfuse plan`, "
            "or leave the flag out: the job then plans by itself"
        ) from fault
    except (PlanMismatchError, ScheduleError) as fault:
        raise FlagError(f"--rlhfuse-plan {args.rlhfuse_plan}: {fault}") from fault


def _check_batches(args: argparse.Namespace) -> None:
    if args.rollout_batch_size % args.global_batch_size:
        raise FlagError(
            f"--rollout-batch-size {args.rollout_batch_size} is no multiple of "
            f"--global-batch-size {args.global_batch_size}: an epoch is a whole number of steps"
        )
    for prefix in ("", "critic_") if args.uses_critic else ("",):
        tensor = getattr(args, f"{prefix}tensor_model_parallel_size")
        pipeline = getattr(args, f"{prefix}pipeline_model_parallel_size")
        replicas = args.world_size // (tensor * pipeline)
        if args.micro_batch_tokens is not None:
            if args.global_batch_size % replicas:
                raise FlagError(
                    f"--global-batch-size {args.global_batch_size} is no multiple of {replicas} "
                    f"{prefix and 'critic '}data-parallel replicas: change one of them"
                )
            continue
        micro = getattr(args, f"{prefix}micro_batch_size")
        if args.global_batch_size % (micro * replicas):
            raise FlagError(
                f"--global-batch-size {args.global_batch_size} is no multiple of "
                f"{flag(prefix + 'micro_batch_size')} {micro} x {replicas} data-parallel replica(s)"
                ": change one of them"
            )


def _check_folders(args: argparse.Namespace) -> None:
    """What is to be written and read, before hours are spent on it."""
    for name in ("rlhfuse_run_dir", "save", "save_hf"):
        folder = getattr(args, name)
        if folder and not _can_be_written(Path(folder)):
            raise FlagError(f"{flag(name)} {folder}: no folder can be made or written there")
    if args.save_hf:
        for written in ("actor", "critic"):
            for name in _MODELS:
                folder = getattr(args, f"{name}_model")
                if folder and (Path(args.save_hf) / written).resolve() == Path(folder).resolve():
                    raise FlagError(
                        f"--save-hf {args.save_hf} would replace {folder} of --{name}-model: "
                        "choose another folder"
                    )
    if args.load and args.rank == 0:  # whose word counts: others may see new files later
        from megatron_rlhfuse.training.checkpoint_folder import (
            CheckpointError,
            latest_checkpoint,
        )

        try:
            latest_checkpoint(args.load)
        except CheckpointError as fault:
            raise FlagError(str(fault)) from fault


def _can_be_written(folder: Path) -> bool:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


def _read_shapes(args: argparse.Namespace) -> None:
    heads: dict[str, Head | None] = {
        "actor": "language",
        "reward": "scalar" if args.reward_model else None,
        "reference": "language" if args.uses_reference else None,
        "critic": "scalar" if args.uses_critic else None,
    }
    for name in _MODELS:
        head = heads[name]
        try:
            shape = head and read_shape(getattr(args, f"{name}_model"), head)
        except (ValueError, OSError) as fault:
            raise FlagError(f"--{name}-model: {fault}") from fault
        setattr(args, f"{name}_shape", shape)


def _check_models(args: argparse.Namespace) -> None:
    actor: ModelShape = args.actor_shape
    for name in ("reference", "critic", "reward"):
        shape = getattr(args, f"{name}_shape")
        if shape is not None and shape.vocab_size != actor.vocab_size:
            raise FlagError(
                f"--{name}-model has a vocabulary of {shape.vocab_size} tokens, --actor-model one "
                f"of {actor.vocab_size}: all models must share one tokenizer"
            )
    if args.reward_shape is not None and args.reward_shape.stored_head != "scalar":
        raise FlagError(
            f"--reward-model {args.reward_model} is a language model, without a trained score: "
            "name a sequence classifier with one label"
        )
    if actor.num_attention_heads % args.rollout_tensor_parallel_size:
        raise FlagError(
            f"--rollout-tensor-parallel-size {args.rollout_tensor_parallel_size} does not divide "
            f"the {actor.num_attention_heads} attention heads of --actor-model: lower it"
        )
    foreign = [t for t in args.rollout_stop_token_ids if not 0 <= t < actor.vocab_size]
    if foreign:
        raise FlagError(
            f"--rollout-stop-token-ids {foreign[0]}: --actor-model has tokens 0 to "
            f"{actor.vocab_size - 1}"
        )


def _check_reward_function(args: argparse.Namespace) -> None:
    if not args.reward_function:
        return
    try:
        load_reward_function(args.reward_function)
    except RewardFunctionError as fault:
        raise FlagError(str(fault)) from fault


def _complete_lengths(args: argparse.Namespace) -> None:
    longest = args.rollout_max_prompt_tokens + args.rollout_max_new_tokens
    for name in _MODELS:
        shape = getattr(args, f"{name}_shape")
        if shape is not None and longest > shape.max_position_embeddings:
            raise FlagError(
                f"--rollout-max-prompt-tokens + --rollout-max-new-tokens = {longest} exceeds the "
                f"{shape.max_position_embeddings} positions of --{name}-model: lower one of them"
            )
    if args.seq_length is not None and args.seq_length < longest:
        raise FlagError(
            f"--seq-length {args.seq_length} is below --rollout-max-prompt-tokens + "
            f"--rollout-max-new-tokens = {longest}: leave it out"
        )
    args.seq_length = longest
    for name in ("micro_batch_tokens", "critic_micro_batch_tokens"):
        tokens = getattr(args, name)
        if tokens is not None and tokens < longest:
            raise FlagError(
                f"{flag(name)} {tokens} is below --rollout-max-prompt-tokens + "
                f"--rollout-max-new-tokens = {longest}: a micro-batch holds at least one sample"
            )
    if args.micro_batch_tokens is not None:
        args.micro_batch_size = 1  # Megatron's checks want one; parse_arguments takes it away


def _apply_shapes(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments describing the actor, after trying every model in every layout it takes."""
    described = _describe(args, "actor", "", "model-parallel-size")
    if args.uses_critic:
        _describe(args, "critic", "critic-", "model-parallel-size")
    for name in _MODELS:
        if getattr(args, f"{name}_shape") is not None:
            _describe(args, name, "rlhfuse-inference-", "parallel-size")
    return described


def _describe(args: argparse.Namespace, name: str, prefix: str, suffix: str) -> argparse.Namespace:
    """The arguments of a model in the layout of --PREFIXtensor-SUFFIX, --PREFIXpipeline-SUFFIX."""
    flags = (f"{prefix}{axis}-{suffix}" for axis in ("tensor", "pipeline"))
    tensor, pipeline = (getattr(args, option.replace("-", "_")) for option in flags)
    try:
        return apply_shape(args, getattr(args, f"{name}_shape"), tensor, pipeline, prefix)
    except ValueError as fault:
        message = str(fault).replace("model-parallel-size", suffix)
        raise FlagError(f"--{name}-model: {message}") from fault
