"""Plans for fusion problems: the greedy one at once, better ones by search in C++ on all cores.

The guided search (`csrc/walker.h`) first shortens the makespan until it meets the lower bound,
then lowers the peak of activation memory at that makespan, and ends when that is at its bound too
or the budget is spent. What it returns is never longer than the greedy plan or back-to-back 1F1B,
where that keeps to the memory limits.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rlhfuse import _planner
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.bounds import least_memory, lower_bound
from megatron_rlhfuse.schedule.errors import InfeasibleError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline
from megatron_rlhfuse.schedule.network import ScheduleRow, TickedProblem, to_network
from megatron_rlhfuse.schedule.problem import Problem

WALKS = 8
"""Of a search bounded by turns: its result must not depend on the number of cores."""

SLICE_SECONDS = 0.2
"""Time between two reports of progress, in which Ctrl-C is not heard."""

SLICE_TURNS = 64 * WALKS
"""Turns between two reports where turns bound the search."""

MAKESPAN_SHARE = 0.5
"""Share of the budget after which the search turns to memory though the bound is not met."""


@dataclass(frozen=True)
class Progress:
    """How far a search is: best so far, in the user's units."""

    seconds: float
    turns: int
    makespan: float
    peak_activation: float
    lower_bound: float


@dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
        timeline: the best plan, timed by the reference evaluator
        greedy: the makespan of the greedy plan
        lower_bound: no plan is shorter
        least_memory: no plan of at most this makespan has a lower peak
        turns: list schedules made, in pairs of one backwards and one forwards
    """

    timeline: Timeline
    greedy: float
    lower_bound: float
    least_memory: float
    seconds: float
    turns: int


def greedy(problem: Problem) -> Timeline:
    """The best of a few list schedules, in milliseconds; no stage holds more than under 1F1B.

    Raises InfeasibleError if the limits do not admit one micro-batch of every pipeline alone.
    """
    ticked = to_network(problem)
    return ticked.timeline(_greedy(ticked))


def search(
    problem: Problem,
    *,
    seconds: float | None = None,
    iterations: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    stop_at_bound: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The best plan found within `seconds` or `iterations` (turns of the walks), whichever ends.

    Bounded by iterations alone the result depends on problem, seed and iterations only.

    Args:
        threads: all cores by default
        stop_at_bound: end when the makespan meets its lower bound; the memory is left as it is

    Raises InfeasibleError if the memory limits do not admit one micro-batch of every pipeline
    alone, ScheduleError for a budget that is none.
    """
    began = time.monotonic()
    if seconds is None and iterations is None:
        raise ScheduleError("search: want a budget, seconds or iterations")
    budget = _Budget(began, math.inf if seconds is None else seconds, iterations)
    threads = threads or os.cpu_count() or 1
    ticked = to_network(problem)
    first = _greedy(ticked)
    goal = int(lower_bound(ticked.ticks))
    floor = int(least_memory(ticked.ticks, goal))
    walks = WALKS if seconds is None else threads
    engine = _planner.Search(ticked.network, goal, floor, ticked.limits, seed, walks)
    engine.offer(first)
    fallback = ticked.row(one_f_one_b(problem))
    if _keeps_limits(ticked, fallback):
        engine.offer(fallback)

    def run(tighten: bool, share: float) -> None:
        while not budget.spent(share) and not (engine.done if tighten else engine.at_bound):
            budget.turns += engine.run(threads, *budget.slice(share), tighten)
            if progress is not None:
                _, makespan, peak = engine.best()
                progress(
                    Progress(
                        seconds=time.monotonic() - began,
                        turns=budget.turns,
                        makespan=makespan * ticked.time_unit,
                        peak_activation=peak * ticked.memory_unit,
                        lower_bound=goal * ticked.time_unit,
                    )
                )

    run(tighten=False, share=1.0 if stop_at_bound else MAKESPAN_SHARE)
    if not stop_at_bound:
        run(tighten=True, share=1.0)
    timeline = ticked.timeline(engine.best())
    return Result(
        timeline=timeline,
        greedy=ticked.timeline(first).makespan,
        lower_bound=lower_bound(problem),
        least_memory=least_memory(problem, timeline.makespan),
        seconds=time.monotonic() - began,
        turns=budget.turns,
    )


@dataclass
class _Budget:
    began: float
    seconds: float
    iterations: int | None
    turns: int = 0

    def spent(self, share: float) -> bool:
        seconds, turns = self._left(share)
        return seconds <= 0 or turns <= 0

    def slice(self, share: float) -> tuple[float, int]:
        """Seconds and turns until the next report."""
        seconds, turns = self._left(share)
        if math.isinf(self.seconds):
            return math.inf, min(turns, SLICE_TURNS)
        return min(seconds, SLICE_SECONDS), turns

    def _left(self, share: float) -> tuple[float, int]:
        seconds = self.seconds * share - (time.monotonic() - self.began)
        if self.iterations is None:
            return seconds, 2**62
        return seconds, math.ceil(self.iterations * share) - self.turns


def _greedy(ticked: TickedProblem) -> ScheduleRow:
    row = _planner.greedy(ticked.network, ticked.limits)
    if row[1] == _planner.FAILED:
        raise InfeasibleError("memory_limit: no schedule was found under it")
    return row


def _keeps_limits(ticked: TickedProblem, row: ScheduleRow) -> bool:
    timeline = ticked.timeline(row)
    return all(
        peak <= limit
        for peak, limit in zip(timeline.peak_activation, ticked.problem.memory_limit, strict=True)
    )
