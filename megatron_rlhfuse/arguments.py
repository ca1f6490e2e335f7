"""The flags of an RLHF job: Megatron's own parser, plus the groups below.

Sizes in Megatron's words: `--train-iters` PPO iterations, `--rollout-batch-size` samples of one
iteration, `--global-batch-size` samples of one optimizer step (the PPO mini-batch),
`--micro-batch-size` samples of one forward pass. Learning-rate flags count PPO iterations too.

The architecture of every model comes from its Hugging Face folder, never from flags.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from megatron_rlhfuse import compat, platform, stop_request, terminal
from megatron_rlhfuse.algorithm_flags import add_critic, add_models, add_ppo
from megatron_rlhfuse.flag_check import CHECK_FLAG, check_prompts, ranks_to_check
from megatron_rlhfuse.flag_error import FlagError
from megatron_rlhfuse.flag_rules import check_flags
from megatron_rlhfuse.last_words import refuse
from megatron_rlhfuse.rollout_flags import add_migration, add_rollout
from megatron_rlhfuse.validation import complete_flags


def parse_arguments() -> argparse.Namespace:
    """Parses `sys.argv`, refuses bad combinations, and sets Megatron's global arguments.

    Exit status 2 and one line on standard error where a flag is wrong.
    Megatron's own listing of its 900 arguments goes to the run's log, not to the terminal.
    """
    checked_ranks = ranks_to_check(sys.argv[1:])
    stop_request.hear(signal.SIGUSR1)
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
        if args.exit_signal_handler:  # in place of Megatron's, which nobody asks
            stop_request.hear(args.exit_signal)
        vars(args).update(writers)
        if args.micro_batch_tokens is not None:
            args.micro_batch_size = None
    if checked_ranks:
        check_prompts(args, checked_ranks)
    return args


def _raised_at(fault: BaseException) -> str:
    """The source line of a bare assertion: Megatron leaves many without a message."""
    import traceback

    frame = traceback.extract_tb(fault.__traceback__)[-1]
    return f"{frame.line} ({Path(frame.filename).name}:{frame.lineno})"


def add_rlhfuse_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds every group; Megatron's `extra_args_provider`."""
    # argparse would print all 900 flags before it says which one is wrong.
    parser.error = refuse  # type: ignore[method-assign]
    for add in (_add_run, add_migration, add_models, add_rollout, add_critic, add_ppo):
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
        CHECK_FLAG,
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
