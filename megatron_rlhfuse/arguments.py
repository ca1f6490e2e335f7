"""The flags of an RLHF job: Megatron's own parser, plus the groups below.

Sizes in Megatron's words: `--train-iters` PPO iterations, `--rollout-batch-size` samples of one
iteration, `--global-batch-size` samples of one optimizer step (the PPO mini-batch),
`--micro-batch-size` samples of one forward pass. Learning-rate flags count PPO iterations too.

The architecture of every model comes from its Hugging Face folder, never from flags.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from megatron_rlhfuse import compat, platform, terminal
from megatron_rlhfuse.flag_error import FlagError
from megatron_rlhfuse.flag_rules import check_flags
from megatron_rlhfuse.rollout_flags import add_migration, add_rollout
from megatron_rlhfuse.validation import complete_flags

PROGRAM = "pretrain_rlhf.py"

_CHECK = "--rlhfuse-check"

_LAST_WORDS_S = 5.0


def parse_arguments() -> argparse.Namespace:
    """Parses `sys.argv`, refuses bad combinations, and sets Megatron's global arguments.

    Exit status 2 and one line on standard error where a flag is wrong.
    Megatron's own listing of its 900 arguments goes to the run's log, not to the terminal.
    """
    checked_ranks = _ranks_to_check(sys.argv[1:])
    terminal.hold_back()
    platform.prepare()
    compat.apply()
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    args = parse_args(extra_args_provider=add_rlhfuse_arguments)
    try:
        check_flags(args)
        args = complete_flags(args)
    except FlagError as fault:
        refuse(str(fault))
    log = "check.log" if checked_ranks else f"rank{args.rank}.log"
    terminal.log_to(Path(args.rlhfuse_run_dir) / "logs" / log)
    with terminal.printing_to_log():
        try:
            validate_args(args)
        except (AssertionError, ValueError, RuntimeError) as fault:
            refuse(f"refused by Megatron: {str(fault) or _raised_at(fault)}")
        # The run writes TensorBoard and W&B itself, with its own metrics; Megatron's writers,
        # which would open second ones, see them unset.
        writers = {name: getattr(args, name) for name in ("tensorboard_dir", "wandb_project")}
        args.tensorboard_dir, args.wandb_project = None, ""
        set_global_variables(args, build_tokenizer=False)
        vars(args).update(writers)
        if args.micro_batch_tokens is not None:
            args.micro_batch_size = None
    if checked_ranks:
        _check_prompts(args, checked_ranks)
    return args


def _ranks_to_check(argv: Sequence[str]) -> str | None:
    """Of --rlhfuse-check; makes this process look like rank 0 of such a job.

    Megatron reads the world from the environment while it parses.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(_CHECK)
    parser.error = refuse  # type: ignore[method-assign]
    given = parser.parse_known_args(argv)[0].rlhfuse_check
    if given is None:
        return None
    match = re.fullmatch(r"(?:([1-9]\d{0,5})x)?([1-9]\d{0,5})", given)
    if match is None:
        refuse(f"{_CHECK} {given}: want a number of ranks, or NODESxRANKS such as 2x8")
    nodes, ranks = int(match[1] or 1), int(match[2])
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": str(nodes * ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    return str(given)


def _check_prompts(args: argparse.Namespace, ranks: str) -> NoReturn:
    """The rest of what can be checked without starting anything; ends the process."""
    from megatron_rlhfuse.assembly import load_prompts

    _, dataset = load_prompts(args)
    resumed = f"; goes on from {args.load}" if args.load else ""
    print(f"{PROGRAM}: fine for {ranks} rank(s): {len(dataset)} prompts{resumed}")
    raise SystemExit(0)


def refuse(message: str) -> NoReturn:
    """Ends the process with status 2; one line, from one rank of each node.

    A folder or file may be missing on one node alone.
    """
    _complain(message)
    raise SystemExit(2)


def give_up(message: str) -> NoReturn:
    """Ends the process with status 1; one line, from one rank of each node.

    For what is no flag's fault, such as a full disk; a traceback would hide it.
    """
    _complain(message)
    if int(os.environ.get("LOCAL_RANK", "0")) != 0:
        # torchrun ends the ranks as soon as one has ended: not before one has said why.
        time.sleep(_LAST_WORDS_S)
    raise SystemExit(1)


def _complain(message: str) -> None:
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        line = " ".join(message.split())
        print(f"{PROGRAM}: error: {line}", file=sys.stderr, flush=True)


def _raised_at(fault: BaseException) -> str:
    """The source line of a bare assertion: Megatron leaves many without a message."""
    import traceback

    frame = traceback.extract_tb(fault.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"


def add_rlhfuse_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds every group; Megatron's `extra_args_provider`."""
    # argparse would print all 900 flags before it says which one is wrong.
    parser.error = refuse  # type: ignore[method-assign]
    for add in (_add_run, add_migration, _add_models, add_rollout, _add_critic, _add_ppo):
        add(parser)
    needed = compat.default_flags() | platform.default_flags()
    parser.set_defaults(
        # Megatron refuses to parse without them; the real values come from --actor-model.
        tokenizer_type="NullTokenizer",
        # RLHF trains a few iterations on data it makes itself: no Megatron dataset to build.
        attention_dropout=0.0,
        hidden_dropout=0.0,
        rerun_mode="disabled",
        **needed,
    )
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rlhfuse", "the run, fusion and inference")
    add = group.add_argument
    add(
        "--rlhfuse-run-dir",
        metavar="DIR",
        default="runs/rlhf",
        help="folder for metrics, trace, plots and logs of this run",
    )
    add(
        "--rlhfuse-fusion",
        choices=["none", "inter", "intra", "both"],
        help="stage fusion; 'none' runs everything one after the other, 'inter' starts inference "
        "while the longest samples are still being generated, on few engines, 'intra' trains actor "
        "and critic at once in one fused pipeline (default: both; inter where the algorithm has no "
        "critic, or where actor and critic cannot train in one pipeline)",
    )
    add(
        "--rlhfuse-plan",
        metavar="FILE",
        help="fused schedule to train by, from `rlhfuse plan` (default: measure the stages and "
        "plan while training goes on)",
    )
    add(
        "--rlhfuse-plan-seconds",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="budget of that planning, on one rank beside the training; 0 keeps the first plan",
    )
    add(
        "--rlhfuse-plan-cache",
        metavar="DIR",
        help="folder of plans of earlier runs, 'none' for none (default: "
        "~/.cache/megatron_rlhfuse/plans)",
    )
    add(
        "--rlhfuse-activation-memory-gib",
        type=float,
        metavar="GIB",
        help="activations of both models that a rank may hold in a fused step; plans keep to it "
        "(default: 90 %% of what is free on a GPU after the first step; on a CPU no limit)",
    )
    add(
        "--rlhfuse-dispatch",
        choices=["balanced", "in-order"],
        default="balanced",
        help="which samples of a step share a micro-batch, and which replica computes it: those of "
        "like length, with equal work for all replicas, or in the order of the mini-batch",
    )
    add(
        "--micro-batch-tokens",
        type=int,
        metavar="N",
        help="tokens of one forward pass at most, padding included, in the place of "
        "--micro-batch-size: the number of micro-batches then follows the lengths of samples",
    )
    add(
        "--rlhfuse-pack-sequences",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="lay the samples of a micro-batch one behind the other, without padding, instead of "
        "a row each",
    )
    add(
        "--rlhfuse-trace",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write trace.json (Chrome trace of every rank and engine)",
    )
    add(
        "--rlhfuse-inference-tensor-parallel-size",
        type=int,
        metavar="N",
        help="tensor parallelism of an inference instance (default: the actor's)",
    )
    add(
        "--rlhfuse-inference-pipeline-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="pipeline parallelism of an inference instance",
    )
    add(
        "--rlhfuse-inference-micro-batch-size",
        type=int,
        default=1,
        metavar="N",
        help="samples an inference instance takes from the queue at once; at 1 the scores of a "
        "sample do not depend, in the last bit, on which samples were scored with it",
    )
    add(
        "--rlhfuse-auto-resume",
        action="store_true",
        help="go on from the latest checkpoint in --save if there is one, else start, from --load "
        "where given: for jobs that torchrun or a scheduler starts again",
    )
    add(
        _CHECK,
        metavar="RANKS",
        help="check flags, models and prompts for a job of so many ranks, on NODESxRANKS a number "
        "of ranks on each node, and end; starts nothing",
    )
    add(
        "--rlhfuse-stage-timeout",
        type=float,
        default=1800.0,
        metavar="SECONDS",
        help="longest wait for other ranks: to finish generation or inference, and for a "
        "micro-batch of a fused step",
    )
    add(
        "--save-hf",
        metavar="DIR",
        help="write the trained actor and critic as Hugging Face folders DIR/actor, DIR/critic "
        "at the end of the run",
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
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


def _add_critic(parser: argparse.ArgumentParser) -> None:
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


def _add_ppo(parser: argparse.ArgumentParser) -> None:
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
