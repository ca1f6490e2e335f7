"""The flags of generation and of migration."""

from __future__ import annotations

import argparse

from megatron_rlhfuse.migration.dispatch import DISPATCHES
from megatron_rlhfuse.migration.options import share


def threshold(text: str) -> float | None:
    """The type of --rlhfuse-migration-threshold; None is auto."""
    return None if text == "auto" else share(text)


def add_migration(parser: argparse.ArgumentParser) -> None:
    """Adds the group `rlhfuse migration`."""
    group = parser.add_argument_group(
        "rlhfuse migration", "inter-stage fusion: what becomes of the longest samples"
    )
    add = group.add_argument
    add(
        "--rlhfuse-migration-threshold",
        type=threshold,
        default=None,
        metavar="auto|FRACTION",
        help="with at most this share of the rollout batch unfinished the rest migrates to few "
        "engines; 0 never migrates, 'auto' simulates the next rollout and takes the best "
        "(default: auto)",
    )
    add(
        "--rlhfuse-migration-policy",
        choices=["busiest", "inference"],
        default="busiest",
        help="which engines keep the rest: those with most of it, or designated ones",
    )
    add(
        "--rlhfuse-migration-instances",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="the engines that go on generating, for --rlhfuse-migration-policy inference",
    )
    add(
        "--rlhfuse-migration-transfer",
        choices=["auto", "kv", "tokens"],
        default="auto",
        help="what of a sample travels: its keys and values, or only its tokens, which are then "
        "computed again; 'auto' takes what is faster by the measured rates",
    )
    add(
        "--rlhfuse-migration-relay",
        choices=["gloo", "nixl"],
        default="gloo",
        help="how keys and values get from node to node: over Gloo's connections, or by NIXL, "
        "which uses InfiniBand and RoCE and is a package of its own",
    )
    add(
        "--rlhfuse-migration-batch",
        type=int,
        metavar="N",
        help="samples that an engine is filled up to by migration (default: the largest decode "
        "batch that was measured to be as fast as a small one)",
    )
    add(
        "--rlhfuse-migration-rebalance",
        action="store_true",
        help="migrate more than once in an iteration, as often as it pays",
    )


def add_rollout(parser: argparse.ArgumentParser) -> None:
    """Adds the group `rollout`."""
    group = parser.add_argument_group("rollout", "generation with vLLM")
    add = group.add_argument
    add("--rollout-batch-size", type=int, metavar="N", help="samples of one iteration")
    add(
        "--rollout-samples-per-prompt",
        type=int,
        default=1,
        metavar="N",
        help="responses drawn for each prompt",
    )
    add(
        "--rollout-instances",
        type=int,
        metavar="N",
        help="vLLM engines (default: world size / --rollout-tensor-parallel-size)",
    )
    add(
        "--rollout-tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="tensor parallelism of one vLLM engine; must stay inside a node",
    )
    add(
        "--rollout-max-prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="longest prompt accepted, in tokens",
    )
    add(
        "--rollout-overlong-prompts",
        choices=["drop", "refuse"],
        default="drop",
        help="what to do with longer prompts: drop and count them, or refuse to start",
    )
    add(
        "--rollout-dispatch",
        choices=DISPATCHES,
        default="round-robin",
        help="which engine answers which prompt: each the next one, or those with the longest "
        "responses in earlier epochs first, each to the engine with the least to do",
    )
    add(
        "--rollout-extra-prompts",
        type=float,
        default=0.0,
        metavar="FRACTION",
        help="answer so many prompts more than are trained, leave those with the longest responses "
        "out, and train these together as soon as they are enough; rounded up to whole prompts",
    )
    add("--rollout-max-new-tokens", type=int, default=512, metavar="N", help="longest response")
    add("--rollout-min-new-tokens", type=int, default=0, metavar="N", help="shortest response")
    add("--rollout-temperature", type=float, default=1.0, help="sampling temperature")
    add("--rollout-top-p", type=float, default=1.0, help="nucleus sampling; 1 is off")
    add("--rollout-top-k", type=int, default=0, help="top-k sampling; 0 is off")
    add("--rollout-repetition-penalty", type=float, default=1.0, help="1 is off")
    add("--rollout-presence-penalty", type=float, default=0.0, help="0 is off")
    add("--rollout-frequency-penalty", type=float, default=0.0, help="0 is off")
    add(
        "--rollout-stop-token-ids",
        type=int,
        nargs="*",
        default=[],
        metavar="ID",
        help="tokens that end a response, besides the tokenizer's end of sequence",
    )
    add(
        "--rollout-ignore-eos",
        action="store_true",
        help="go on to --rollout-max-new-tokens (for benchmarks)",
    )
    add(
        "--rollout-max-num-seqs",
        type=int,
        default=256,
        metavar="N",
        help="largest decode batch of one engine",
    )
    add(
        "--rollout-pace",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="for measurements: let every step of an engine take at least so long, as on a GPU "
        "that decodes few sequences as fast as one",
    )
    add(
        "--rollout-kv-cache-bytes",
        type=int,
        metavar="BYTES",
        help="KV cache of one engine (default: 64 MiB on CPU; on GPUs what "
        "--rollout-gpu-memory-utilization leaves)",
    )
    add(
        "--rollout-gpu-memory-utilization",
        type=float,
        default=0.6,
        metavar="FRACTION",
        help="share of GPU memory that an engine takes while it generates",
    )
    add(
        "--rollout-dtype",
        metavar="DTYPE",
        help="engine weights and activations (default: bfloat16 on GPUs, float32 on CPU)",
    )
    add(
        "--rollout-start-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="longest wait for an engine to start",
    )
    add(
        "--rollout-step-timeout",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="an engine that has work and says nothing for so long is taken for hung",
    )
