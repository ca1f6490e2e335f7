"""The run on the terminal: one line that moves, or one line per iteration where it is no terminal.

Shown by rank 0 only; the other ranks make a `Progress` that is not shown.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TextIO

from tqdm import tqdm

from megatron_rlhfuse.observe.metrics import STAGE_SECONDS, Value

_BAR = "iteration {n_fmt}/{total_fmt} |{bar:16}| {elapsed}<{remaining}  {postfix}"


class Progress:
    """Progress of a run of `total` iterations, of which `done` lie behind (after a resume)."""

    def __init__(
        self, total: int, done: int = 0, shown: bool = True, stream: TextIO | None = None
    ) -> None:
        stream = stream or sys.stderr
        self._total = total
        self._stream = stream if shown else None
        self._summary = ""
        self._bar: tqdm | None = None
        if shown and stream.isatty():
            self._bar = tqdm(
                total=total, initial=done, file=stream, bar_format=_BAR, dynamic_ncols=True
            )

    def stage(self, name: str) -> None:
        """Shows, on a terminal only, what the run is doing now."""
        if self._bar is not None:
            self._bar.set_postfix_str(f"{self._summary}  {name} ...".strip())

    def update(self, iteration: int, values: Mapping[str, Value]) -> None:
        """Shows a finished iteration, with the values that `metrics.jsonl` gets."""
        self._summary = summary(values)
        if self._bar is not None:
            self._bar.set_postfix_str(self._summary, refresh=False)
            self._bar.update(iteration - self._bar.n)
            self._bar.refresh()
        elif self._stream is not None:
            width = len(str(self._total))
            line = f"iteration {iteration:{width}}/{self._total}  {self._summary}"
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def summary(values: Mapping[str, Value]) -> str:
    """Reward, KL, seconds of each stage, migrated samples, in one line; what was not measured is
    left out."""
    shown = []
    for name, label in (("reward_mean", "reward"), ("kl", "kl")):
        if isinstance(value := values.get(name), int | float):
            shown.append(f"{label} {value:.4g}")
    for name, label in {**STAGE_SECONDS, "iteration_s": "total"}.items():
        if isinstance(value := values.get(name), int | float):
            shown.append(f"{label} {value:.1f} s")
    if migrated := values.get("migrated_samples"):
        shown.append(f"{migrated} migrated")
    return "  ".join(shown)
