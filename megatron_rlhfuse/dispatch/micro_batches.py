"""Samples cut into micro-batches, and these dealt out to data-parallel replicas. PURE.

Invariants
- every sample is in exactly one micro-batch of exactly one replica;
- all replicas have equally many micro-batches: a pipeline's schedule is the same on all of them;
- rows: every micro-batch has exactly so many samples; tokens: none has more, padding included;
- the result depends on lengths and arguments alone, so every rank finds the same without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlhfuse.dispatch.balance import balance
from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import PADDED, Layout, Runs
from megatron_rlhfuse.dispatch.packed import share_rows, share_tokens
from megatron_rlhfuse.dispatch.padded import cut_rows, cut_tokens


@dataclass(frozen=True)
class Limit:
    """How large a micro-batch may be: `rows` samples exactly, or `tokens` at most."""

    rows: int | None = None
    tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.rows is None) == (self.tokens is None):
            raise ValueError("limit: want rows or tokens, and not both")
        if (self.tokens if self.rows is None else self.rows) < 1:  # type: ignore[operator]
            raise ValueError(f"limit: want at least 1, got {self}")


def deal(
    lengths: Sequence[int],
    replicas: int,
    limit: Limit,
    cost: SequenceCost,
    layout: Layout = PADDED,
    beside_another: bool = False,
) -> list[Runs]:
    """The micro-batches of each replica, in the order in which they are to run.

    Args:
        lengths: tokens of each sample, at least 1
        beside_another: another model's pipeline may fill this one's gaps

    Raises:
        ValueError: the samples do not divide evenly over replicas and rows, or one is longer than
            the limit of tokens; names which
    """
    if len(lengths) % (replicas * (limit.rows or 1)):
        raise ValueError(
            f"{len(lengths)} samples do not divide into {replicas} replicas"
            + (f" with micro-batches of {limit.rows}" if limit.rows else "")
        )
    if limit.tokens is not None and lengths and max(lengths) > limit.tokens:
        sample = lengths.index(max(lengths))
        raise ValueError(
            f"sample {sample} has {lengths[sample]} tokens, more than a micro-batch's "
            f"{limit.tokens}"
        )
    if limit.rows is not None:
        packed = layout.packed
        runs = share_rows(lengths, limit.rows, cost) if packed else cut_rows(lengths, limit.rows)
    else:
        assert limit.tokens is not None
        form = share_tokens if layout.packed else cut_tokens
        runs = form(lengths, limit.tokens, replicas, cost)
    costs = [layout.cost(lengths, run, cost) for run in runs]
    order = fused_order if beside_another else pipeline_order
    return [
        [runs[i] for i in order([costs[i] for i in group], group)]
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
        micro_batches: of a replica
    """

    tokens: int
    computed: int
    imbalance: float
    micro_batches: int


def measure(
    lengths: Sequence[int], dealt: Sequence[Runs], cost: SequenceCost, layout: Layout = PADDED
) -> Figures:
    """Of what `deal` returned."""
    costs = [sum(layout.cost(lengths, run, cost) for run in runs) for runs in dealt]
    return Figures(
        sum(lengths),
        sum(layout.tokens(lengths, run) for runs in dealt for run in runs),
        max(costs) * len(costs) / sum(costs),
        len(dealt[0]),
    )


def pipeline_order(costs: Sequence[float], items: Sequence[int]) -> list[int]:
    """The items with the cheapest at both ends and the dearest in the middle.

    A pipeline waits for the forward of its first micro-batch on all stages but one, and for the
    backward of its last; in between neighbours of like cost leave the smallest gaps.
    """
    ascending = _ascending(costs, items)
    return [items[i] for i in (*ascending[::2], *ascending[1::2][::-1])]


def fused_order(costs: Sequence[float], items: Sequence[int]) -> list[int]:
    """The items from the cheapest to the dearest.

    The other model's micro-batches are at work while a pipeline fills and drains, so what counts is
    the middle, where a plan made for equal micro-batches loses least if costs never fall
    (benchmarks/dispatch_pipeline.py compares).
    """
    return [items[i] for i in _ascending(costs, items)]


def _ascending(costs: Sequence[float], items: Sequence[int]) -> list[int]:
    return sorted(range(len(items)), key=lambda i: (costs[i], items[i]))
