"""When the forwards and backwards of a step ran, measured where the work is done."""

from __future__ import annotations

import time
from typing import Any, NamedTuple, Protocol

import torch

from megatron_rlhfuse import platform
from megatron_rlhfuse.schedule.program import Instruction


class Span(NamedTuple):
    """A forward or backward; seconds since the step began."""

    instruction: Instruction
    start: float
    end: float


class Clock(Protocol):
    """Brackets instructions; made at the start of a step, read after its end."""

    began: float
    """time.time() at the start of the step."""

    def start(self) -> None: ...

    def stop(self, instruction: Instruction) -> None: ...

    def spans(self) -> list[Span]:
        """What was taken down. On a GPU: waits for the work."""
        ...


def make_clock() -> Clock:
    """A clock of this machine, started."""
    return _EventClock() if platform.has_cuda() else _HostClock()


class _HostClock:
    def __init__(self) -> None:
        self.began = time.time()
        self._origin = time.perf_counter()
        self._starts: list[float] = []
        self._stops: list[tuple[Instruction, float]] = []

    def start(self) -> None:
        self._starts.append(time.perf_counter())

    def stop(self, instruction: Instruction) -> None:
        self._stops.append((instruction, time.perf_counter()))

    def spans(self) -> list[Span]:
        return [
            Span(instruction, start - self._origin, end - self._origin)
            for start, (instruction, end) in zip(self._starts, self._stops, strict=True)
        ]


class _EventClock:
    """Events in the compute stream: nothing waits for them until the step is over."""

    def __init__(self) -> None:
        self.began = time.time()
        self._origin = self._mark()
        self._starts: list[Any] = []
        self._stops: list[tuple[Instruction, Any]] = []

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> None:
        self._starts.append(self._mark())

    def stop(self, instruction: Instruction) -> None:
        self._stops.append((instruction, self._mark()))

    def spans(self) -> list[Span]:
        torch.cuda.synchronize()
        return [
            Span(
                instruction,
                self._origin.elapsed_time(start) / 1e3,
                self._origin.elapsed_time(end) / 1e3,
            )
            for start, (instruction, end) in zip(self._starts, self._stops, strict=True)
        ]
