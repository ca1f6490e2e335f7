"""The trade between time and memory: plans of which none is better in both.

Every point is a search of its own under a cap on the activation memory of all devices, from the
least that any schedule needs up to what the shortest plan takes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from megatron_rlhfuse.schedule.bounds import one_micro_batch
from megatron_rlhfuse.schedule.errors import InfeasibleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.order import Order
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.search import Progress, StopSearch, search

POINTS = 16
"""Caps tried; the front has at most one point more."""

FIRST_SHARE = 0.25
"""Share of the budget for the shortest plan, whose memory ends the range of caps."""


def pareto(
    problem: Problem,
    *,
    seconds: float | None = None,
    iterations: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> list[Timeline]:
    """Plans by rising makespan and falling peak memory; budgets as in `search`.

    A callback that raises StopSearch ends the search with the points found so far. Raises what
    `search` raises.
    """
    stopped = False

    def watch(now: Progress) -> None:
        nonlocal stopped
        try:
            if progress is not None:
                progress(now)
        except StopSearch:
            stopped = True
            raise

    def best_under(cap: float | None, share: float, start: Order | None = None) -> Timeline:
        capped = problem
        if cap is not None:
            limits = tuple(min(limit, cap) for limit in problem.memory_limit)
            capped = replace(problem, memory_limit=limits)
        found = search(
            capped,
            seconds=None if seconds is None else seconds * share,
            iterations=None if iterations is None else max(1, round(iterations * share)),
            threads=threads,
            seed=seed,
            start=start,
            progress=watch,
        )
        return evaluate(problem, found.timeline.order)

    shortest = best_under(None, FIRST_SHARE)
    found = [shortest]
    highest = max(shortest.peak_activation)
    lowest = one_micro_batch(problem)
    for point in range(POINTS):
        cap = lowest + (highest - lowest) * point / POINTS
        try:
            # What a lower cap admitted is a start under this one.
            start = found[-1].order if len(found) > 1 else None
            found.append(best_under(cap, (1 - FIRST_SHARE) / POINTS, start))
        except InfeasibleError:
            continue  # the cap is below what the first micro-batch of some pipeline takes
        if stopped:
            break
    return front(found)


def front(timelines: list[Timeline]) -> list[Timeline]:
    """Those that no other beats in makespan or peak memory without losing in the other."""
    kept: list[Timeline] = []
    for timeline in sorted(timelines, key=lambda t: (t.makespan, max(t.peak_activation))):
        if not kept or max(timeline.peak_activation) < max(kept[-1].peak_activation):
            kept.append(timeline)
    return kept
