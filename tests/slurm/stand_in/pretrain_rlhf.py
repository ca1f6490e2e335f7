"""Stands in for the trainer where a test looks at train.sbatch alone: it takes no time to start.

It keeps what the trainer promises a scheduler (flag check, checkpoints, stop file, resuming), and
trains nothing. `--stand-in` says how it behaves:

    train   saves a checkpoint in every iteration
    unseen  the same, but its stopped.json does not show, as on a file system that caches
    fail    ends with status 1 at once
    refuse  the same, for a reason that a new start does not mend
    hang    makes no iteration and hears no stop
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

import psutil


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"stand-in: error: {message}\n")


def main() -> int:
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--save", type=Path, required=True)
    parser.add_argument("--rlhfuse-run-dir", type=Path, required=True)
    parser.add_argument("--rlhfuse-auto-resume", action="store_true", required=True)
    parser.add_argument("--rlhfuse-check")
    parser.add_argument("--train-iters", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.0, help="of an iteration")
    parser.add_argument("--await-stop", type=int, help="iteration that lasts until it is asked for")
    modes = ["train", "unseen", "fail", "refuse", "hang"]
    parser.add_argument("--stand-in", choices=modes, default="train")
    args = parser.parse_args()
    if args.rlhfuse_check:
        print(f"stand-in: checked for {args.rlhfuse_check}", flush=True)
        return 0
    if args.stand_in == "refuse" and os.environ["RANK"] == "0":
        (args.rlhfuse_run_dir / "refused.txt").write_text("another schedule\n")
    if args.stand_in in ("fail", "refuse"):
        return 1
    while args.stand_in == "hang":
        time.sleep(1)
    names = ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
    print("stand-in:", *(f"{name}={os.environ.get(name)}" for name in names), flush=True)
    return train(args) if os.environ["RANK"] == "0" else 0


def train(args: argparse.Namespace) -> int:
    args.save.mkdir(parents=True, exist_ok=True)
    latest = args.save / "latest_checkpointed_iteration.txt"
    stop = args.rlhfuse_run_dir / "stop"
    launched = psutil.Process(os.getppid()).create_time()
    if stop.exists() and stop.stat().st_mtime < launched:
        stop.unlink()  # an old one
    done = int(latest.read_text()) if latest.exists() else 0
    for iteration in range(done + 1, args.train_iters + 1):
        time.sleep(args.seconds)
        while iteration == args.await_stop and not stop.exists():
            time.sleep(0.1)
        latest.write_text(f"{iteration}\n")
        print(f"stand-in: iteration {iteration}", flush=True)
        if stop.exists() and iteration < args.train_iters:
            record = {"iteration": iteration, "of": args.train_iters, "reason": "asked"}
            if args.stand_in != "unseen":
                (args.rlhfuse_run_dir / "stopped.json").write_text(json.dumps(record))
            stop.unlink()
            break
    return 0


if __name__ == "__main__":
    sys.exit(main())
