"""A search as a person at a terminal sees it: a line of progress, and Ctrl-C that ends it well."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from megatron_rlhfuse.schedule.draw_numbers import gap_to, show
from megatron_rlhfuse.schedule.search import Progress, StopSearch

DEFAULT_SECONDS = 10.0
"""Of a search from the command line for which no budget is given."""


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
