"""Flags of Megatron that have no place in this program.

A flag that would be ignored is refused like one that would do harm: whoever gives it expects it
to do something.
"""

from __future__ import annotations

import argparse

from megatron_rlhfuse import compat
from megatron_rlhfuse.flag_error import FlagError

_FROM_FOLDER = "the architecture comes from --actor-model; leave it out"
_PROMPTS = "prompts come from --prompt-data"
_EQUAL_STAGES = "all stages hold equally many layers"
_OWN_ROLLOUT = "samples come from vLLM: see the --rollout-* flags"
_RESUME = "--load resumes from the latest checkpoint, with the flags it was started with"

# Flags of Megatron that must stay off, and what to do instead.
_UNSUPPORTED: dict[str, str] = {
    "--context-parallel-size": "leave it at 1",
    "--hybrid-context-parallel": "sequences are not split",
    "--expert-model-parallel-size": "only dense models are trained",
    "--expert-tensor-parallel-size": "only dense models are trained",
    "--num-experts": "only dense models are trained",
    "--num-layers-per-virtual-pipeline-stage": "interleaved pipelines are not built",
    "--num-virtual-stages-per-pipeline-rank": "interleaved pipelines are not built",
    "--decoder-first-pipeline-num-layers": _EQUAL_STAGES,
    "--decoder-last-pipeline-num-layers": _EQUAL_STAGES,
    "--pipeline-model-parallel-layout": _EQUAL_STAGES,
    "--account-for-embedding-in-pipeline-split": _EQUAL_STAGES,
    "--account-for-loss-in-pipeline-split": _EQUAL_STAGES,
    "--use-tp-pp-dp-mapping": "every model has a layout of its own",
    "--sequence-parallel": "it needs lengths that divide evenly; responses have any length",
    "--tp-comm-overlap": "it needs one fixed length; responses have any length",
    "--cuda-graph-impl": "graphs need one fixed length; responses have any length",
    "--enable-cuda-graph": "graphs need one fixed length; responses have any length",
    "--use-torch-fsdp2": "use Megatron's DDP and --use-distributed-optimizer",
    "--use-megatron-fsdp": "use Megatron's DDP and --use-distributed-optimizer",
    "--num-distributed-optimizer-instances": "leave it at 1",
    "--overlap-param-gather": "engines would get weights that are not gathered yet",
    "--calculate-per-token-loss": "use --ppo-loss-aggregation",
    "--distribute-saved-activations": "it would split the critic's like the actor's",
    "--decoupled-lr": "use --lr and --critic-lr",
    "--decoupled-min-lr": "use --min-lr and --critic-min-lr",
    "--freeze-all-layers": "actor and critic are trained whole",
    "--apply-query-key-layer-scaling": "it serves fp16; train in --bf16",
    "--fp16": "train in --bf16, which needs no loss scale",
    "--fp8-format": "train in --bf16",
    "--fp4-format": "train in --bf16",
    "--num-layers": _FROM_FOLDER,
    "--encoder-num-layers": _FROM_FOLDER,
    "--hidden-size": _FROM_FOLDER,
    "--ffn-hidden-size": _FROM_FOLDER,
    "--num-attention-heads": _FROM_FOLDER,
    "--kv-channels": _FROM_FOLDER,
    "--max-position-embeddings": _FROM_FOLDER,
    "--vocab-size": _FROM_FOLDER,
    "--apply-layernorm-1p": _FROM_FOLDER,
    "--apply-residual-connection-post-layernorm": _FROM_FOLDER,
    "--attention-output-gate": _FROM_FOLDER,
    "--experimental-attention-variant": _FROM_FOLDER,
    "--activation-func-clamp-value": _FROM_FOLDER,
    "--glu-linear-offset": _FROM_FOLDER,
    "--heterogeneous-layers-config-path": _FROM_FOLDER,
    "--hybrid-layer-pattern": _FROM_FOLDER,
    "--mtp-num-layers": _FROM_FOLDER,
    "--multi-latent-attention": _FROM_FOLDER,
    "--no-rope-freq": _FROM_FOLDER,
    "--openai-gelu": _FROM_FOLDER,
    "--qk-clip": _FROM_FOLDER,
    "--qk-l2-norm": _FROM_FOLDER,
    "--quick-geglu": _FROM_FOLDER,
    "--rotary-seq-len-interpolation-factor": _FROM_FOLDER,
    "--softmax-type": _FROM_FOLDER,
    "--spec": _FROM_FOLDER,
    "--squared-relu": _FROM_FOLDER,
    "--use-mup": _FROM_FOLDER,
    "--window-size": _FROM_FOLDER,
    "--tokenizer-type": "the tokenizer comes from --actor-model",
    "--tokenizer-model": "the tokenizer comes from --actor-model",
    "--vocab-file": "the tokenizer comes from --actor-model",
    "--data-path": _PROMPTS,
    "--train-data-path": _PROMPTS,
    "--data-args-path": _PROMPTS,
    "--per-split-data-args-path": _PROMPTS,
    "--mock-data": _PROMPTS,
    "--train-samples": "give the number of PPO iterations with --train-iters",
    "--rampup-batch-size": "the PPO mini-batch is constant: --global-batch-size",
    "--step-batch-size-schedule": "the PPO mini-batch is constant: --global-batch-size",
    "--lr-decay-samples": "use --lr-decay-iters, in PPO iterations",
    "--lr-warmup-samples": "use --lr-warmup-iters, in PPO iterations",
    "--lr-wsd-decay-samples": "use --lr-wsd-decay-iters, in PPO iterations",
    "--perform-rl-step": "this program is the RL step; see the --ppo-* flags",
    "--rl-use-sequence-packing": "use --rlhfuse-pack-sequences",
    "--rl-partial-rollouts": _OWN_ROLLOUT,
    "--rl-generation-lag": _OWN_ROLLOUT,
    "--rl-offload-optimizer-during-inference": _OWN_ROLLOUT,
    "--rl-persist-cuda-graphs": _OWN_ROLLOUT,
    "--rl-training-cuda-graphs": _OWN_ROLLOUT,
    "--rl-inference-logprobs-is-correction": "use --ppo-tis-cap",
    "--rl-importance-sampling-truncation-coef": "use --ppo-tis-cap",
    "--rl-inference-tensor-model-parallel-size": "use --rollout-tensor-parallel-size",
    "--skip-train": "every iteration trains",
    "--exit-signal-handler-for-training": "use --exit-signal-handler",
    "--adlr-autoresume": "use --rlhfuse-auto-resume",
    "--fake-process-group": "training needs real ones",
    "--lazy-mpu-init": "process groups are made at the start",
    "--use-sharp": "leave it out",
    "--checkpoint-activations": "use --recompute-activations or --recompute-granularity",
    "--rerun-mode": "leave it at disabled",
    "--yaml-cfg": "give flags",
    "--async-save": "checkpoints are written before the next iteration starts",
    "--ckpt-format": "leave it at torch_dist",
    "--ckpt-step": _RESUME,
    "--override-ckpt-iteration": _RESUME,
    "--use-checkpoint-args": _RESUME,
    "--pretrained-checkpoint": "models start from --actor-model and --critic-model",
    "--finetune": "start a new job from --actor-model with the folder that --save-hf wrote",
    "--no-save-optim": "checkpoints hold all that exact resuming needs",
    "--no-save-rng": "checkpoints hold all that exact resuming needs",
    "--non-persistent-ckpt-type": "checkpoints go to --save",
    "--non-persistent-save-interval": "checkpoints go to --save, every --save-interval iterations",
    "--tensorboard-dir": "its files go to --rlhfuse-run-dir",
}  # fmt: skip

# Of the flags above, those that are off at another value than None, False or 0.
_OFF: dict[str, object] = {
    "--context-parallel-size": 1,
    "--expert-model-parallel-size": 1,
    "--num-distributed-optimizer-instances": 1,
    "--cuda-graph-impl": "none",
    "--softmax-type": "vanilla",
    "--tokenizer-type": "NullTokenizer",
    "--rerun-mode": "disabled",
    "--ckpt-format": "torch_dist",
}

# Flags whose argument has another name.
_ATTRIBUTES = {
    "--apply-layernorm-1p": "layernorm_zero_centered_gamma",
    "--fp8-format": "fp8",
    "--fp4-format": "fp4",
}


def check_unsupported(args: argparse.Namespace) -> None:
    """Refuses them by name. Raises `FlagError`."""
    for option, remedy in _UNSUPPORTED.items():
        attribute = _ATTRIBUTES.get(option, option[2:].replace("-", "_"))
        value = getattr(args, attribute, None)
        off = _OFF.get(option)
        if (value != off) if off else value:
            given = option if value is True else f"{option} {value}"
            raise FlagError(f"{given} is not supported: {remedy}")
    if args.attention_dropout or args.hidden_dropout:
        raise FlagError(
            "--attention-dropout and --hidden-dropout must be 0: with dropout the policy that is "
            "trained is not the policy that made the samples"
        )
    if args.transformer_impl not in ("transformer_engine", "local"):
        raise FlagError(
            f"--transformer-impl {args.transformer_impl} is not supported: use transformer_engine "
            "or local"
        )
    if args.attention_backend.name == "local":
        raise FlagError(
            "--attention-backend local is not supported: leave it out; which layers are built is "
            "decided by --transformer-impl"
        )
    if args.fp32_residual_connection and args.transformer_impl == "local":
        raise FlagError(
            "--fp32-residual-connection needs --transformer-impl transformer_engine: leave it out"
        )
    if args.transformer_impl == "transformer_engine" and not compat.has_transformer_engine():
        raise FlagError(
            "--transformer-impl transformer_engine needs Transformer Engine: install it, or use "
            "--transformer-impl local"
        )
