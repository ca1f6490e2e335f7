"""Ends a job in order: after the running iteration, with a checkpoint, whoever asked for it.

A job is asked by a file named `stop` in its run folder, by SIGUSR1 to any of its ranks, by
Megatron's `--exit-signal-handler` (SIGTERM, or `--exit-signal`), `--exit-duration-in-mins` and
`--exit-interval`. What was asked of one rank all ranks do: they agree once in an iteration.

A file `stop` from before the job was launched is an old one: it is removed. Where torchrun starts
ranks again that is the same launch.

A job that was stopped so leaves `stopped.json`, by which a script knows that there is more to do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.last_words import REFUSED_FILE
from megatron_rlhfuse.observe.jsonl import write_atomically

STOP_FILE = "stop"
STOPPED_FILE = "stopped.json"

# Numbers travel between ranks; of several reasons the last one here is told.
_REASONS = ("--exit-interval", "--exit-duration-in-mins", "a signal", f"a file named {STOP_FILE}")

_signalled = False
"""Whether this process has got a signal that asks to stop."""


def hear(number: signal.Signals) -> None:
    """Takes a signal for a request from now on; it may come long before the first iteration."""
    signal.signal(number, _take_signal)


def _take_signal(number: int, frame: FrameType | None) -> None:
    global _signalled
    _signalled = True


class StopRequest:
    """This rank's ear. `after` is the iteration after which all ranks have agreed to stop, where
    that is not the run's last one; `reason` says why."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._folder = Path(args.rlhfuse_run_dir)
        self._started = time.monotonic()
        self.after: int | None = None
        self.reason = ""

    def clear(self) -> None:
        """Removes what an earlier job has left in the run folder. Rank 0's."""
        if self._args.rank != 0:
            return
        for name in (STOPPED_FILE, REFUSED_FILE):
            (self._folder / name).unlink(missing_ok=True)
        stop = self._folder / STOP_FILE
        with suppress(OSError):
            if stop.stat().st_mtime < _launched():
                stop.unlink()

    def agree(self, iteration: int) -> bool:
        """Whether the job ends after this iteration. COLLECTIVE over all ranks."""
        if iteration == self._args.train_iters:
            return True
        asked = torch.tensor([self._asked(iteration)], device=platform.device())
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        number = int(asked)
        if number:
            self.after, self.reason = iteration, _REASONS[number - 1]
        return self.after is not None

    def settle(self) -> None:
        """At the end of the job: takes the file `stop` away, and writes `stopped.json` if there
        are iterations left. Rank 0's."""
        if self._args.rank != 0:
            return
        if self.after is not None:
            record = {"iteration": self.after, "of": self._args.train_iters, "reason": self.reason}
            write_atomically(self._folder / STOPPED_FILE, json.dumps(record) + "\n")
        (self._folder / STOP_FILE).unlink(missing_ok=True)

    def _asked(self, iteration: int) -> int:
        """The number of this rank's reason, 0 without one."""
        args = self._args
        minutes = (time.monotonic() - self._started) / 60
        found = (
            bool(args.exit_interval) and iteration % args.exit_interval == 0,
            args.exit_duration_in_mins is not None and minutes > args.exit_duration_in_mins,
            _signalled,
            args.rank == 0 and _exists(self._folder / STOP_FILE),
        )
        return max(number for number, asked in enumerate((True, *found)) if asked)


def _exists(path: Path) -> bool:
    """Whether a file is there; False where that cannot be told, until the next time."""
    try:
        return path.exists()
    except OSError:
        return False


def _launched() -> float:
    """time.time() at which the process was started that has started this one: torchrun.

    To a second: the kernel tells its own start in whole ones.
    """
    after_name = Path(f"/proc/{os.getppid()}/stat").read_text().rpartition(")")[2].split()
    ticks = int(after_name[19])  # since the machine's start
    (booted,) = (
        int(line.split()[1])
        for line in Path("/proc/stat").read_text().splitlines()
        if line.startswith("btime ")
    )
    return booted + ticks / os.sysconf("SC_CLK_TCK")
