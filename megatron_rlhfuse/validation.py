"""Which flags go together: every refusal names the flag and the remedy.

`check_flags` looks at what the user gave; `complete_flags` fills in what follows from it and from
the model folders. Both raise `FlagError`, whose text is one line for the terminal.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.models.hf_config import Head, ModelShape, apply_shape, read_shape

# Megatron flags by attribute, the value that leaves them off, and what to do instead.
_UNSUPPORTED: dict[str, tuple[object, str]] = {
    "context_parallel_size": (1, "leave it at 1"),
    "expert_model_parallel_size": (1, "only dense models are trained"),
    "num_experts": (None, "only dense models are trained"),
    "virtual_pipeline_model_parallel_size": (None, "interleaved pipelines are not supported"),
    "num_layers_per_virtual_pipeline_stage": (None, "interleaved pipelines are not supported"),
    "num_virtual_stages_per_pipeline_rank": (None, "interleaved pipelines are not supported"),
    "decoder_first_pipeline_num_layers": (None, "stages hold equal numbers of layers"),
    "decoder_last_pipeline_num_layers": (None, "stages hold equal numbers of layers"),
    "pipeline_model_parallel_layout": (None, "stages hold equal numbers of layers"),
    "train_samples": (None, "give the number of PPO iterations with --train-iters"),
    "rampup_batch_size": (None, "the PPO mini-batch is constant: --global-batch-size"),
    "lr_decay_samples": (None, "use --lr-decay-iters, in PPO iterations"),
    "data_path": (None, "prompts come from --prompt-data"),
    "use_torch_fsdp2": (False, "use Megatron's DDP and --use-distributed-optimizer"),
    "use_megatron_fsdp": (False, "use Megatron's DDP and --use-distributed-optimizer"),
    "async_save": (False, "checkpoints are written before the next iteration starts"),
}

# Architecture flags that the model folder decides.
_FROM_FOLDER = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "kv_channels",
)


class FlagError(ValueError):
    """A flag, or a combination of flags, that cannot run. One line: the flag and the remedy."""


def flag(attribute: str) -> str:
    """The flag of an argument: `rollout_batch_size` -> `--rollout-batch-size`."""
    return "--" + attribute.replace("_", "-")


def check_flags(args: argparse.Namespace) -> None:
    """Refuses what cannot run, before any file is read. Raises `FlagError`."""
    for check in (_check_required, _check_unsupported, _check_ranges, _check_ppo, _check_optimizer):
        check(args)


def complete_flags(args: argparse.Namespace) -> argparse.Namespace:
    """The arguments with defaults that depend on others, and the actor's architecture.

    Adds `actor_shape`, `critic_shape`, `reward_shape`, `reference_shape` (None where there is no
    such model). Raises `FlagError`.
    """
    uses_critic = args.advantage_estimator == "gae"
    args.uses_critic = uses_critic
    args.uses_reference = args.ppo_kl_coef != 0
    args.reference_model = args.reference_model or args.actor_model
    args.critic_model = args.critic_model or args.reward_model or args.actor_model
    args.actor_shape = _shape("actor_model", args.actor_model, "language")
    args.reference_shape = (
        _shape("reference_model", args.reference_model, "language") if args.uses_reference else None
    )
    args.critic_shape = args.reward_shape = None
    if uses_critic:
        args.critic_shape = _shape("critic_model", args.critic_model, "scalar")
    if args.reward_model:
        args.reward_shape = _shape("reward_model", args.reward_model, "scalar")
    _check_against_folder(args)
    _check_vocabularies(args)
    _inherit(args)
    _check_layouts(args)
    _check_batches(args)
    _complete_lengths(args)
    try:
        return apply_shape(
            args,
            args.actor_shape,
            args.tensor_model_parallel_size,
            args.pipeline_model_parallel_size,
        )
    except ValueError as fault:
        raise FlagError(f"--actor-model: {fault}") from fault


def _check_required(args: argparse.Namespace) -> None:
    for name, remedy in (
        ("actor_model", "name the Hugging Face folder of the policy"),
        ("prompt_data", "name one or more JSON-lines files of prompts"),
        ("rollout_batch_size", "give the number of samples of an iteration"),
        ("global_batch_size", "give the number of samples of one optimizer step"),
        ("micro_batch_size", "give the number of samples of one forward pass"),
        ("train_iters", "give the number of PPO iterations"),
        ("lr", "give the actor's learning rate"),
    ):
        if not getattr(args, name):
            raise FlagError(f"{flag(name)} is missing: {remedy}")
    if not (args.reward_model or args.reward_function):
        raise FlagError("--reward-model or --reward-function is missing: give one, or both")
    if args.reward_function and args.reward_function.count(":") != 1:
        raise FlagError(
            f"--reward-function {args.reward_function}: write it as package.module:name"
        )


def _check_unsupported(args: argparse.Namespace) -> None:
    for name, (off, remedy) in _UNSUPPORTED.items():
        value = getattr(args, name, off)
        if value != off:
            raise FlagError(f"{flag(name)} {value} is not supported: {remedy}")
    if args.rerun_mode != "disabled":
        raise FlagError(f"--rerun-mode {args.rerun_mode} is not supported: leave it at disabled")
    if args.attention_dropout or args.hidden_dropout:
        raise FlagError(
            "--attention-dropout and --hidden-dropout must be 0: with dropout the policy that is "
            "trained is not the policy that made the samples"
        )


def _check_ranges(args: argparse.Namespace) -> None:
    def need(name: str, holds: Callable[[float], bool], remedy: str) -> None:
        value = getattr(args, name)
        if value is not None and not holds(value):
            raise FlagError(f"{flag(name)} {value}: {remedy}")

    for name in (
        "rollout_batch_size", "rollout_samples_per_prompt", "rollout_instances",
        "rollout_tensor_parallel_size", "rollout_max_prompt_tokens", "rollout_max_new_tokens",
        "rollout_max_num_seqs", "rollout_kv_cache_bytes", "ppo_epochs", "ppo_kl_horizon",
        "critic_tensor_model_parallel_size", "critic_pipeline_model_parallel_size",
        "critic_micro_batch_size", "rlhfuse_inference_tensor_parallel_size",
        "rlhfuse_inference_pipeline_parallel_size", "rlhfuse_inference_micro_batch_size",
    ):  # fmt: skip
        need(name, lambda value: value >= 1, "must be at least 1")
    for name in ("rlhfuse_stage_timeout", "rollout_start_timeout", "rollout_step_timeout"):
        need(name, lambda value: value > 0, "must be more than 0 seconds")
    need("rollout_temperature", lambda value: value > 0, "must be above 0: PPO needs a policy "
         "that samples; make it small for nearly greedy responses")  # fmt: skip
    need("rollout_top_p", lambda value: 0 < value <= 1, "must be in (0, 1]")
    need("rollout_top_k", lambda value: value >= 0, "must be 0 (off) or more")
    need("rollout_repetition_penalty", lambda value: value > 0, "must be above 0; 1 is off")
    need("rollout_gpu_memory_utilization", lambda value: 0 < value < 1, "must be in (0, 1)")
    need("ppo_clip", lambda value: 0 < value < 1, "must be in (0, 1)")
    need("ppo_clip_high", lambda value: value > 0, "must be above 0")
    need("ppo_dual_clip", lambda value: value > 1, "must be above 1 (3 is usual)")
    need("ppo_value_clip", lambda value: value >= 0, "must be 0 (off) or more")
    need("ppo_gamma", lambda value: 0 <= value <= 1, "must be in [0, 1]")
    need("ppo_lambda", lambda value: 0 <= value <= 1, "must be in [0, 1]")
    need("ppo_kl_coef", lambda value: value >= 0, "must be 0 (off) or more")
    need("ppo_kl_target", lambda value: value > 0, "must be above 0; leave it out for a constant")
    need("ppo_early_stop_kl", lambda value: value > 0, "must be above 0; leave it out for never")
    need("ppo_tis_cap", lambda value: value > 0, "must be above 0 (2 is usual)")
    need("ppo_reward_clip", lambda value: value > 0, "must be above 0; leave it out for none")
    if args.rollout_min_new_tokens > args.rollout_max_new_tokens:
        raise FlagError(
            f"--rollout-min-new-tokens {args.rollout_min_new_tokens} is above "
            f"--rollout-max-new-tokens {args.rollout_max_new_tokens}: lower the former"
        )


def _check_ppo(args: argparse.Namespace) -> None:
    estimator = args.advantage_estimator
    if estimator in ("grpo", "rloo") and args.rollout_samples_per_prompt < 2:
        raise FlagError(
            f"--advantage-estimator {estimator} compares the responses to one prompt: give "
            "--rollout-samples-per-prompt of 2 or more"
        )
    if args.ppo_kl_placement == "loss" and args.ppo_kl_estimator == "k1":
        raise FlagError(
            "--ppo-kl-estimator k1 has no gradient on average, so it does nothing with "
            "--ppo-kl-placement loss: use k2, whose gradient is that of the KL, or k3"
        )
    if args.ppo_kl_target is not None and args.ppo_kl_coef == 0:
        raise FlagError("--ppo-kl-target adapts --ppo-kl-coef, which is 0: give it a start value")
    if estimator != "gae":
        for name in ("critic_model", "critic_lr", "critic_tensor_model_parallel_size",
                     "critic_pipeline_model_parallel_size", "critic_micro_batch_size"):  # fmt: skip
            if getattr(args, name) is not None:
                raise FlagError(
                    f"{flag(name)} has no effect with --advantage-estimator {estimator}, which "
                    "has no critic: leave it out, or use gae"
                )
    if args.critic_warmup_iters and estimator != "gae":
        raise FlagError("--critic-warmup-iters needs a critic: use --advantage-estimator gae")
    if args.rollout_batch_size % args.rollout_samples_per_prompt:
        raise FlagError(
            f"--rollout-batch-size {args.rollout_batch_size} is no multiple of "
            f"--rollout-samples-per-prompt {args.rollout_samples_per_prompt}"
        )


def _check_optimizer(args: argparse.Namespace) -> None:
    if args.use_distributed_optimizer and not compat.has_fused_optimizer():
        raise FlagError(
            "--use-distributed-optimizer needs apex or Transformer Engine: with torch's Adam its "
            "state cannot be resumed exactly. Install one of them, or leave the flag out"
        )
    if not platform.has_cuda() and args.fp16:
        raise FlagError("--fp16 needs a GPU: train in float32 (no flag) or --bf16 on CPU")


def _shape(name: str, folder: str, head: Head) -> ModelShape:
    try:
        return read_shape(folder, head)
    except (ValueError, OSError) as fault:
        raise FlagError(f"{flag(name)}: {fault}") from fault


def _check_against_folder(args: argparse.Namespace) -> None:
    for name in _FROM_FOLDER:
        given = getattr(args, name)
        if given is not None:
            raise FlagError(
                f"{flag(name)} {given}: the architecture comes from the folder "
                f"{args.actor_model}; leave the flag out"
            )


def _check_vocabularies(args: argparse.Namespace) -> None:
    for name in ("reference", "critic", "reward"):
        shape = getattr(args, f"{name}_shape")
        if shape is not None and shape.vocab_size != args.actor_shape.vocab_size:
            raise FlagError(
                f"--{name}-model has a vocabulary of {shape.vocab_size} tokens, --actor-model one "
                f"of {args.actor_shape.vocab_size}: all models must share one tokenizer"
            )


def _inherit(args: argparse.Namespace) -> None:
    """Flags that default to another flag's value."""
    for name, source in (
        ("critic_tensor_model_parallel_size", "tensor_model_parallel_size"),
        ("critic_pipeline_model_parallel_size", "pipeline_model_parallel_size"),
        ("critic_micro_batch_size", "micro_batch_size"),
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
    if platform.has_cuda() and args.rollout_tensor_parallel_size > block:
        raise FlagError(
            f"--rollout-tensor-parallel-size {args.rollout_tensor_parallel_size} needs more than "
            f"the {block} GPU(s) of an instance: lower it or --rollout-instances"
        )


def _check_batches(args: argparse.Namespace) -> None:
    if args.rollout_batch_size % args.global_batch_size:
        raise FlagError(
            f"--rollout-batch-size {args.rollout_batch_size} is no multiple of "
            f"--global-batch-size {args.global_batch_size}: an epoch is a whole number of steps"
        )
    models = [("", args.tensor_model_parallel_size, args.pipeline_model_parallel_size)]
    if args.uses_critic:
        models.append(
            (
                "critic-",
                args.critic_tensor_model_parallel_size,
                args.critic_pipeline_model_parallel_size,
            )
        )
    for prefix, tensor, pipeline in models:
        replicas = args.world_size // (tensor * pipeline)
        micro = args.critic_micro_batch_size if prefix else args.micro_batch_size
        if args.global_batch_size % (micro * replicas):
            raise FlagError(
                f"--global-batch-size {args.global_batch_size} is no multiple of "
                f"--{prefix}micro-batch-size {micro} x {replicas} data-parallel replica(s)"
            )


def _complete_lengths(args: argparse.Namespace) -> None:
    longest = args.rollout_max_prompt_tokens + args.rollout_max_new_tokens
    for name in ("actor", "reference", "critic", "reward"):
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
    for name in ("actor", "critic", "reward", "reference"):
        folder = getattr(args, f"{name}_model")
        if folder:
            setattr(args, f"{name}_model", str(Path(folder).resolve()))
