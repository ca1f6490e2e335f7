"""How short a schedule can be at best: a lower bound on the makespan of every valid order.

A subtask cannot start before its head and leaves at least its tail to be done after its end. Each
device must run all its subtasks between heads and tails; how long it needs at least, if it may
interrupt them, is Jackson's preemptive schedule, which is optimal for one machine. The bound is
the largest over the devices. It contains RLHFuse's (NSDI '25, section 5.2): a device's earliest
start + its work + its shortest tail, and each pipeline's own 1F1B-shaped chain.

Heads and tails assume that every stage runs its forwards, its backwards and its weight gradients
in the order of micro-batches. That is no loss, for the optimum or for the memory:
- Take any valid schedule. On every stage and for each kind, number the micro-batches anew in the
  order in which they run there. Starts and ends stay as they are, so no device runs two subtasks
  at once, and the makespan stays.
- Let subtask u precede v in a pipeline (F on stage s - 1 and F on stage s, say), with a lag. By
  the k-th start of v, k instances of v have started, so the k instances of u that precede these
  had ended a lag earlier. So the k-th end of u is at least a lag before the k-th start of v: the
  precedence holds for the new numbers too.
- Memory counts how many micro-batches a stage holds, not which.
So all instances j <= k of what precedes v in the pipeline must run before v's k-th, and those
among them on v's own device take its time, one after the other, from their own heads on.

Rounding: sums of whole numbers are exact (below 2**53). For other times the error is of the order
of 1e-16 for each subtask of a device, far below the 1e-9 that `reaches` allows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from typing import NamedTuple

from megatron_rlhfuse.schedule.problem import Model, Problem

TOLERANCE = 1e-9
"""Relative: far above what rounding adds up to, far below what anybody can measure."""


def lower_bound(problem: Problem) -> float:
    """No valid order of `problem` has a shorter makespan; memory limits are left aside."""
    return max(preemptive_bound(jobs) for jobs in _device_jobs(problem))


def device_bounds(problem: Problem) -> list[float]:
    """Earliest start + all work + shortest tail of each device, [devices]; 0 where nothing runs.

    The largest names the bottleneck. Where `lower_bound` is above it, no single device's load
    keeps the makespan up, but the subtasks that wait for each other.
    """
    bounds = [0.0] * problem.devices
    for device, jobs in enumerate(_device_jobs(problem)):
        if jobs:
            head, tail = min(job.head for job in jobs), min(job.tail for job in jobs)
            bounds[device] = head + math.fsum(job.duration for job in jobs) + tail
    return bounds


def reaches(makespan: float, bound: float) -> bool:
    """Whether a makespan is at its lower bound, but for rounding."""
    return makespan <= bound * (1.0 + TOLERANCE)


class Job(NamedTuple):
    """A subtask as its device sees it: earliest start, duration, least time after its end."""

    head: float
    duration: float
    tail: float


def preemptive_bound(jobs: Iterable[Job]) -> float:
    """The least possible latest end + tail of jobs on one machine that may interrupt them.

    Jackson's preemptive schedule: always the job with the longest tail among those whose head has
    passed. It equals the largest, over all sets of jobs, of the earliest head + all durations +
    the shortest tail.
    """
    waiting = sorted(jobs, reverse=True)
    ready: list[tuple[float, float]] = []  # (-tail, time left)
    now = bound = 0.0
    while waiting or ready:
        if not ready:
            now = max(now, waiting[-1].head)
        while waiting and waiting[-1].head <= now:
            job = waiting.pop()
            heappush(ready, (-job.tail, job.duration))
        tail, left = heappop(ready)
        if waiting and waiting[-1].head < now + left:
            heappush(ready, (tail, left - (waiting[-1].head - now)))
            now = waiting[-1].head
        else:
            now += left
            bound = max(bound, now - tail)
    return bound


def least_memory(problem: Problem, makespan: float) -> float:
    """No valid order of at most this makespan has a lower peak of activation memory.

    By the time t a stage has started at least the forwards that must start by then to be in time,
    and has ended at most the backwards (W, where split) that can have ended: it holds at least
    the difference. The bound is the largest sum over the stages of a device, at any t.
    """
    slack = TOLERANCE * makespan
    # Of each device: (time, whether a forward starts, stage), stages numbered over all pipelines.
    events: list[list[tuple[float, bool, int]]] = [[] for _ in range(problem.devices)]
    sizes: list[float] = []
    for model, pipeline, jobs in _pipelines(problem):
        for stage, device in enumerate(pipeline):
            number = len(sizes)
            sizes.append(model.activation[stage])
            for job in jobs["F", stage]:
                latest_start = makespan - job.tail - job.duration
                events[device].append((latest_start + slack, True, number))
            for job in jobs[model.kinds[-1], stage]:
                earliest_end = job.head + job.duration
                events[device].append((earliest_end - slack, False, number))
    bound = one_micro_batch(problem)
    for its_events in events:
        balance = dict.fromkeys((number for _, _, number in its_events), 0)
        for _, starts, number in sorted(its_events):
            balance[number] += 1 if starts else -1
            if starts:
                held_now = (sizes[n] * max(0, count) for n, count in balance.items())
                bound = max(bound, math.fsum(held_now))
    return bound


def one_micro_batch(problem: Problem) -> float:
    """The most that one micro-batch holds on a device: no schedule of any length takes less."""
    most = 0.0
    for model in problem.models:
        for pipeline in model.pipelines:
            held = dict.fromkeys(pipeline, 0.0)
            for stage, device in enumerate(pipeline):
                held[device] += model.activation[stage]
            most = max(most, *held.values())
    return most


def _device_jobs(problem: Problem) -> list[list[Job]]:
    """All subtasks of each device, [devices]."""
    jobs: list[list[Job]] = [[] for _ in range(problem.devices)]
    for _, pipeline, its_jobs in _pipelines(problem):
        for (_, stage), stage_jobs in its_jobs.items():
            jobs[pipeline[stage]].extend(stage_jobs)
    return jobs


def _pipelines(problem: Problem) -> Iterator[tuple[Model, tuple[int, ...], _Jobs]]:
    """Every pipeline with its model and jobs."""
    for model in problem.models:
        alike: dict[tuple[int, ...], _Jobs] = {}  # copies mostly share their shape
        for pipeline in model.pipelines:
            shape = tuple(pipeline.index(device) for device in pipeline)
            if shape not in alike:
                alike[shape] = _pipeline_jobs(model, shape, problem.p2p)
            yield model, pipeline, alike[shape]


@dataclass(frozen=True)
class _Graph:
    """What a micro-batch runs in one pipeline, numbered so that predecessors come first.

    Attributes:
        places: the device of each node; only equality counts
        durations: time of each node
        edges: (u, v, lag): v starts at least `lag` after the end of u
    """

    places: list[int]
    durations: list[float]
    edges: list[tuple[int, int, float]]

    def reversed(self) -> _Graph:
        """The same with time running backwards."""
        last = len(self.places) - 1
        edges = [(last - v, last - u, lag) for u, v, lag in self.edges]
        return _Graph(self.places[::-1], self.durations[::-1], edges)


_Jobs = dict[tuple[str, int], list[Job]]
"""The jobs of a pipeline by kind and stage, each list in the order of micro-batches."""


def _pipeline_jobs(model: Model, shape: Sequence[int], p2p: float) -> _Jobs:
    """The jobs of a pipeline; stages on the same device have the same `shape`."""
    stages = list(range(model.stages))
    nodes = [("F", s) for s in stages] + [("B", s) for s in stages[::-1]]
    edges = [
        (i, i + 1, 0.0 if shape[s] == shape[t] else p2p)
        for i, ((_, s), (_, t)) in enumerate(pairwise(nodes))
    ]
    if "W" in model.kinds:
        edges += [(nodes.index(("B", s)), len(nodes) + s, 0.0) for s in stages]
        nodes += [("W", s) for s in stages]
    durations = [model.duration(kind, stage) for kind, stage in nodes]
    graph = _Graph([shape[stage] for _, stage in nodes], durations, edges)
    heads = _heads(graph, model.micro_batches)
    tails = [times[::-1] for times in _heads(graph.reversed(), model.micro_batches)[::-1]]
    return {
        node: [Job(h, duration, t) for h, t in zip(its_heads, its_tails, strict=True)]
        for node, duration, its_heads, its_tails in zip(nodes, durations, heads, tails, strict=True)
    }


def _heads(graph: _Graph, micro_batches: int) -> list[list[float]]:
    """Earliest starts, [nodes][micro_batches], were the pipeline alone on its devices."""
    incoming: list[list[tuple[int, float]]] = [[] for _ in graph.places]
    for u, v, lag in graph.edges:
        incoming[v].append((u, lag))
    ancestors: list[int] = []  # of each node, as a set of bits
    heads: list[list[float]] = []
    for v, place in enumerate(graph.places):
        above = 0
        ready = [0.0] * micro_batches
        for u, lag in incoming[v]:
            above |= ancestors[u] | 1 << u
            after = graph.durations[u] + lag
            ready = [max(r, h + after) for r, h in zip(ready, heads[u], strict=True)]
        ancestors.append(above)
        local = [u for u in range(v) if graph.places[u] == place and above >> u & 1]
        busy = BusyTime()  # with what must run here before v
        times = []
        for k in range(micro_batches):
            for u in local:
                busy.add(heads[u][k], graph.durations[u])
            start = max(ready[k], busy.end)
            times.append(start)
            busy.add(start, graph.durations[v])
        heads.append(times)
    return heads


class BusyTime:
    """When a machine is busy that runs jobs as early as their heads allow, in any order."""

    def __init__(self) -> None:
        self._starts: list[float] = []  # of disjoint blocks, in order
        self._ends: list[float] = []

    @property
    def end(self) -> float:
        return self._ends[-1] if self._ends else 0.0

    def add(self, head: float, duration: float) -> None:
        """One more job: it fills the idle time from its head on."""
        starts, ends = self._starts, self._ends
        first = after = bisect_left(ends, head)
        start, end = head, head + duration
        if first < len(ends) and starts[first] <= head:
            start, end = starts[first], ends[first] + duration
            after += 1
        while after < len(ends) and starts[after] <= end:
            end += ends[after] - starts[after]
            after += 1
        starts[first:after], ends[first:after] = [start], [end]
