"""Micro-batches of padded sequences. PURE.

A micro-batch is padded to its longest sample, so samples of like length share one: sorted by
length and cut into runs. That is optimal for padding: with any other cut, exchanging two samples
towards the sorted order does not lengthen either run.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import PADDED, Runs, by_falling_length, rounded_up

_HALVINGS = 50
"""Of the interval that holds the least cost: beyond a double's precision for any real batch."""


def cut_rows(lengths: Sequence[int], rows: int) -> Runs:
    """Runs of `rows` samples."""
    order = by_falling_length(lengths)
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def cut_tokens(lengths: Sequence[int], tokens: int, replicas: int, cost: SequenceCost) -> Runs:
    """The fewest runs, a multiple of `replicas`, of which the dearest is as cheap as possible.

    Their number of samples is a multiple of `replicas`, and none is longer than `tokens`.
    """
    order = by_falling_length(lengths)
    best = _greedy(lengths, order, tokens, float("inf"), cost)
    count = rounded_up(len(best), replicas)
    low = max((cost(length) for length in lengths), default=0.0)
    high = max((PADDED.cost(lengths, run, cost) for run in best), default=0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        runs = _greedy(lengths, order, tokens, middle, cost)
        if len(runs) <= count:
            best, high = runs, middle
        else:
            low = middle
    return _split(lengths, best, count, cost)


def _greedy(
    lengths: Sequence[int], order: Sequence[int], tokens: int, most: float, cost: SequenceCost
) -> Runs:
    """The longest runs, from the longest sample on, that keep to a padded size and a cost."""
    runs: Runs = []
    start = 0
    while start < len(order):
        longest = lengths[order[start]]
        rows = tokens // longest
        if most < float("inf"):
            # At least one: `most` is no less than the dearest sample. The sum is for rounding.
            rows = min(rows, max(1, int(most / cost(longest) + 1e-9)))
        runs.append(list(order[start : start + rows]))
        start += rows
    return runs


def _split(lengths: Sequence[int], runs: Runs, count: int, cost: SequenceCost) -> Runs:
    """Halves the dearest runs of several samples until there are `count`."""
    runs = list(runs)
    while len(runs) < count:
        dearest = max(
            (i for i, run in enumerate(runs) if len(run) > 1),
            key=lambda i: (PADDED.cost(lengths, runs[i], cost), -i),
        )
        run = runs[dearest]
        runs[dearest : dearest + 1] = [run[: len(run) // 2], run[len(run) // 2 :]]
    return runs
