"""What each flag may be, and which flags go together: the rules that read no file."""

from __future__ import annotations

import argparse
import importlib.util
import math
import re
from collections.abc import Callable

from megatron_rlhfuse import compat
from megatron_rlhfuse.flag_error import FlagError, flag
from megatron_rlhfuse.output_rules import check_output
from megatron_rlhfuse.unsupported_flags import check_unsupported

_FUNCTION_PATH = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_ENGINE_DTYPES = ("float32", "bfloat16", "float16")


def check_flags(args: argparse.Namespace) -> None:
    """Refuses what cannot run, before any file is read. Raises `FlagError`."""
    for check in (
        check_unsupported,
        _check_required,
        _check_ranges,
        _check_sampling,
        _check_micro_batches,
        _check_fusion,
        _check_migration,
        _check_estimator,
        _check_kl,
        _check_optimizer,
        check_output,
    ):
        check(args)


def _check_required(args: argparse.Namespace) -> None:
    for name, remedy in (
        ("actor_model", "name the Hugging Face folder of the policy"),
        ("prompt_data", "name one or more JSON-lines files of prompts"),
        ("rollout_batch_size", "give the number of samples of an iteration"),
        ("global_batch_size", "give the number of samples of one optimizer step"),
        ("train_iters", "give the number of PPO iterations"),
        ("lr", "give the actor's learning rate"),
    ):
        if getattr(args, name) is None:
            raise FlagError(f"{flag(name)} is missing: {remedy}")
    if args.micro_batch_size is None and args.micro_batch_tokens is None:
        raise FlagError(
            "--micro-batch-size or --micro-batch-tokens is missing: give the number of samples, or "
            "of tokens, of one forward pass"
        )
    if not (args.reward_model or args.reward_function):
        raise FlagError("--reward-model or --reward-function is missing: give one, or both")
    if args.reward_function and not _FUNCTION_PATH.fullmatch(args.reward_function):
        raise FlagError(
            f"--reward-function {args.reward_function}: write it as package.module:name"
        )


def _check_ranges(args: argparse.Namespace) -> None:
    for name in (
        "rollout_batch_size", "global_batch_size", "micro_batch_size", "micro_batch_tokens",
        "train_iters", "seed", "critic_micro_batch_tokens",
        "tensor_model_parallel_size", "pipeline_model_parallel_size",
        "rollout_samples_per_prompt", "rollout_instances",
        "rollout_tensor_parallel_size", "rollout_max_prompt_tokens", "rollout_max_new_tokens",
        "rollout_max_num_seqs", "rollout_kv_cache_bytes", "ppo_epochs", "ppo_kl_horizon",
        "critic_tensor_model_parallel_size", "critic_pipeline_model_parallel_size",
        "critic_micro_batch_size", "rlhfuse_inference_tensor_parallel_size",
        "rlhfuse_inference_pipeline_parallel_size", "rlhfuse_inference_micro_batch_size",
        "save_interval", "lr_decay_iters", "exit_interval", "save_retain_interval",
    ):  # fmt: skip
        _need(args, name, lambda value: value >= 1, "must be at least 1")
    for name in ("rlhfuse_stage_timeout", "rollout_start_timeout", "rollout_step_timeout"):
        _need(args, name, lambda value: value > 0, "must be more than 0 seconds")
    for name in (
        "rollout_min_new_tokens", "critic_warmup_iters", "lr_warmup_iters",
        "critic_lr_warmup_iters", "min_lr", "critic_min_lr", "clip_grad", "critic_clip_grad",
        "weight_decay", "critic_weight_decay",
    ):  # fmt: skip
        _need(args, name, lambda value: value >= 0, "must be 0 or more")
    for name in ("lr", "critic_lr"):
        _need(args, name, lambda value: value > 0, "must be above 0")
    _need(args, "ppo_clip", lambda value: 0 < value < 1, "must be in (0, 1)")
    _need(args, "ppo_clip_high", lambda value: value > 0, "must be above 0")
    _need(args, "ppo_dual_clip", lambda value: value > 1, "must be above 1 (3 is usual)")
    _need(args, "ppo_value_clip", lambda value: value >= 0, "must be 0 (off) or more")
    _need(args, "ppo_entropy_coef", math.isfinite, "must be a finite number; 0 is off")
    _need(args, "ppo_gamma", lambda value: 0 <= value <= 1, "must be in [0, 1]")
    _need(args, "ppo_lambda", lambda value: 0 <= value <= 1, "must be in [0, 1]")
    _need(args, "ppo_kl_coef", lambda value: value >= 0, "must be 0 (off) or more")
    for name in ("ppo_kl_target", "ppo_early_stop_kl", "ppo_reward_clip"):
        _need(args, name, lambda value: value > 0, "must be above 0; leave it out for none")
    _need(args, "ppo_tis_cap", lambda value: value > 0, "must be above 0 (2 is usual)")
    _need(args, "ppo_missing_eos_penalty", lambda value: value >= 0, "must be 0 (off) or more")


def _need(args: argparse.Namespace, name: str, holds: Callable[[float], bool], remedy: str) -> None:
    """A value that was given, or has a default, must hold; NaN holds nothing."""
    value = getattr(args, name)
    if value is not None and not holds(value):
        raise FlagError(f"{flag(name)} {value}: {remedy}")


def _check_sampling(args: argparse.Namespace) -> None:
    # vLLM raises a temperature below 0.01 to it, and the trainer would not know.
    _need(args, "rollout_temperature", lambda value: 0.01 <= value <= 2,
          "must be in [0.01, 2]: PPO needs a policy that samples")  # fmt: skip
    _need(args, "rollout_top_p", lambda value: 0 < value <= 1, "must be in (0, 1]; 1 is off")
    _need(args, "rollout_top_k", lambda value: value >= 0, "must be 0 (off) or more")
    _need(args, "rollout_repetition_penalty", lambda value: value > 0, "must be above 0; 1 is off")
    for name in ("rollout_presence_penalty", "rollout_frequency_penalty"):
        _need(args, name, lambda value: -2 <= value <= 2, "must be in [-2, 2]; 0 is off")
    _need(args, "rollout_gpu_memory_utilization", lambda value: 0 < value < 1, "must be in (0, 1)")
    if args.rollout_min_new_tokens > args.rollout_max_new_tokens:
        raise FlagError(
            f"--rollout-min-new-tokens {args.rollout_min_new_tokens} is above "
            f"--rollout-max-new-tokens {args.rollout_max_new_tokens}: lower the former"
        )
    if args.rollout_dtype not in (None, *_ENGINE_DTYPES):
        raise FlagError(
            f"--rollout-dtype {args.rollout_dtype}: choose one of {', '.join(_ENGINE_DTYPES)}"
        )
    if args.rollout_batch_size % args.rollout_samples_per_prompt:
        raise FlagError(
            f"--rollout-batch-size {args.rollout_batch_size} is no multiple of "
            f"--rollout-samples-per-prompt {args.rollout_samples_per_prompt}: every prompt gets "
            "equally many samples"
        )


def _check_micro_batches(args: argparse.Namespace) -> None:
    if args.micro_batch_tokens is None:
        if args.critic_micro_batch_tokens is not None:
            raise FlagError(
                "--critic-micro-batch-tokens needs --micro-batch-tokens: both models count samples "
                "or both count tokens"
            )
        return
    for given in ("micro_batch_size", "critic_micro_batch_size"):
        if getattr(args, given) is not None:
            raise FlagError(
                f"{flag(given)} and --micro-batch-tokens: give one, a micro-batch has so many "
                "samples or so many tokens"
            )
    if args.rlhfuse_dispatch == "in-order":
        raise FlagError(
            "--rlhfuse-dispatch in-order needs --micro-batch-size: with --micro-batch-tokens all "
            "replicas get equally many micro-batches only where samples are chosen for it"
        )
    if args.rlhfuse_plan is not None:
        raise FlagError(
            "--rlhfuse-plan needs --micro-batch-size: with --micro-batch-tokens the number of "
            "micro-batches follows the lengths of samples, and a plan is of one number"
        )


def _check_estimator(args: argparse.Namespace) -> None:
    estimator = args.advantage_estimator
    if estimator in ("grpo", "rloo") and args.rollout_samples_per_prompt < 2:
        raise FlagError(
            f"--advantage-estimator {estimator} compares the responses to one prompt: give "
            "--rollout-samples-per-prompt of 2 or more"
        )
    if estimator != "gae":
        for name, value in vars(args).items():
            if name.startswith("critic_") and value:
                raise FlagError(
                    f"{flag(name)} has no effect with --advantage-estimator {estimator}, which "
                    "has no critic: leave it out, or use gae"
                )
    if args.critic_warmup_iters >= args.train_iters:
        raise FlagError(
            f"--critic-warmup-iters {args.critic_warmup_iters} leaves none of the --train-iters "
            f"{args.train_iters} iterations to the actor: lower it"
        )


def _check_fusion(args: argparse.Namespace) -> None:
    if args.rlhfuse_fusion == "intra" and args.advantage_estimator != "gae":
        raise FlagError(
            f"--rlhfuse-fusion intra trains actor and critic at once, and --advantage-estimator "
            f"{args.advantage_estimator} has no critic: use --rlhfuse-fusion none"
        )
    for name in ("rlhfuse_plan", "rlhfuse_plan_cache", "rlhfuse_activation_memory_gib"):
        if getattr(args, name) is None:
            continue
        if args.rlhfuse_fusion in ("none", "inter"):
            raise FlagError(
                f"{flag(name)} has no effect without --rlhfuse-fusion intra: give it, or leave "
                f"{flag(name)} out"
            )
        if args.advantage_estimator != "gae":
            raise FlagError(
                f"{flag(name)} has no effect with --advantage-estimator "
                f"{args.advantage_estimator}, which has no critic to fuse with: leave it out"
            )
    if args.rlhfuse_plan is not None and args.rlhfuse_activation_memory_gib is not None:
        raise FlagError(
            "--rlhfuse-activation-memory-gib has no effect with --rlhfuse-plan, which is run as it "
            "is: give the limit to `rlhfuse plan`"
        )
    _need(args, "rlhfuse_plan_seconds", lambda value: 0 <= value < math.inf,
          "must be 0 (keep the first plan) or more seconds")  # fmt: skip
    _need(args, "rlhfuse_activation_memory_gib", lambda value: value > 0, "must be above 0")


def _check_migration(args: argparse.Namespace) -> None:
    designated = args.rlhfuse_migration_instances
    if bool(designated) != (args.rlhfuse_migration_policy == "inference"):
        raise FlagError(
            "--rlhfuse-migration-policy inference and --rlhfuse-migration-instances need each "
            "other: give both, or neither"
        )
    _need(args, "rlhfuse_migration_batch", lambda value: value >= 1, "must be at least 1")
    _need(args, "rollout_extra_prompts", lambda value: 0 <= value <= 4, "must be from 0 to 4")
    _need(args, "rollout_pace", lambda value: 0 <= value < math.inf, "must be 0 or more seconds")
    given = {
        "rlhfuse_migration_threshold": args.rlhfuse_migration_threshold is not None,
        "rlhfuse_migration_policy": args.rlhfuse_migration_policy != "busiest",
        "rlhfuse_migration_transfer": args.rlhfuse_migration_transfer != "auto",
        "rlhfuse_migration_relay": args.rlhfuse_migration_relay != "gloo",
        "rlhfuse_migration_batch": args.rlhfuse_migration_batch is not None,
        "rlhfuse_migration_rebalance": args.rlhfuse_migration_rebalance,
    }
    if args.rlhfuse_fusion in ("none", "intra"):
        for name, is_given in given.items():
            if is_given:
                raise FlagError(
                    f"{flag(name)} has no effect with --rlhfuse-fusion {args.rlhfuse_fusion}: "
                    "give inter or both, or leave it out"
                )
    if args.rlhfuse_migration_relay == "nixl" and importlib.util.find_spec("nixl") is None:
        raise FlagError(
            "--rlhfuse-migration-relay nixl needs the packages nixl and nixl-cu13 (nixl-cu12 with "
            "a torch for CUDA 12): install them, or use gloo"
        )


def _check_kl(args: argparse.Namespace) -> None:
    if args.ppo_kl_placement == "loss" and args.ppo_kl_estimator == "k1":
        raise FlagError(
            "--ppo-kl-estimator k1 has no gradient on average, so it does nothing with "
            "--ppo-kl-placement loss: use k2, whose gradient is that of the KL, or k3"
        )
    if args.ppo_kl_coef == 0:
        if args.ppo_kl_target is not None:
            raise FlagError(
                "--ppo-kl-target adapts --ppo-kl-coef, which is 0: give it a start value"
            )
        if args.reference_model is not None:
            raise FlagError(
                "--reference-model has no effect with --ppo-kl-coef 0: leave it out, or give a "
                "coefficient"
            )
    # The controller follows a relative error of at most 0.2 and must not reach zero with it.
    elif args.ppo_kl_target is not None and args.ppo_kl_horizon <= 0.2 * args.rollout_batch_size:
        raise FlagError(
            f"--ppo-kl-horizon {args.ppo_kl_horizon} is too short for --rollout-batch-size "
            f"{args.rollout_batch_size}: it must be above a fifth of it"
        )


def _check_optimizer(args: argparse.Namespace) -> None:
    if args.optimizer != "adam":
        raise FlagError(
            f"--optimizer {args.optimizer} is not supported: use adam; Megatron cannot resume a "
            "job with sgd, and others were not tested"
        )
    if args.use_distributed_optimizer and not compat.has_fused_optimizer():
        raise FlagError(
            "--use-distributed-optimizer needs apex or Transformer Engine: with torch's Adam its "
            "state cannot be resumed exactly. Install one of them, or leave the flag out"
        )
    if args.critic_weight_decay is not None and args.weight_decay_incr_style != "constant":
        raise FlagError(
            "--critic-weight-decay needs --weight-decay-incr-style constant: leave it out, then "
            "both models follow --start-weight-decay and --end-weight-decay"
        )
    if args.use_precision_aware_optimizer and not args.use_distributed_optimizer:
        raise FlagError(
            "--use-precision-aware-optimizer works with --use-distributed-optimizer only: give "
            "both, or neither"
        )
    for name in ("main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(args, name) != "fp32" and not args.use_precision_aware_optimizer:
            raise FlagError(
                f"{flag(name)} {getattr(args, name)} needs --use-precision-aware-optimizer: leave "
                "it at fp32"
            )


def check_schedules(args: argparse.Namespace) -> None:
    """Learning rates and weight decay of both models, once defaults are filled in."""
    fraction = args.lr_warmup_fraction
    decay = args.lr_decay_iters or args.train_iters
    for prefix in ("", "critic_") if args.uses_critic else ("",):
        rate, warmup = getattr(args, f"{prefix}lr"), getattr(args, f"{prefix}lr_warmup_iters")
        for name in (f"{prefix}min_lr", "lr_warmup_init"):
            if getattr(args, name) > rate:
                raise FlagError(
                    f"{flag(name)} {getattr(args, name)} is above {flag(prefix + 'lr')} {rate}: "
                    "lower it"
                )
        if warmup >= decay:
            raise FlagError(
                f"{flag(prefix + 'lr_warmup_iters')} {warmup} must be below the {decay} "
                "iterations of --lr-decay-iters (by default --train-iters)"
            )
        if warmup and fraction is not None:
            raise FlagError(
                f"--lr-warmup-fraction and {flag(prefix + 'lr_warmup_iters')} exclude each other: "
                "give one of them"
            )
    if fraction is not None and not 0 <= fraction < 1:
        raise FlagError(f"--lr-warmup-fraction {fraction}: must be in [0, 1)")
    if args.lr_decay_style == "WSD" and not 0 < (args.lr_wsd_decay_iters or 0) <= decay:
        raise FlagError(
            f"--lr-decay-style WSD needs --lr-wsd-decay-iters from 1 to {decay}: the iterations "
            "of its last phase"
        )
    _check_weight_decay(args)
    if args.override_opt_param_scheduler and args.use_checkpoint_opt_param_scheduler:
        raise FlagError(
            "--override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler exclude each "
            "other: give one of them"
        )


def _check_weight_decay(args: argparse.Namespace) -> None:
    ends = (args.start_weight_decay, args.end_weight_decay)
    if args.weight_decay_incr_style == "constant":
        if ends != (None, None):
            raise FlagError(
                "--start-weight-decay and --end-weight-decay need --weight-decay-incr-style "
                "linear or cosine; a constant one is --weight-decay"
            )
    elif None in ends or not 0 <= ends[0] <= ends[1]:
        raise FlagError(
            f"--weight-decay-incr-style {args.weight_decay_incr_style} needs --start-weight-decay "
            "and --end-weight-decay, the latter not below the former"
        )
