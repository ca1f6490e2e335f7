"""Plans for fusion problems: the greedy one at once, better ones by search in C++ on all cores.

The guided search (`csrc/planner/walker.h`) first shortens the makespan until it meets the lower
bound, then lowers the peak of activation memory at that makespan, and ends when that is at its
bound too or the budget is spent. What it returns is never longer than the greedy plan or back-to-
back 1F1B, where that keeps to the memory limits."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from megatron_rlhfuse import _planner
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.bounds import least_memory, lower_bound
from megatron_rlhfuse.schedule.errors import InfeasibleError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.network import ScheduleRow, TickedProblem, to_network
from megatron_rlhfuse.schedule.order import Subtask
from megatron_rlhfuse.schedule.problem import Problem

WALKS = 8
"""Of a search bounded by turns: its result must not depend on the number of cores."""

MOST_THREADS = 1024

SLICE_SECONDS = 0.2
"""Time between two reports of progress, in which Ctrl-C is not heard."""

SLICE_TURNS = 64 * WALKS
"""Turns between two reports where turns bound the search, of a problem that is not large."""

SLICE_SUBTASKS = 2**22
"""Subtasks scheduled between two reports, at most, of a large one."""

SLICE_SWAPS = 100_000
"""The same for an annealing, whose steps are much smaller."""

MAKESPAN_SHARE = 0.5
"""Share of the budget after which the search turns to memory though the bound is not met."""


class StopSearch(Exception):  # noqa: N818, it is a request, not an error
    """Raised by a `progress` callback: the search returns the best plan so far."""


@dataclass(frozen=True)
class Progress:
    """How far a search is: the best so far, in the problem's units."""

    seconds: float
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
        turns: steps of the search, in its `unit`
    """

    timeline: Timeline
    greedy: float
    lower_bound: float
    least_memory: float
    seconds: float
    turns: int
    unit: str


class _Engine(Protocol):
    """What the searches of `_planner` have in common."""

    def run(self, threads: int, seconds: float, turns: int, tighten: bool) -> int: ...
    def best(self) -> ScheduleRow: ...
    @property
    def at_bound(self) -> bool: ...
    @property
    def done(self) -> bool: ...


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
    start: Sequence[Sequence[Subtask]] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The best plan found within `seconds` or `iterations`, whichever ends first.

    An iteration is a turn of a walk: two list schedules, one backwards and one forwards. Bounded
    by iterations alone, the result depends on problem, seed and iterations only.

    Args:
        threads: all cores by default
        stop_at_bound: end when the makespan meets its lower bound; the memory is left as it is
        start: an order to improve upon; left aside if it exceeds the limits

    Raises InfeasibleError if the memory limits do not admit one micro-batch of every pipeline
    alone, ScheduleError for a budget that is none.
    """
    turns = max(WALKS, min(SLICE_TURNS, SLICE_SUBTASKS // problem.subtasks))
    budget = _Budget(seconds, iterations, turns)
    threads = _threads(threads, seed)
    ticked = to_network(problem)
    first = _greedy(ticked)
    bound = lower_bound(problem)
    goal, floor = _goal(ticked)
    walks = WALKS if seconds is None else threads
    engine = _planner.Search(ticked.network, goal, floor, ticked.limits, seed, walks)
    engine.offer(first)
    for order in (one_f_one_b(problem), start):
        if order is not None and evaluate(problem, order).over_limit() is None:
            engine.offer(ticked.row(order))
    _drive(engine, ticked, budget, threads, stop_at_bound, bound, progress)
    return _result(engine, ticked, first, bound, budget, "turns")


def anneal(
    problem: Problem,
    *,
    seconds: float | None = None,
    iterations: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    stop_at_bound: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Result:
    """The paper's search, to compare with: two simulated annealings from the greedy plan.

    RLHFuse (NSDI '25), section 5.3: random swaps of neighbours on a device; the first annealing
    shortens the makespan, the second lowers the peak memory and never lengthens it. An iteration
    is a swap tried. Arguments and errors as in `search`; with `seconds` each of `threads` anneals
    by itself, from another seed, and the best is taken; else one anneals.
    """
    budget = _Budget(seconds, iterations, SLICE_SWAPS)
    threads = _threads(threads, seed)
    ticked = to_network(problem)
    first = _greedy(ticked)
    bound = lower_bound(problem)
    goal, floor = _goal(ticked)
    count = 1 if seconds is None else threads
    # What each chain gets for each of its two annealings, to cool down over.
    share = _planner.UNPLANNED if iterations is None else max(1, iterations // 2 // count)
    chains = [
        _planner.Annealing(
            ticked.network,
            goal,
            floor,
            ticked.limits,
            first,
            seed + chain,
            1.0 if seconds is None else seconds * MAKESPAN_SHARE,
            share,
        )
        for chain in range(count)
    ]
    with ThreadPoolExecutor(len(chains)) as pool:
        engine = _Chains(chains, pool, goal, floor)
        _drive(engine, ticked, budget, threads, stop_at_bound, bound, progress)
    return _result(engine, ticked, first, bound, budget, "swaps")


class _Chains:
    """Annealings side by side, as one engine."""

    def __init__(
        self, chains: list[_planner.Annealing], pool: Executor, makespan: int, memory: int
    ) -> None:
        self._chains = chains
        self._pool = pool
        self._goal = makespan, memory

    def run(self, threads: int, seconds: float, turns: int, tighten: bool) -> int:
        share = max(1, turns // len(self._chains))
        return sum(self._pool.map(lambda chain: chain.run(seconds, share, tighten), self._chains))

    def best(self) -> ScheduleRow:
        return min((chain.best() for chain in self._chains), key=lambda row: row[1:])

    @property
    def at_bound(self) -> bool:
        return self.best()[1] <= self._goal[0]

    @property
    def done(self) -> bool:
        return self.best()[1:] <= self._goal


def _drive(
    engine: _Engine,
    ticked: TickedProblem,
    budget: _Budget,
    threads: int,
    stop_at_bound: bool,
    bound: float,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Runs the engine until its goal is met or the budget is spent: makespan first, then memory."""

    def run(tighten: bool, share: float) -> None:
        while not budget.spent(share) and not (engine.done if tighten else engine.at_bound):
            turns = engine.run(threads, *budget.slice(share), tighten)
            budget.turns += turns
            if turns == 0:
                break  # an annealing's goal: it asks for memory at the bound, at any makespan
            if progress is not None:
                _, makespan, peak = engine.best()
                progress(
                    Progress(
                        seconds=budget.elapsed(),
                        makespan=makespan * ticked.time_unit,
                        peak_activation=peak * ticked.memory_unit,
                        lower_bound=bound,
                    )
                )

    try:
        run(tighten=False, share=1.0 if stop_at_bound else MAKESPAN_SHARE)
        if not stop_at_bound:
            run(tighten=True, share=1.0)
    except StopSearch:
        pass


def _result(
    engine: _Engine,
    ticked: TickedProblem,
    first: ScheduleRow,
    bound: float,
    budget: _Budget,
    unit: str,
) -> Result:
    timeline = ticked.timeline(engine.best())
    return Result(
        timeline=timeline,
        greedy=ticked.timeline(first).makespan,
        lower_bound=bound,
        least_memory=least_memory(ticked.problem, timeline.makespan),
        seconds=budget.elapsed(),
        turns=budget.turns,
        unit=unit,
    )


def _threads(threads: int | None, seed: int) -> int:
    """How many threads to use. Raises ScheduleError for numbers that make no search."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise ScheduleError(f"threads: want a whole number from 1 to {MOST_THREADS}, got {threads}")
    if not 0 <= seed < 2**63:
        raise ScheduleError(f"seed: want a whole number from 0 and below 2**63, got {seed}")
    return threads or min(MOST_THREADS, len(os.sched_getaffinity(0)))


class _Budget:
    """What may still be spent, in seconds and in steps of the search."""

    def __init__(self, seconds: float | None, turns: int | None, slice_turns: int) -> None:
        if seconds is None and turns is None:
            raise ScheduleError("search: want a budget, seconds or iterations")
        if seconds is not None and not seconds > 0:
            raise ScheduleError(f"seconds: want a number above 0, got {seconds:g}")
        if turns is not None and turns < 1:
            raise ScheduleError(f"iterations: want a whole number from 1, got {turns}")
        self._began = time.monotonic()
        self._seconds = math.inf if seconds is None else seconds
        self._most_turns = turns
        self._slice_turns = slice_turns
        self.turns = 0

    def elapsed(self) -> float:
        return time.monotonic() - self._began

    def spent(self, share: float) -> bool:
        seconds, turns = self._left(share)
        return seconds <= 0 or turns <= 0

    def slice(self, share: float) -> tuple[float, int]:
        """Seconds and turns until the next report."""
        seconds, turns = self._left(share)
        if math.isinf(self._seconds):
            return math.inf, min(turns, self._slice_turns)
        return min(seconds, SLICE_SECONDS), turns

    def _left(self, share: float) -> tuple[float, int]:
        seconds = self._seconds * share - self.elapsed()
        if self._most_turns is None:
            return seconds, 2**62
        return seconds, math.ceil(self._most_turns * share) - self.turns


def _goal(ticked: TickedProblem) -> tuple[int, int]:
    """The lower bounds of makespan and of peak memory at that makespan, in ticks."""
    goal = lower_bound(ticked.ticks)
    return int(goal), int(least_memory(ticked.ticks, goal))


def _greedy(ticked: TickedProblem) -> ScheduleRow:
    row = _planner.greedy(ticked.network, ticked.limits)
    if row[1] == _planner.FAILED:
        raise InfeasibleError("memory_limit: no schedule was found under it")
    return row
