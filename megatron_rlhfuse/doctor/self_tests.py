"""Which self-tests there are, and how the outcome of one becomes a line of the report.

Each is a program of `trials/`. Time-outs are for a cold start from a slow file system on a busy
machine; where all is well, most of the time goes into importing libraries.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from megatron_rlhfuse.doctor import child
from megatron_rlhfuse.doctor.check import INSTALL, Check

REPAIR = f"put right what is BAD above; if nothing is, {INSTALL}"


@dataclass(frozen=True)
class SelfTest:
    """A trial by name, what it is called in the report, and what to do where it fails."""

    trial: str
    subject: str
    timeout_s: float
    remedy: str


ALL = (
    SelfTest(
        "schedule",
        "test: schedule search",
        60.0,
        REPAIR,
    ),
    SelfTest(
        "dispatch",
        "test: dispatch",
        120.0,
        REPAIR,
    ),
    SelfTest(
        "collectives",
        "test: collectives",
        120.0,
        "see the lines on network and variables above; "
        "on GPUs NCCL_DEBUG=INFO torchrun ... says where NCCL stops",
    ),
    SelfTest(
        "training",
        "test: Megatron",
        300.0,
        REPAIR,
    ),
    SelfTest(
        "generation",
        "test: vLLM",
        600.0,
        REPAIR,
    ),
)


def check(test: SelfTest) -> Check:
    """Runs a self-test."""
    outcome = child.run(test.trial, test.timeout_s)
    if outcome.error:
        return Check(test.subject, outcome.error, "BAD", test.remedy, outcome.seconds)
    return Check(test.subject, outcome.found, "ok", seconds=outcome.seconds)


@contextlib.contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Has a scheduler's SIGTERM end this program as Ctrl-C does: after what runs is killed."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
