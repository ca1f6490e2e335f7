"""Samples cut into micro-batches, and these dealt out to data-parallel replicas. PURE.

A micro-batch is padded to its longest sample, so samples of like length share one: sorted by
length and cut into runs. That is optimal for padding: with any other cut, exchanging two samples
towards the sorted order does not lengthen either run.

Invariants
- every sample is in exactly one micro-batch of exactly one replica;
- all replicas have equally many micro-batches: a pipeline's schedule is the same on all of them;
- rows: every micro-batch has exactly so many samples; tokens: none has more when padded;
- the result depends on lengths and arguments alone, so every rank finds the same without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlhfuse.dispatch.balance import balance
from megatron_rlhfuse.dispatch.cost import SequenceCost

_HALVINGS = 50
"""Of the interval that holds the least cost: beyond a double's precision for any real batch."""

Runs = list[list[int]]
"""Samples by micro-batch."""


@dataclass(frozen=True)
class Limit:
    """How large a micro-batch may be: `rows` samples exactly, or `tokens` at most when padded."""

    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("limit: want rows or tokens, and not both")
        if (self.tokens if self.rows is None else self.rows) < 1:  # type: ignore[operator]
            raise ValueError(f"limit: want at least 1, got {self}")


def deal(lengths: Sequence[int], replicas: int, limit: Limit, cost: SequenceCost) -> list[Runs]:
    """The micro-batches of each replica, in the order in which they are to run.

    Args: lengths: tokens of each sample, at least 1

    Raises:
        ValueError: the samples do not divide evenly over replicas and rows, or one is longer than
            the limit of tokens; names which
    """
    if len(lengths) % (replicas * (limit.rows or 1)):
        raise ValueError(
            f"{len(lengths)} samples do not divide into {replicas} replicas"
            + (f" with micro-batches of {limit.rows}" if limit.rows else "")
        )
    runs = (
        _cut_rows(lengths, limit.rows)
        if limit.rows
        else _cut_tokens(lengths, limit.tokens or 0, replicas, cost)
    )
    costs = [padded_cost(lengths, run, cost) for run in runs]
    return [
        [runs[i] for i in pipeline_order([costs[i] for i in group], group)]
        for group in balance(costs, replicas, equal_counts=True)
    ]


def deal_in_order(samples: int, replicas: int, rows: int) -> list[Runs]:
    """The same without a look at lengths: consecutive samples share a micro-batch."""
    share = samples // replicas
    return [
        [list(range(start, start + rows)) for start in range(first, first + share, rows)]
        for first in range(0, samples, share)
    ]


@dataclass(frozen=True)
class Figures:
    """How well samples are dealt out.

    Attributes:
        tokens, computed: without and with padding
        imbalance: the dearest replica over the mean one
    """

    tokens: int
    computed: int
    imbalance: float


def measure(lengths: Sequence[int], dealt: Sequence[Runs], cost: SequenceCost) -> Figures:
    """Of what `deal` returned."""
    costs = [sum(padded_cost(lengths, run, cost) for run in runs) for runs in dealt]
    return Figures(
        sum(lengths),
        sum(padded_tokens(lengths, run) for runs in dealt for run in runs),
        max(costs) * len(costs) / sum(costs),
    )


def padded_tokens(lengths: Sequence[int], run: Sequence[int]) -> int:
    """Tokens that a micro-batch computes, padding included."""
    return len(run) * max(lengths[sample] for sample in run)


def padded_cost(lengths: Sequence[int], run: Sequence[int], cost: SequenceCost) -> float:
    """Of a micro-batch, padding included."""
    return len(run) * cost(max(lengths[sample] for sample in run))


def pipeline_order(costs: Sequence[float], items: Sequence[int]) -> list[int]:
    """The items with the cheapest at both ends and the dearest in the middle.

    A pipeline waits for the forward of its first micro-batch on all stages but one, and for the
    backward of its last; in between neighbours of like cost leave the smallest gaps.
    """
    ascending = sorted(range(len(items)), key=lambda i: (costs[i], items[i]))
    return [items[i] for i in (*ascending[::2], *ascending[1::2][::-1])]


def _falling(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))


def _cut_rows(lengths: Sequence[int], rows: int) -> Runs:
    order = _falling(lengths)
    return [order[start : start + rows] for start in range(0, len(order), rows)]


def _cut_tokens(lengths: Sequence[int], tokens: int, replicas: int, cost: SequenceCost) -> Runs:
    """The fewest runs, a multiple of `replicas`, of which the dearest is as cheap as possible."""
    order = _falling(lengths)
    if order and lengths[order[0]] > tokens:
        raise ValueError(
            f"sample {order[0]} has {lengths[order[0]]} tokens, more than a micro-batch's {tokens}"
        )
    best = _greedy(lengths, order, tokens, float("inf"), cost)
    count = -(-len(best) // replicas) * replicas
    low = max((cost(length) for length in lengths), default=0.0)
    high = max((padded_cost(lengths, run, cost) for run in best), default=0.0)
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
            key=lambda i: (padded_cost(lengths, runs[i], cost), -i),
        )
        run = runs[dearest]
        runs[dearest : dearest + 1] = [run[: len(run) // 2], run[len(run) // 2 :]]
    return runs
