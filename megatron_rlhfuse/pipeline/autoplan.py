"""Which plan a fused pipeline runs: measure, plan beside the training, then keep to the plan.

1. The first step runs back-to-back 1F1B, which takes no more memory than training the models one
   after the other, and measures what every micro-batch holds and how long it takes.
2. The next `profile_steps` steps run the greedy plan of those numbers, and measure again: stages
   take longer while other ranks of the same machine work too.
3. Rank 0 searches in a thread, for `search_seconds`; training goes on with the greedy plan.
4. The plan found is broadcast, kept on disk, and run from then on.

Where a plan is not shorter than back-to-back 1F1B, that is run instead, if it fits the memory; also
where no plan fits it. The first step, whose memory nobody knows yet, runs it in any case.
A plan that was given is run from the first step, one that is found on disk from the second. Where
other numbers of micro-batches have shown what these stages cost, point 1 is left out.

Every rank goes through the same states in the same steps: all that a decision depends on was
gathered or broadcast before. Which plan runs never changes what is computed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.background_search import BackgroundSearch
from megatron_rlhfuse.pipeline.devices import DeviceMap
from megatron_rlhfuse.pipeline.errors import PlanMismatchError
from megatron_rlhfuse.pipeline.plan_cache import PlanCache
from megatron_rlhfuse.pipeline.plan_choice import greedy_plan, or_1f1b
from megatron_rlhfuse.pipeline.plan_file import check_plan, from_rank_0, read_plan
from megatron_rlhfuse.pipeline.profile import (
    Costs,
    gather_costs,
    least_free_memory,
    make_problem,
    median_costs,
    unmeasured_problem,
)
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.lowering import forward_only, lower
from megatron_rlhfuse.schedule.order import Order, parse_order
from megatron_rlhfuse.schedule.plan import make_plan, parse_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.program import Program
from megatron_rlhfuse.schedule.replay import prove

MEMORY_SHARE = 0.9
"""Of a GPU's free memory, for activations: the rest is for what kernels need for the moment."""


@dataclass(frozen=True)
class PlanOptions:
    """How a pipeline gets its plan.

    Attributes:
        plan: a file that `rlhfuse plan` wrote; None plans by itself
        search_seconds: budget of the search on rank 0, which trains meanwhile; 0 keeps the greedy
            plan
        search_threads: of that search
        profile_steps: steps to measure under the greedy plan; 0 keeps that of the first step's
            numbers, without a search
        cache: folder of plans; None keeps none
        memory_limit: bytes of activations that a rank may hold, both models together; None takes
            MEMORY_SHARE of what is free on a GPU after the first step, on a CPU no limit
        receives_ahead: receives posted before the first of a channel is waited for
    """

    plan: Path | str | None = None
    search_seconds: float = 10.0
    search_threads: int = 1
    profile_steps: int = 3
    cache: Path | str | None = None
    memory_limit: float | None = None
    receives_ahead: int = field(default_factory=platform.receives_ahead)


class AutoPlan:
    """The plan of one problem, through a job. COLLECTIVE calls are marked."""

    def __init__(
        self,
        devices: DeviceMap,
        micro_batches: Sequence[int],
        options: PlanOptions,
        key: Mapping[str, Any],
        measure_transfer: Callable[[], float],
        costs: Costs | None = None,
        may_search: Callable[[], bool] = lambda: True,
    ) -> None:
        """`key`: what else the times depend on, for the cache; rank 0's is taken.
        `measure_transfer`: seconds of a hop, COLLECTIVE. `costs`: what these stages cost with
        other numbers of micro-batches, in the place of the first step. `may_search`: whether a
        search may start, the same on every rank."""
        self._devices = devices
        self._micro_batches = tuple(micro_batches)
        self._options = options
        self._cache = PlanCache(options.cache) if options.cache is not None else None
        self._key = {
            **key,
            "micro_batches": list(micro_batches),
            "pipelines": devices.pipelines,
            "groups": len(devices.groups),
            "memory_limit": str(options.memory_limit),
        }
        self._measure_transfer = measure_transfer
        self._transfer = 0.0
        self._least_free = math.inf
        self._may_search = may_search
        self._steps = [costs] if costs is not None else []
        self._search: BackgroundSearch | None = None
        self._programs: dict[bool, list[Program]] = {}
        self.timeline: Timeline
        """The plan, with its times in seconds; before the first step was measured, without."""
        self.source = ""
        """1f1b, greedy, search, cache or file."""
        self.is_measured = False
        """Whether the times of `timeline` are measured ones."""
        self._begun = self._settled = self._is_metered = False
        self._cached_order: Order | None = None
        self._planned_with = 0
        """How many measured steps the plan knows of."""

    @property
    def profiling(self) -> bool:
        """Whether the coming step is to be timed."""
        measured = len(self._steps) > self._options.profile_steps  # and waits for its search
        return not (measured or self._settled or self.is_searching)

    @property
    def is_searching(self) -> bool:
        """Whether a search is going on."""
        return self._search is not None

    @property
    def costs(self) -> Costs | None:
        """What a step costs on this rank, by those measured so far; None before the first."""
        return median_costs(self._steps[1:] or self._steps) if self._steps else None

    @property
    def measured_steps(self) -> int:
        return len(self._steps)

    @property
    def measures_memory(self) -> bool:
        """Whether the coming step is to be metered."""
        return self.profiling and not self._is_metered

    def program(self, device: int, forward: bool) -> Program:
        """What a device runs; `forward`: its forwards alone."""
        if forward not in self._programs:
            problem, order = self.timeline.problem, self.timeline.order
            if forward:
                order = forward_only(order)
            programs = lower(problem, order, self._options.receives_ahead)
            prove(programs)
            self._programs[forward] = programs
        return self._programs[forward][device]

    def before_step(self) -> None:
        """Takes up a plan that has become ready, or makes one of what was measured. COLLECTIVE.

        Raises PlanMismatchError or ScheduleError, on every rank, for a plan that cannot be run.
        """
        if not self._begun:
            self._begin()
            self._begun = True
        if self._search is not None:
            self.take_up_search()
        elif not self._settled and len(self._steps) > self._planned_with:
            self._plan()

    def after_step(self, costs: Costs | None) -> None:
        """Takes down what a step has cost on this rank, if it was timed."""
        if costs is not None and self.profiling:
            self._steps.append(costs)
            self._is_metered = True

    def close(self) -> None:
        """Ends a search that is still going on."""
        if self._search is not None:
            self._search.stop()

    def _plan(self) -> None:
        """Makes a plan where enough was measured. COLLECTIVE.

        Before a step, not after one: the optimizers have their states by then, and what memory is
        free will stay free.
        """
        measured = len(self._steps)
        searches = measured > 1 and self._options.search_seconds > 0
        if searches and measured > self._options.profile_steps and not self._may_search():
            return
        self._planned_with = measured
        if measured == 1:
            self._transfer = self._measure_transfer()
            problem = self._gather(self._steps)
            if self.source == "file":
                self._settle(evaluate(problem, self.timeline.order), "file", measured=True)
            elif not self._take_up_cached(problem):
                self._adopt(*greedy_plan(problem), measured=True)
                self._settled = self._options.profile_steps == 0
        # The first step made buffers and warmed caches: what the others say is truer.
        elif measured > self._options.profile_steps:
            problem = self._gather(self._steps[1:])
            self._adopt(*greedy_plan(problem), measured=True)
            if self._options.search_seconds > 0:
                self._search = BackgroundSearch(
                    problem, self._options.search_seconds, self._options.search_threads
                )
            else:
                self._settled = True

    def _take_up_cached(self, problem: Problem) -> bool:
        """Settles for the plan of an earlier run, if there is one and it fits what is free now."""
        if self._cached_order is None:
            return False
        timeline, source = or_1f1b(evaluate(problem, self._cached_order), "cache")
        if timeline.over_limit() is not None:
            return False
        self._settle(timeline, source, measured=True)
        return True

    def _begin(self) -> None:
        if self._options.plan is not None:
            # Run from the first step, and timed in it: a file's times may be in any unit.
            timeline = read_plan(self._options.plan, self._devices, self._micro_batches)
            self._adopt(timeline, "file", measured=False)
            return
        text = from_rank_0(self._cached)
        if text:
            self._cached_order = parse_plan(json.loads(text)).timeline.order
        problem = unmeasured_problem(self._devices, self._micro_batches)
        self._adopt(evaluate(problem, one_f_one_b(problem)), "1f1b", measured=False)

    def _cached(self) -> str:
        plan = self._cache.load(self._key) if self._cache is not None else None
        if plan is None:
            return ""
        try:
            check_plan(plan.timeline, self._devices, self._micro_batches)
        except (PlanMismatchError, ScheduleError):
            return ""
        return json.dumps(plan_to_json(plan))

    def _gather(self, steps: Sequence[Costs]) -> Problem:
        costs, transfer = gather_costs(self._devices, median_costs(steps), self._transfer)
        limit = self._memory_limit()
        return make_problem(self._devices, self._micro_batches, costs, transfer, limit)

    def _memory_limit(self) -> float:
        """What was given, else a share of the least that was ever free. COLLECTIVE."""
        if self._options.memory_limit is not None:
            return self._options.memory_limit
        self._least_free = min(self._least_free, least_free_memory())
        return MEMORY_SHARE * self._least_free

    def take_up_search(self) -> None:
        """Takes what a search has found, once it is done; nothing without one. COLLECTIVE."""
        search_ = self._search
        if search_ is None:
            return
        text = from_rank_0(lambda: search_.result_text() if search_.is_done else "")
        if not text:
            return
        search_.stop()
        self._search = None
        found = json.loads(text)
        if found["order"] is None:
            self._settled = True
            return
        problem = self.timeline.problem
        timeline = evaluate(problem, parse_order(problem, found["order"]))
        greedy_makespan = self.timeline.makespan
        self._settle(*or_1f1b(timeline, "search"), measured=True)
        fits = self.timeline.over_limit() is None
        if self._cache is not None and fits and dist.get_rank() == 0:
            plan = make_plan(self.timeline, greedy=greedy_makespan, seconds=found["seconds"])
            self._cache.store(self._key, plan)

    def _settle(self, timeline: Timeline, source: str, *, measured: bool) -> None:
        self._adopt(timeline, source, measured=measured)
        self._settled = True

    def _adopt(self, timeline: Timeline, source: str, *, measured: bool) -> None:
        # Programs know no times: an order that only got new ones keeps those it has.
        if self._programs and timeline.order != self.timeline.order:
            self._programs = {}
        self.timeline, self.source, self.is_measured = timeline, source, measured
