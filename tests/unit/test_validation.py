"""Flags: what is refused, and how; what follows from what.

Most tests go through the program's own parser in this process; Megatron's checks and its globals
come after ours and are left out. One runs the program itself.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.plan import make_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import parse_problem
from tests.unit.conftest import Parse, refusal

ROOT = Path(__file__).resolve().parents[2]

GROUPS = ("rlhfuse", "rlhfuse models", "rollout", "critic", "ppo")

TOKENS = "--micro-batch-size - --micro-batch-tokens"
"""In the place of samples."""

# What is given, and what the refusal must say: the flag at fault, and the remedy.
REFUSED: list[tuple[str, str, str]] = [
    ("--actor-model -", "--actor-model is missing", "Hugging Face folder"),
    ("--prompt-data -", "--prompt-data is missing", "JSON-lines"),
    ("--rollout-batch-size -", "--rollout-batch-size is missing", "samples of an iteration"),
    ("--global-batch-size -", "--global-batch-size is missing", "one optimizer step"),
    (
        "--micro-batch-size -",
        "--micro-batch-size or --micro-batch-tokens is missing",
        "one forward pass",
    ),
    ("--train-iters -", "--train-iters is missing", "PPO iterations"),
    ("--lr -", "--lr is missing", "learning rate"),
    ("--reward-model -", "--reward-model or --reward-function is missing", "give one, or both"),
    # numbers out of range
    ("--train-iters 0", "--train-iters 0", "at least 1"),
    ("--global-batch-size -8", "--global-batch-size -8", "at least 1"),
    ("--seed 0", "--seed 0", "at least 1"),
    ("--rollout-instances 0", "--rollout-instances 0", "at least 1"),
    ("--critic-micro-batch-size 0", "--critic-micro-batch-size 0", "at least 1"),
    (f"{TOKENS} 0", "--micro-batch-tokens 0", "at least 1"),
    (f"{TOKENS} -128", "--micro-batch-tokens -128", "at least 1"),
    (
        f"{TOKENS} 256 --critic-micro-batch-tokens 0",
        "--critic-micro-batch-tokens 0",
        "at least 1",
    ),
    ("--pipeline-model-parallel-size 0", "--pipeline-model-parallel-size 0", "at least 1"),
    ("--save {}/c --save-interval 0", "--save-interval 0", "at least 1"),
    ("--rlhfuse-stage-timeout 0", "--rlhfuse-stage-timeout 0.0", "more than 0 seconds"),
    ("--lr 0", "--lr 0.0", "above 0"),
    ("--lr nan", "--lr nan", "above 0"),
    ("--critic-lr -1", "--critic-lr -1.0", "above 0"),
    ("--critic-warmup-iters -1", "--critic-warmup-iters -1", "0 or more"),
    ("--clip-grad -1", "--clip-grad -1.0", "0 or more"),
    ("--rollout-min-new-tokens -1", "--rollout-min-new-tokens -1", "0 or more"),
    ("--rollout-min-new-tokens 65", "--rollout-min-new-tokens 65", "lower the former"),
    ("--rollout-temperature 0", "--rollout-temperature 0.0", "must be in [0.01, 2]"),
    ("--rollout-temperature 2.5", "--rollout-temperature 2.5", "must be in [0.01, 2]"),
    ("--rollout-top-p 0", "--rollout-top-p 0.0", "(0, 1]"),
    ("--rollout-top-k -1", "--rollout-top-k -1", "0 (off) or more"),
    ("--rollout-repetition-penalty 0", "--rollout-repetition-penalty 0.0", "1 is off"),
    ("--rollout-presence-penalty 3", "--rollout-presence-penalty 3.0", "[-2, 2]"),
    ("--rollout-gpu-memory-utilization 1", "--rollout-gpu-memory-utilization 1.0", "(0, 1)"),
    ("--rollout-dtype int4", "--rollout-dtype int4", "float32, bfloat16, float16"),
    ("--ppo-clip 1", "--ppo-clip 1.0", "(0, 1)"),
    ("--ppo-clip-high 0", "--ppo-clip-high 0.0", "above 0"),
    ("--ppo-dual-clip 1", "--ppo-dual-clip 1.0", "3 is usual"),
    ("--ppo-value-clip -1", "--ppo-value-clip -1.0", "0 (off)"),
    ("--ppo-entropy-coef inf", "--ppo-entropy-coef inf", "finite"),
    ("--ppo-gamma 1.1", "--ppo-gamma 1.1", "[0, 1]"),
    ("--ppo-lambda -1", "--ppo-lambda -1.0", "[0, 1]"),
    ("--ppo-kl-coef -1", "--ppo-kl-coef -1.0", "0 (off)"),
    ("--ppo-kl-target 0", "--ppo-kl-target 0.0", "leave it out"),
    ("--ppo-early-stop-kl 0", "--ppo-early-stop-kl 0.0", "leave it out"),
    ("--ppo-tis-cap 0", "--ppo-tis-cap 0.0", "2 is usual"),
    ("--ppo-reward-clip 0", "--ppo-reward-clip 0.0", "leave it out"),
    ("--ppo-missing-eos-penalty -1", "--ppo-missing-eos-penalty -1.0", "0 (off)"),
    # the algorithm
    ("--advantage-estimator grpo", "--advantage-estimator grpo", "--rollout-samples-per-prompt"),
    ("--advantage-estimator rloo", "--advantage-estimator rloo", "--rollout-samples-per-prompt"),
    ("--advantage-estimator reinforce++ --critic-lr 1", "--critic-lr has no effect", "use gae"),
    ("--advantage-estimator reinforce++ --critic-min-lr 1", "--critic-min-lr", "use gae"),
    ("--advantage-estimator reinforce++ --critic-warmup-iters 1", "--critic-warmup-iters", "gae"),
    ("--critic-warmup-iters 4", "--critic-warmup-iters 4", "lower it"),
    ("--rollout-samples-per-prompt 3", "--rollout-samples-per-prompt 3", "equally many"),
    ("--ppo-kl-placement loss --ppo-kl-estimator k1", "--ppo-kl-estimator k1", "use k2"),
    ("--ppo-kl-coef 0 --ppo-kl-target 1", "--ppo-kl-target", "a start value"),
    ("--ppo-kl-coef 0 --reference-model {}/actor", "--reference-model", "leave it out"),
    ("--ppo-kl-target 1 --ppo-kl-horizon 3", "--ppo-kl-horizon 3", "above a fifth"),
    # tokens of a micro-batch
    (
        "--micro-batch-tokens 256",
        "--micro-batch-size and --micro-batch-tokens: give one",
        "so many samples or so many tokens",
    ),
    (
        f"{TOKENS} 256 --critic-micro-batch-size 2",
        "--critic-micro-batch-size and --micro-batch-tokens: give one",
        "so many samples or so many tokens",
    ),
    (
        "--critic-micro-batch-tokens 256",
        "--critic-micro-batch-tokens needs --micro-batch-tokens",
        "both models count samples or both count tokens",
    ),
    (
        f"{TOKENS} 256 --rlhfuse-dispatch in-order",
        "--rlhfuse-dispatch in-order needs --micro-batch-size",
        "equally many micro-batches",
    ),
    (
        f"{TOKENS} 256 --rlhfuse-fusion intra --rlhfuse-plan p.json",
        "--rlhfuse-plan needs --micro-batch-size",
        "a plan is of one number",
    ),
    (
        f"{TOKENS} 256 --critic-micro-batch-tokens 256 --advantage-estimator reinforce++",
        "--critic-micro-batch-tokens has no effect",
        "leave it out",
    ),
    (
        f"{TOKENS} 127",
        "--micro-batch-tokens 127 is below --rollout-max-prompt-tokens + --rollout-max-new-tokens "
        "= 128",
        "at least one sample",
    ),
    (
        f"{TOKENS} 256 --critic-micro-batch-tokens 127",
        "--critic-micro-batch-tokens 127 is below",
        "at least one sample",
    ),
    # fusion
    (
        "--rlhfuse-fusion intra --advantage-estimator grpo --rollout-samples-per-prompt 4",
        "--rlhfuse-fusion intra trains actor and critic at once",
        "use --rlhfuse-fusion none",
    ),
    (
        "--rlhfuse-fusion both --advantage-estimator reinforce++ --rlhfuse-plan p.json",
        "--rlhfuse-plan has no effect with --advantage-estimator reinforce++",
        "leave it out",
    ),
    ("--rlhfuse-fusion none --rlhfuse-plan p.json", "--rlhfuse-plan has no effect", "intra"),
    ("--rlhfuse-fusion none --rlhfuse-plan-cache none", "--rlhfuse-plan-cache has no", "intra"),
    (
        "--rlhfuse-fusion inter --rlhfuse-activation-memory-gib 1",
        "--rlhfuse-activation-memory-gib has no effect",
        "--rlhfuse-fusion intra",
    ),
    ("--rlhfuse-plan-seconds -1", "--rlhfuse-plan-seconds -1.0", "0 (keep the first plan)"),
    ("--rlhfuse-plan-seconds nan", "--rlhfuse-plan-seconds nan", "0 (keep the first plan)"),
    ("--rlhfuse-plan-seconds inf", "--rlhfuse-plan-seconds inf", "0 (keep the first plan)"),
    (
        "--rlhfuse-fusion intra --rlhfuse-activation-memory-gib 0",
        "--rlhfuse-activation-memory-gib 0.0",
        "above 0",
    ),
    # precision, optimizer, schedules
    ("--rollout-temperature 0.001", "--rollout-temperature 0.001", "must be in [0.01, 2]"),
    ("--fp16", "--fp16", "--bf16"),
    ("--optimizer sgd", "--optimizer sgd", "use adam"),
    ("--exit-signal-handler-for-training", "--exit-signal-handler-for", "--exit-signal-handler"),
    ("--glu-linear-offset 1.0", "--glu-linear-offset", "--actor-model"),
    ("--use-distributed-optimizer", "--use-distributed-optimizer", "leave the flag out"),
    ("--use-precision-aware-optimizer", "--use-precision-aware-optimizer", "give both"),
    ("--min-lr 1e-3", "--min-lr 0.001 is above --lr 0.0001", "lower it"),
    ("--min-lr 1e-5 --critic-lr 1e-6", "--critic-min-lr 1e-05 is above --critic-lr", "lower it"),
    ("--lr-warmup-init 1", "--lr-warmup-init 1.0 is above --lr", "lower it"),
    ("--lr-warmup-iters 4", "--lr-warmup-iters 4", "--lr-decay-iters"),
    ("--critic-lr-warmup-iters 9", "--critic-lr-warmup-iters 9", "--lr-decay-iters"),
    ("--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0", "[0, 1)"),
    ("--lr-warmup-fraction .1 --lr-warmup-iters 1", "--lr-warmup-fraction", "give one of them"),
    (
        "--lr-warmup-fraction .1 --critic-lr-warmup-iters 1",
        "--critic-lr-warmup-iters exclude each other",
        "give one of them",
    ),
    ("--lr-decay-style WSD", "--lr-decay-style WSD", "--lr-wsd-decay-iters"),
    ("--weight-decay-incr-style linear", "--weight-decay-incr-style", "--start-weight-decay"),
    ("--start-weight-decay 1", "--start-weight-decay", "--weight-decay-incr-style"),
    (
        "--weight-decay-incr-style linear --critic-weight-decay 1",
        "--critic-weight-decay",
        "leave it out",
    ),
    (
        "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
        "--override-opt-param-scheduler",
        "give one of them",
    ),
    # folders
    ("--actor-model {}/nowhere", "--actor-model: ", "no config.json"),
    ("--actor-model {}/gpt", "--actor-model: ", "supported are llama, qwen2, qwen3"),
    ("--actor-model {}/reward", "--actor-model: ", "a language model"),
    ("--critic-model {}/nowhere", "--critic-model: ", "no config.json"),
    ("--reference-model {}/nowhere", "--reference-model: ", "no config.json"),
    ("--reward-model {}/nowhere", "--reward-model: ", "no config.json"),
    ("--reward-model {}/actor", "--reward-model", "sequence classifier with one label"),
    ("--critic-model {}/other-words", "--critic-model has a vocabulary of 99", "one tokenizer"),
    ("--actor-model {}/short", "positions of --actor-model", "lower one of them"),
    ("--seq-length 100", "--seq-length 100", "leave it out"),
    ("--rollout-stop-token-ids 5 100", "--rollout-stop-token-ids 100", "tokens 0 to 99"),
    ("--rollout-tensor-parallel-size 3", "--rollout-tensor-parallel-size 3", "lower it"),
    ("--reward-function nothing", "--reward-function nothing", "package.module:name"),
    ("--reward-function :f", "--reward-function :f", "package.module:name"),
    ("--reward-function no_such.mod:f", "--reward-function no_such.mod:f", "PYTHONPATH"),
    ("--reward-function json:nothing", "--reward-function json:nothing", "no function 'nothing'"),
    ("--load {}/nowhere", "--load", "leave the flag out to start from --actor-model"),
    ("--save {}/file/sub", "--save", "no folder can be made or written"),
    ("--rlhfuse-run-dir {}/file", "--rlhfuse-run-dir", "no folder can be made or written"),
    ("--save-hf {}", "--save-hf", "choose another folder"),
    ("--save-interval 2", "--save-interval 2", "without --save"),
    ("--save-retain-interval 2", "--save-retain-interval 2", "without --save"),
    (
        "--save {}/c --save-interval 2 --save-retain-interval 3",
        "--save-retain-interval 3",
        "--save-interval 2",
    ),
    ("--rlhfuse-auto-resume", "--rlhfuse-auto-resume", "without --save"),
    ("--wandb-project p", "--wandb-project p", "install it"),
    # layouts
    ("--tensor-model-parallel-size 2", "--tensor-model-parallel-size", "torchrun"),
    ("--critic-pipeline-model-parallel-size 2", "--critic-pipeline-model", "torchrun"),
    ("--rlhfuse-inference-pipeline-parallel-size 3", "--rlhfuse-inference-pipe", "torchrun"),
    ("--rollout-instances 2", "--rollout-instances 2", "equal block"),
    ("--global-batch-size 6", "--rollout-batch-size 16", "whole number of steps"),
    ("--micro-batch-size 3", "--micro-batch-size 3", "change one of them"),
    ("--critic-micro-batch-size 3", "--critic-micro-batch-size 3", "change one of them"),
    # Megatron's own
    ("--attention-dropout 0.1", "--attention-dropout", "must be 0"),
    ("--transformer-impl transformer_engine", "needs Transformer Engine", "local"),
    ("--transformer-impl inference_optimized", "--transformer-impl", "or local"),
    ("--num-layers 4", "--num-layers 4", "comes from --actor-model; leave it out"),
    ("--softmax-type learnable", "--softmax-type learnable", "leave it out"),
    ("--apply-layernorm-1p", "--apply-layernorm-1p", "leave it out"),
    ("--sequence-parallel", "--sequence-parallel is not supported", "any length"),
    ("--calculate-per-token-loss", "--calculate-per-token-loss", "--ppo-loss-aggregation"),
    ("--overlap-param-gather", "--overlap-param-gather", "not gathered yet"),
    ("--finetune", "--finetune", "--save-hf"),
    ("--pretrained-checkpoint {}", "--pretrained-checkpoint", "--actor-model"),
    ("--checkpoint-activations", "--checkpoint-activations", "--recompute-activations"),
    ("--ckpt-format torch", "--ckpt-format torch", "torch_dist"),
    ("--rerun-mode validate_results", "--rerun-mode validate_results", "disabled"),
    ("--context-parallel-size 2", "--context-parallel-size 2", "leave it at 1"),
    ("--fp8-format e4m3", "--fp8-format e4m3", "--bf16"),
    ("--data-path x", "--data-path", "--prompt-data"),
    ("--adlr-autoresume", "--adlr-autoresume", "--rlhfuse-auto-resume"),
    ("--attention-backend local", "--attention-backend local", "leave it out"),
    ("--bf16 --fp32-residual-connection", "--fp32-residual-connection", "leave it out"),
    ("--main-grads-dtype bf16", "--main-grads-dtype bf16", "leave it at fp32"),
    ("--exit-interval 0", "--exit-interval 0", "at least 1"),
    ("--exit-duration-in-mins -1", "--exit-duration-in-mins -1", "not be less than 0"),
    ("--exit-signal-handler --exit-signal SIGKILL", "--exit-signal SIGKILL", "no program"),
]

# The same for a job of several processes.
REFUSED_WIDE: list[tuple[int, str, str, str]] = [
    (4, "--tensor-model-parallel-size 3", "--tensor-model-parallel-size", "torchrun"),
    (
        4,
        "--pipeline-model-parallel-size 4",
        "--pipeline-model-parallel-size 4 does not divide the 6 layers",
        "actor",
    ),
    (
        8,
        "--tensor-model-parallel-size 8 --rlhfuse-inference-tensor-parallel-size 1",
        "--tensor-model-parallel-size 8 does not divide the 4 key-value heads",
        "actor",
    ),
    (
        2,
        "--critic-model {}/five-layers --critic-pipeline-model-parallel-size 2",
        "--critic-pipeline-model-parallel-size 2 does not divide the 5 layers",
        "five-layers",
    ),
    (
        2,
        "--reward-model {}/five-layers --critic-model {}/reward "
        "--rlhfuse-inference-pipeline-parallel-size 2",
        "--reward-model: --rlhfuse-inference-pipeline-parallel-size 2 does not divide",
        "five-layers",
    ),
    (3, "--rollout-instances 2", "--rollout-instances 2", "equal block"),
    (8, "", "--global-batch-size 8 is no multiple of --micro-batch-size 2 x 8", "change one"),
    (
        4,
        "--critic-micro-batch-size 4",
        "--critic-micro-batch-size 4 x 4 data-parallel",
        "change one",
    ),
    (
        3,
        f"{TOKENS} 256",
        "--global-batch-size 8 is no multiple of 3 data-parallel replicas",
        "change one",
    ),
    (
        6,
        f"{TOKENS} 256 --pipeline-model-parallel-size 3 --critic-pipeline-model-parallel-size 1",
        "--global-batch-size 8 is no multiple of 6 critic data-parallel replicas",
        "change one",
    ),
    (
        4,
        "--rlhfuse-fusion intra --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
        "--critic-tensor-model-parallel-size 1 --critic-pipeline-model-parallel-size 4",
        "--critic-tensor-model-parallel-size 1 and --critic-pipeline-model-parallel-size 4 do not",
        "choose others, or --rlhfuse-fusion none",
    ),
    (
        6,
        "--rlhfuse-fusion intra --tensor-model-parallel-size 3",
        "actor.tp: want a power of two",
        "choose others, or --rlhfuse-fusion none",
    ),
    (
        6,
        "--rlhfuse-fusion both --critic-tensor-model-parallel-size 3",
        "critic.tp: want a power of two",
        "choose others, or --rlhfuse-fusion none",
    ),
]


@pytest.mark.parametrize(("flags", "fault", "remedy"), REFUSED)
def test_refusal_names_flag_and_remedy(parse: Parse, flags: str, fault: str, remedy: str) -> None:
    message = refusal(parse, flags)
    assert fault in message and remedy in message, message
    assert "\n" not in message


@pytest.mark.parametrize(("world", "flags", "fault", "remedy"), REFUSED_WIDE)
def test_refusal_of_layouts(parse: Parse, world: int, flags: str, fault: str, remedy: str) -> None:
    message = refusal(parse, flags, world)
    assert fault in message and remedy in message, message


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ""),
        (4, "--pipeline-model-parallel-size 2 --critic-tensor-model-parallel-size 2"),
        (2, "--tensor-model-parallel-size 2 --rlhfuse-inference-pipeline-parallel-size 1"),
        (1, "--advantage-estimator grpo --rollout-samples-per-prompt 4 --ppo-kl-coef 0"),
        (1, "--advantage-estimator reinforce++ --ppo-kl-placement loss"),
        (1, "--reward-model - --reward-function json:dumps"),
        (1, "--rlhfuse-fusion both --advantage-estimator grpo --rollout-samples-per-prompt 4"),
        (
            4,
            "--rlhfuse-fusion intra --tensor-model-parallel-size 2 "
            "--pipeline-model-parallel-size 2 --critic-tensor-model-parallel-size 1 "
            "--rlhfuse-plan-seconds 0 --rlhfuse-activation-memory-gib .5",
        ),
        (8, f"{TOKENS} 128 --critic-micro-batch-tokens 1000"),  # a sample a replica
        (1, f"{TOKENS} 256 --advantage-estimator reinforce++"),
        (4, f"{TOKENS} 256 --rlhfuse-fusion intra --pipeline-model-parallel-size 2"),
        (1, "--rlhfuse-pack-sequences --rlhfuse-dispatch in-order"),
        (1, f"--rlhfuse-pack-sequences {TOKENS} 256"),
        (1, "--critic-model {}/actor"),  # a critic may start from a language model
        (1, "--reference-model {}/actor --ppo-kl-target 1 --ppo-kl-horizon 100"),
        (1, "--bf16 --overlap-grad-reduce --recompute-activations"),
        (1, "--save {}/new/folder --save-hf {}/models --save-interval 2"),
        (1, "--lr-decay-style WSD --lr-wsd-decay-iters 2 --lr-warmup-fraction 0.1"),
        (
            1,
            "--weight-decay-incr-style linear --start-weight-decay 0 --end-weight-decay 0.1",
        ),
    ],
)
def test_good_jobs_are_accepted(parse: Parse, world: int, flags: str) -> None:
    args = parse(flags, world)
    assert args.num_layers == 6 and args.seq_length == 128


def test_critic_and_inference_follow_the_actor(parse: Parse) -> None:
    args = parse(
        "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 --min-lr 1e-5 "
        "--lr-warmup-iters 2 --clip-grad 0.7 --weight-decay 0.3 --ppo-clip 0.3",
        world=4,
    )
    assert (args.critic_tensor_model_parallel_size, args.critic_pipeline_model_parallel_size) == (
        2,
        2,
    )
    assert args.critic_micro_batch_size == 2
    assert (args.critic_lr, args.critic_min_lr, args.critic_lr_warmup_iters) == (1e-4, 1e-5, 2)
    assert (args.critic_clip_grad, args.critic_weight_decay) == (0.7, 0.3)
    assert args.rlhfuse_inference_tensor_parallel_size == 2
    assert args.rlhfuse_inference_pipeline_parallel_size == 1
    assert args.ppo_clip_high == 0.3


def test_the_critic_counts_samples_or_tokens_as_the_actor_does(parse: Parse) -> None:
    samples = parse()
    assert (samples.micro_batch_tokens, samples.critic_micro_batch_tokens) == (None, None)
    assert (samples.micro_batch_size, samples.critic_micro_batch_size) == (2, 2)
    tokens = parse(f"{TOKENS} 256")
    assert (tokens.micro_batch_tokens, tokens.critic_micro_batch_tokens) == (256, 256)
    apart = parse(f"{TOKENS} 256 --critic-micro-batch-tokens 512")
    assert (apart.micro_batch_tokens, apart.critic_micro_batch_tokens) == (256, 512)


def test_megatron_is_told_of_a_sample_where_tokens_are_counted(parse: Parse) -> None:
    """Its own checks want that number, and want it to divide the global batch."""
    args = parse(f"{TOKENS} 256", world=8)
    assert (args.micro_batch_size, args.critic_micro_batch_size) == (1, None)  # Megatron's


def test_sequences_are_packed_where_that_is_asked_for(parse: Parse) -> None:
    assert parse().rlhfuse_pack_sequences is False
    assert parse("--rlhfuse-pack-sequences").rlhfuse_pack_sequences is True
    assert parse("--no-rlhfuse-pack-sequences").rlhfuse_pack_sequences is False


def test_what_is_given_is_kept(parse: Parse) -> None:
    args = parse(
        "--critic-lr 2e-4 --critic-min-lr 0 --critic-micro-batch-size 4 --critic-clip-grad 0 "
        "--critic-weight-decay 0 --ppo-clip-high 0.4 --rollout-instances 1 --min-lr 1e-5",
        world=2,
    )
    assert (args.critic_lr, args.critic_min_lr) == (2e-4, 0.0)
    assert (args.critic_clip_grad, args.critic_weight_decay) == (0.0, 0.0)
    assert args.critic_micro_batch_size == 4 and args.ppo_clip_high == 0.4
    assert args.rollout_instances == 1


def test_models_that_are_not_given_follow(parse: Parse, folders: Path) -> None:
    args = parse()
    assert args.reference_model == args.actor_model == str(folders / "actor")
    assert args.critic_model == str(folders / "reward")
    assert args.critic_shape.head == args.reward_shape.head == "scalar"
    alone = parse("--reward-model - --reward-function json:dumps")
    assert alone.critic_model == str(folders / "actor")
    assert alone.reward_shape is None and alone.critic_shape.head == "scalar"
    plain = parse("--advantage-estimator reinforce++ --ppo-kl-coef 0")
    assert plain.critic_shape is None and plain.reference_shape is None


@pytest.mark.parametrize(
    ("flags", "estimator"),
    [
        ("", "k1"),
        ("--ppo-kl-placement loss", "k3"),
        ("--ppo-kl-placement loss --ppo-kl-estimator k2", "k2"),
        ("--ppo-kl-estimator k2", "k2"),
    ],
)
def test_the_kl_estimator_follows_its_placement(parse: Parse, flags: str, estimator: str) -> None:
    assert parse(flags).ppo_kl_estimator == estimator


@pytest.mark.parametrize(
    ("flags", "fuses"),
    [
        ("", False),  # no pipeline, no bubbles
        ("--rlhfuse-fusion none", False),
        ("--rlhfuse-fusion inter", False),
        ("--rlhfuse-fusion intra", True),
        ("--rlhfuse-fusion both", True),
        ("--rlhfuse-fusion both --advantage-estimator reinforce++", False),
    ],
)
def test_training_is_fused_where_there_is_a_critic(parse: Parse, flags: str, fuses: bool) -> None:
    args = parse(flags)
    assert args.fuses_training is fuses
    assert (args.rlhfuse_plan, args.rlhfuse_plan_cache) == (None, None)
    assert (args.rlhfuse_plan_seconds, args.rlhfuse_activation_memory_gib) == (10.0, None)


@pytest.mark.parametrize(
    ("flags", "training"),
    [
        ("--pipeline-model-parallel-size 2", True),
        ("--pipeline-model-parallel-size 2 --advantage-estimator reinforce++", False),
        ("--pipeline-model-parallel-size 2 --critic-pipeline-model-parallel-size 1", True),
        # No fused pipeline has room for both, as the refusal of --rlhfuse-fusion intra says.
        (
            "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
            "--critic-tensor-model-parallel-size 4 --critic-pipeline-model-parallel-size 1",
            False,
        ),
    ],
)
def test_by_default_everything_is_fused_that_can_be(
    parse: Parse, flags: str, training: bool
) -> None:
    args = parse(flags, world=4)
    assert args.fuses_rollout
    assert args.fuses_training is training


def test_the_critic_runs_opposite_to_the_actor_only_where_they_are_fused(parse: Parse) -> None:
    from megatron_rlhfuse.layouts import training_layouts

    sizes = "--pipeline-model-parallel-size 3"
    alone = training_layouts(parse(f"{sizes} --rlhfuse-fusion none", world=3))
    fused = training_layouts(parse(f"{sizes} --rlhfuse-fusion intra", world=3))
    assert alone[0] == alone[1] == fused[0]
    assert fused[1].ranks == (((2,), (1,), (0,)),)


def test_engines_fill_the_job(parse: Parse) -> None:
    assert parse(world=4).rollout_instances == 4
    assert parse("--rollout-tensor-parallel-size 2", world=4).rollout_instances == 2


def test_saving_without_an_interval_is_at_the_end(parse: Parse) -> None:
    assert parse("--save {}/checkpoints").save_interval == 4
    assert parse().save_interval is None


def test_every_flag_has_help(parser: argparse.ArgumentParser) -> None:
    groups = {group.title: group for group in parser._action_groups}
    for title in GROUPS:
        for action in groups[title]._group_actions:
            assert action.help and len(action.help) >= 5, action.option_strings


def test_refused_flags_exist(parser: argparse.ArgumentParser) -> None:
    """A refusal of a flag that is misspelt refuses nothing."""
    from megatron_rlhfuse.unsupported_flags import _ATTRIBUTES, _OFF, _UNSUPPORTED

    by_option = {option: action for action in parser._actions for option in action.option_strings}
    assert set(_UNSUPPORTED) <= set(by_option)
    assert set(_OFF) | set(_ATTRIBUTES) <= set(_UNSUPPORTED)
    for option in _UNSUPPORTED:
        attribute = _ATTRIBUTES.get(option, option[2:].replace("-", "_"))
        assert by_option[option].dest == attribute
        default = by_option[option].default
        assert default == _OFF[option] if option in _OFF else not default, option


def run_program(*flags: str, rank: str = "0") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "pretrain_rlhf.py", *flags],
        cwd=ROOT,
        env={**os.environ, "RANK": rank, "LOCAL_RANK": rank},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (("--rollout-top-p", "2"), "--actor-model is missing"),
        (("--ppo-cilp", "0.2"), "unrecognized arguments: --ppo-cilp"),
    ],
)
def test_the_program_ends_with_one_line(flags: tuple[str, ...], fault: str) -> None:
    ended = run_program(*flags)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert line.startswith("pretrain_rlhf.py: error: ") and fault in line
    assert ended.stdout == ""


def test_a_folder_with_checkpoints_is_not_written_over(parse: Parse, folders: Path) -> None:
    (folders / "iter_0000003").mkdir()
    (folders / "latest_checkpointed_iteration.txt").write_text("3\n")
    message = refusal(parse, "--save {}")
    assert f"--save {folders}" in message and f"--load {folders}" in message
    parse("--save {} --load {}")


def test_auto_resume_goes_on_from_what_was_saved(parse: Parse, folders: Path) -> None:
    flags = "--save {}/new --rlhfuse-auto-resume"
    assert parse(flags).load is None
    for name, iteration in (("new", 3), ("other", 2)):
        (folders / name / f"iter_{iteration:07d}").mkdir(parents=True)
    tracker = "latest_checkpointed_iteration.txt"
    (folders / "other" / tracker).write_text("2\n")
    # To begin with, another job's.
    assert parse(flags + " --load {}/other").load == str(folders / "other")
    (folders / "new" / tracker).write_text("3\n")
    assert parse(flags).load == str(folders / "new")
    assert parse(flags + " --load {}/other").load == str(folders / "new")


def test_ranks_that_are_started_again_must_be_able_to_go_on(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    message = refusal(parse, "--save {}/new")
    assert "--max-restarts 3" in message and "--rlhfuse-auto-resume" in message
    parse("--save {}/new --rlhfuse-auto-resume")
    parse()  # begins anew, with the same result


def test_one_rank_of_a_node_speaks() -> None:
    ended = run_program("--rollout-top-p", "2", rank="1")
    assert ended.returncode == 2 and ended.stderr == ""


def write_plan(path: Path, stages: int = 2, micro_batches: int = 4) -> dict[str, Any]:
    """Writes a plan of two models in opposite directions; returns what it wrote."""
    pipeline = list(range(stages))
    costs = {"micro_batches": micro_batches, "forward": 1, "backward": 2, "activation": 1}
    models = [{**costs, "pipelines": [pipeline]}, {**costs, "pipelines": [pipeline[::-1]]}]
    problem = parse_problem({"devices": stages, "models": models})
    timeline = evaluate(problem, one_f_one_b(problem))
    plan = plan_to_json(make_plan(timeline, greedy=timeline.makespan, seconds=0.0))
    path.write_text(json.dumps(plan))
    return plan


FUSED_WITH_PLAN = (
    "--rlhfuse-fusion intra --pipeline-model-parallel-size 2 "
    "--critic-pipeline-model-parallel-size 2 --rlhfuse-plan {}/plan.json"
)


def test_a_plan_for_the_job_is_accepted(parse: Parse, folders: Path) -> None:
    write_plan(folders / "plan.json")
    assert parse(FUSED_WITH_PLAN, 2).rlhfuse_plan == f"{folders}/plan.json"


def test_refusal_of_plans(parse: Parse, folders: Path) -> None:
    path = folders / "plan.json"
    assert "No such file" in refusal(parse, FUSED_WITH_PLAN, 2)
    write_plan(path, stages=4)
    assert "the plan is for 4 devices, this job has 2" in refusal(parse, FUSED_WITH_PLAN, 2)
    write_plan(path, micro_batches=3)
    assert "the plan has 3, actor runs 4 in a step" in refusal(parse, FUSED_WITH_PLAN, 2)
    plan = write_plan(path)
    row = plan["order"][0]
    forward, backward = row.index("a0F0"), row.index("a0B0")
    row[forward], row[backward] = row[backward], row[forward]
    path.write_text(json.dumps(plan))
    message = refusal(parse, FUSED_WITH_PLAN, 2)
    assert message.startswith(f"--rlhfuse-plan {path}: ") and "a deadlock: a0B0" in message
    path.write_text("{")
    assert "not JSON" in refusal(parse, FUSED_WITH_PLAN, 2)


def test_a_plan_need_not_be_on_other_ranks(parse: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron_rlhfuse import validation

    looked = []
    monkeypatch.setattr(validation, "load_plan", looked.append)
    args = argparse.Namespace(rlhfuse_plan="plan.json", rank=1)
    validation._check_plan(args)
    assert not looked
