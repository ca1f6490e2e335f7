"""A search as a person at a terminal sees it: a line of progress, and Ctrl-C that ends it well."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_rlhfuse.cli import positive_seconds, whole_number
from megatron_rlhfuse.schedule.draw_numbers import gap_to, show
from megatron_rlhfuse.schedule.search import MOST_THREADS, Progress, StopSearch

DEFAULT_SECONDS = 10.0
"""Of a search from the command line for which no budget is given."""


def add_search_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that searches; the seed is None where it is not given."""
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=positive_seconds,
        help="time of a search (default: 10, or no limit with --iterations)",
    )
    parser.add_argument(
        "--iterations",
        metavar="N",
        type=whole_number(1),
        help="bound a search by its steps: cores and their speed do not change the result",
    )
    parser.add_argument(
        "--threads", metavar="T", type=whole_number(1, MOST_THREADS), help="default: all cores"
    )
    parser.add_argument(
        "--seed", metavar="N", type=whole_number(0), help="of the search (default: 0)"
    )


def budget(seconds: float | None, iterations: int | None) -> dict[str, Any]:
    """The arguments of a search for the flags --seconds and --iterations."""
    if seconds is None and iterations is None:
        seconds = DEFAULT_SECONDS
    return {"seconds": seconds, "iterations": iterations}


class Watch:
    """The `progress` callback of searches; `interrupted` is set by Ctrl-C."""

    def __init__(self) -> None:
        self.interrupted = False

    def on_interrupt(self, number: int, frame: FrameType | None) -> None:
        self.interrupted = True

    def __call__(self, now: Progress) -> None:
        if sys.stderr.isatty():
            gap = gap_to(now.makespan, now.lower_bound)
            line = (
                f"\r{now.seconds:6.1f} s  makespan {show(now.makespan)} "
                f"({100 * gap:.2f} % above the bound)  peak memory {show(now.peak_activation)}"
            )
            print(f"{line}\033[K", end="", file=sys.stderr, flush=True)
        if self.interrupted:
            raise StopSearch


@contextmanager
def watched_search() -> Iterator[Watch]:
    """Gives the callback for the searches in the block.

    On a terminal it keeps a line on standard error up to date. After Ctrl-C it ends the search
    that goes on, and each that follows, with the best plan so far.
    """
    watch = Watch()
    previous = signal.signal(signal.SIGINT, watch.on_interrupt)
    try:
        yield watch
    finally:
        signal.signal(signal.SIGINT, previous)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
