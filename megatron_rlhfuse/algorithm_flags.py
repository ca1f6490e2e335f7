"""The flags of the models and of the algorithm."""

from __future__ import annotations

import argparse


def add_models(parser: argparse.ArgumentParser) -> None:
    """Adds the group `rlhfuse models`."""
    group = parser.add_argument_group(
        "rlhfuse models", "Hugging Face folders (Llama, Qwen2, Qwen3 dense)"
    )
    add = group.add_argument
    add("--actor-model", metavar="DIR", help="the policy to train; its tokenizer reads the prompts")
    add(
        "--critic-model",
        metavar="DIR",
        help="initial critic (default: --reward-model, else --actor-model with a new value head)",
    )
    add("--reward-model", metavar="DIR", help="sequence-classification model with one label")
    add(
        "--reference-model",
        metavar="DIR",
        help="frozen policy of the KL term (default: --actor-model)",
    )
    add(
        "--reward-function",
        metavar="PACKAGE.MODULE:NAME",
        help="Python function scoring a response; added to the reward model's score if both are "
        "given. Called as f(prompt=str, response=str, fields=dict) -> float",
    )
    add(
        "--prompt-data",
        nargs="+",
        metavar="FILE",
        help="JSON lines with `prompt`, or chat `messages` for the tokenizer's chat template",
    )


def add_critic(parser: argparse.ArgumentParser) -> None:
    """Adds the group `critic`."""
    group = parser.add_argument_group("critic", "what differs from the actor; default: the same")
    add = group.add_argument
    add("--critic-tensor-model-parallel-size", type=int, metavar="N", help="tensor parallelism")
    add("--critic-pipeline-model-parallel-size", type=int, metavar="N", help="pipeline stages")
    add("--critic-micro-batch-size", type=int, metavar="N", help="samples of one forward pass")
    add("--critic-micro-batch-tokens", type=int, metavar="N", help="tokens of one forward pass")
    add("--critic-lr", type=float, help="peak learning rate")
    add("--critic-min-lr", type=float, help="final learning rate")
    add("--critic-lr-warmup-iters", type=int, metavar="N", help="linear warm-up, in PPO iterations")
    add("--critic-clip-grad", type=float, help="gradient norm clipping")
    add("--critic-weight-decay", type=float, help="weight decay")
    add(
        "--critic-warmup-iters",
        type=int,
        default=0,
        metavar="N",
        help="iterations at the start in which only the critic is trained",
    )


def add_ppo(parser: argparse.ArgumentParser) -> None:
    """Adds the group `ppo`."""
    group = parser.add_argument_group("ppo", "the algorithm")
    add = group.add_argument
    add(
        "--advantage-estimator",
        choices=["gae", "grpo", "rloo", "reinforce++"],
        default="gae",
        help="the last three train without a critic",
    )
    add("--ppo-epochs", type=int, default=1, metavar="N", help="passes over the rollout batch")
    add("--ppo-clip", type=float, default=0.2, help="clip range of the probability ratio")
    add("--ppo-clip-high", type=float, help="upper clip range (default: --ppo-clip)")
    add("--ppo-dual-clip", type=float, help="bound on the loss where the advantage is negative")
    add("--ppo-value-clip", type=float, default=0.2, help="clip range of the value; 0 is off")
    add("--ppo-entropy-coef", type=float, default=0.0, help="weight of the entropy bonus")
    add("--ppo-kl-coef", type=float, default=0.05, help="weight of the KL term; 0 is off")
    add(
        "--ppo-kl-placement",
        choices=["reward", "loss"],
        default="reward",
        help="KL as a per-token penalty in the reward, or as a term of the loss",
    )
    add(
        "--ppo-kl-estimator",
        choices=["k1", "k2", "k3"],
        help="estimator of the KL (default: k1 in the reward, k3 in the loss)",
    )
    add("--ppo-kl-target", type=float, help="adapt --ppo-kl-coef to hold this KL per sequence")
    add(
        "--ppo-kl-horizon",
        type=int,
        default=10000,
        metavar="SAMPLES",
        help="time constant of that adaptation",
    )
    add("--ppo-gamma", type=float, default=1.0, help="discount")
    add("--ppo-lambda", type=float, default=0.95, help="GAE's lambda")
    add(
        "--ppo-whiten-advantages",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="advantages to mean 0 and variance 1 over the rollout batch (gae only)",
    )
    add(
        "--ppo-grpo-normalize-std",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="divide GRPO's advantages by the group's standard deviation",
    )
    add(
        "--ppo-loss-aggregation",
        choices=["token-mean", "sequence-mean"],
        default="token-mean",
        help="weight of a token: equal over the mini-batch, or equal per sequence",
    )
    add(
        "--ppo-early-stop-kl",
        type=float,
        help="skip the remaining updates of an iteration once the KL to the policy that made "
        "the samples exceeds this",
    )
    add(
        "--ppo-tis-cap",
        type=float,
        help="correct the difference between rollout and training log-probabilities by "
        "importance weights truncated here",
    )
    add("--ppo-reward-clip", type=float, help="clip the score of a sample to +- this")
    add(
        "--ppo-missing-eos-penalty",
        type=float,
        default=0.0,
        help="subtracted from the score of a response cut at --rollout-max-new-tokens",
    )
