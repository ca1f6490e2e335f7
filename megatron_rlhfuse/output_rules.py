"""Rules of flags for what a job leaves, what it goes on from, and when it ends."""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
from pathlib import Path

from megatron_rlhfuse.flag_error import FlagError, flag
from megatron_rlhfuse.training.checkpoint_folder import has_checkpoint

_NEED_SAVE = ("save_interval", "save_retain_interval", "rlhfuse_auto_resume")


def check_output(args: argparse.Namespace) -> None:
    """Refuses what does not fit, and has `--load` name what --rlhfuse-auto-resume goes on from.

    Raises `FlagError`.
    """
    for name in _NEED_SAVE:
        value = getattr(args, name)
        if value and args.save is None:
            given = flag(name) if value is True else f"{flag(name)} {value}"
            raise FlagError(f"{given} has no effect without --save: name the folder")
    interval = args.save_interval or args.train_iters
    if args.save_retain_interval and args.save_retain_interval % interval:
        raise FlagError(
            f"--save-retain-interval {args.save_retain_interval} is no multiple of --save-interval "
            f"{interval}: change one of them"
        )
    _check_restarts(args)
    if args.rlhfuse_auto_resume and has_checkpoint(args.save):
        args.load = args.save
    if args.save and has_checkpoint(args.save) and not _same_folder(args.save, args.load):
        raise FlagError(
            f"--save {args.save} holds the checkpoints of another run: go on from them with "
            f"--load {args.save} or --rlhfuse-auto-resume, or name another folder"
        )
    if args.exit_duration_in_mins is not None and args.exit_duration_in_mins < 0:
        raise FlagError(
            f"--exit-duration-in-mins {args.exit_duration_in_mins}: must not be less than 0"
        )
    if args.exit_signal_handler and args.exit_signal in (signal.SIGKILL, signal.SIGSTOP):
        raise FlagError(f"--exit-signal {args.exit_signal.name}: no program can take this signal")
    if args.wandb_project and importlib.util.find_spec("wandb") is None:
        raise FlagError(
            f"--wandb-project {args.wandb_project} needs the package wandb: install it, or leave "
            "the flag out"
        )


def _check_restarts(args: argparse.Namespace) -> None:
    restarts = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if not restarts:
        return
    if args.save and not args.rlhfuse_auto_resume:
        raise FlagError(
            f"torchrun --max-restarts {restarts} starts ranks again, which then find the "
            "checkpoints in --save: give --rlhfuse-auto-resume, so that they go on from them"
        )
    on_one_node = os.environ.get("LOCAL_WORLD_SIZE") == str(args.world_size)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not on_one_node:
        raise FlagError(
            f"torchrun --max-restarts {restarts} on several nodes needs "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in torchrun's environment: else ranks that are "
            "started again connect to those that have died"
        )


def _same_folder(one: str, other: str | None) -> bool:
    return other is not None and Path(one).resolve() == Path(other).resolve()
