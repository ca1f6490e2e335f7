"""Released instances score finished samples, first in, first out, one at a time."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scoring:
    """Who scored what, and when; all [samples].

    Attributes:
        instance: that scored it
        start: seconds; it took `inference_s` from there
        end: of the last one
    """

    instance: list[int]
    start: list[float]
    end: float

    def busy_until(self, time: float, instances: int, inference_s: float) -> list[float]:
        """End of the last sample that each instance began before `time`; 0 without one."""
        busy = [0.0] * instances
        for instance, start in zip(self.instance, self.start, strict=True):
            if start < time:
                busy[instance] = max(busy[instance], start + inference_s)
        return busy


def score(
    finished: Sequence[float],
    released: Sequence[float],
    inference_s: float,
    past: tuple[Scoring, float] | None = None,
) -> Scoring:
    """The instance that is free first takes the next sample; of several, the lower number.

    Args:
        finished: [samples]
        released: when each instance may begin, [instances]
        past: what was planned so far, and a time; what began before that time stays
    """
    instances, starts = [0] * len(finished), [0.0] * len(finished)
    open_ = list(range(len(finished)))
    busy = [0.0] * len(released)
    if past is not None:
        before, time = past
        instances, starts = list(before.instance), list(before.start)
        open_ = [sample for sample in open_ if starts[sample] >= time]
        busy = before.busy_until(time, len(released), inference_s)
    free = [(max(both), instance) for instance, both in enumerate(zip(released, busy, strict=True))]
    heapq.heapify(free)
    for sample in sorted(open_, key=finished.__getitem__):
        since, instance = free[0]
        start = max(since, finished[sample])
        instances[sample], starts[sample] = instance, start
        heapq.heapreplace(free, (start + inference_s, instance))
    return Scoring(instances, starts, max(starts) + inference_s)
