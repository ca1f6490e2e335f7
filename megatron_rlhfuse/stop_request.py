"""Ends a job in order: after the running iteration, with a checkpoint, whoever asked for it.

A job is asked by a file named `stop` in its run folder, by SIGUSR1 to any of its ranks, by
Megatron's `--exit-signal-handler` (SIGTERM, or `--exit-signal`), `--exit-duration-in-mins` and
`--exit-interval`. What was asked of one rank all ranks do: they agree once in an iteration.

A job that was stopped so leaves `stopped.json`, by which a script knows that there is more to do.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import time
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.observe.jsonl import write_atomically

STOP_FILE = "stop"
STOPPED_FILE = "stopped.json"

# Numbers travel between ranks; of several reasons the last one here is told.
_REASONS = ("--exit-interval", "--exit-duration-in-mins", "a signal", f"a file named {STOP_FILE}")


class StopRequest:
    """This rank's ear. `after` is the iteration after which all ranks have agreed to stop, where
    that is not the run's last one; `reason` says why."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._folder = Path(args.rlhfuse_run_dir)
        self._signalled = False
        self._started = time.monotonic()
        self.after: int | None = None
        self.reason = ""

    def listen(self) -> None:
        """Begins to take signals, and clears what an earlier job has left in the run folder.

        A file `stop` stays where torchrun has started the ranks again: it is meant for this job.
        """
        # Engines and the writers of a checkpoint are told by their rank.
        signal.signal(signal.SIGUSR1, self._take_signal)
        if self._args.exit_signal_handler:
            signal.signal(self._args.exit_signal, self._take_signal)
        if self._args.rank == 0:
            (self._folder / STOPPED_FILE).unlink(missing_ok=True)
            if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0:
                (self._folder / STOP_FILE).unlink(missing_ok=True)

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
            self._signalled,
            args.rank == 0 and (self._folder / STOP_FILE).exists(),
        )
        return max(number for number, asked in enumerate((True, *found)) if asked)

    def _take_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
