"""One instance decodes its samples, all of its batch together, a token each per step.

The step's duration depends on the batch, so samples are followed on a clock of tokens: what starts
at clock c and has n tokens to make finishes at clock c + n. Between two finishes the batch is the
same and the clock runs evenly.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Decoding:
    """What happened when.

    Attributes:
        samples, tokens: what there was to make
        started: clock at which each sample joined the batch, [samples]
        finished: seconds at which each was finished, [samples]
        times, clocks: seconds and clock where the batch changed
        batches: samples decoding from each of `times` on; the last is 0
    """

    samples: tuple[int, ...]
    tokens: tuple[float, ...]
    started: list[float]
    finished: list[float]
    times: list[float]
    clocks: list[float]
    batches: list[int]

    @property
    def end(self) -> float:
        return self.times[-1]

    def progress(self, time: float) -> list[float]:
        """Tokens that each sample has at `time`, a step under way in part, [samples]."""
        clock = float(np.interp(time, self.times, self.clocks))
        return [
            min(max(clock - start, 0.0), tokens)
            for start, tokens in zip(self.started, self.tokens, strict=True)
        ]


def decode(
    samples: Sequence[int],
    tokens: Sequence[float],
    begin: float,
    max_num_seqs: int,
    step_seconds: Sequence[float],
) -> Decoding:
    """Decodes from `begin` on; more than `max_num_seqs` samples wait, in the order given.

    Args: step_seconds: by batch size, up to the largest there can be.
    """
    count, now, clock = len(samples), begin, 0.0
    waiting = min(max_num_seqs, count)
    batch = [(tokens[each], each) for each in range(waiting)]
    heapq.heapify(batch)
    started, finished = [0.0] * count, [0.0] * count
    times, clocks, batches = [now], [clock], [len(batch)]
    while batch:
        end, each = batch[0]
        now += (end - clock) * step_seconds[len(batch)]
        clock = end
        finished[each] = now
        if waiting < count:
            started[waiting] = clock
            heapq.heapreplace(batch, (clock + tokens[waiting], waiting))
            waiting += 1
        else:
            heapq.heappop(batch)
        if now == times[-1]:
            batches[-1], clocks[-1] = len(batch), clock
        else:
            times.append(now)
            clocks.append(clock)
            batches.append(len(batch))
    return Decoding(tuple(samples), tuple(tokens), started, finished, times, clocks, batches)
