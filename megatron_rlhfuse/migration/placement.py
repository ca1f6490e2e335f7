"""Which instances keep the tail, and which of them takes each sample that must move.

Invariants of a `Placement`:
- what is on a destination stays there, everything else moves: with the busiest as destinations no
  choice of as many moves fewer samples;
- a destination takes a sample only while it then holds at most `capacity` samples and the KV
  caches of all of them fit at maximum length; one that holds more already takes none;
- fewer destinations would not do, by ceil(unfinished / capacity) or because the samples cannot be
  placed (largest first, each where fewest are: packing them perfectly is NP-hard);
- it releases an instance: there are fewer destinations than instances with samples.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_rlhfuse.migration.options import MigrationOptions
from megatron_rlhfuse.migration.state import RolloutState

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Tail:
    """The unfinished samples of a rollout as arrays.

    Attributes:
        numbers: of the instances, [instances]; other arrays name instances by position in it
        nodes: number of each instance's node, [instances]
        kv_capacity: [instances]
        sample_id, prompt, response: [samples]
        instance: where each sample is, [samples]
        counts: samples on each instance, [instances]
    """

    numbers: Ints
    nodes: Ints
    kv_capacity: Ints
    sample_id: Ints
    prompt: Ints
    response: Ints
    instance: Ints
    counts: Ints

    @classmethod
    def of(cls, state: RolloutState) -> Tail:
        counts = [len(each.unfinished) for each in state.instances]
        samples = [sample for each in state.instances for sample in each.unfinished]
        nodes: dict[str, int] = {}
        return cls(
            numbers=_ints([each.instance for each in state.instances]),
            nodes=_ints([nodes.setdefault(each.node, len(nodes)) for each in state.instances]),
            kv_capacity=_ints([each.kv_capacity for each in state.instances]),
            sample_id=_ints([sample.sample_id for sample in samples]),
            prompt=_ints([sample.prompt_tokens for sample in samples]),
            response=_ints([sample.response_tokens for sample in samples]),
            instance=np.repeat(np.arange(len(counts)), counts),
            counts=_ints(counts),
        )


@dataclass(frozen=True)
class Placement:
    """Where the tail goes.

    Attributes:
        destinations: positions of instances, in the order of the policy
        moved: positions of samples
        to: the destination of each of them
    """

    destinations: Ints
    moved: Ints
    to: Ints


def place(tail: Tail, options: MigrationOptions, capacity: int) -> Placement | None:
    """The placement with the fewest destinations; None where none releases an instance."""
    need = tail.prompt + options.max_tokens
    own_need = np.bincount(tail.instance, need, minlength=len(tail.numbers)).astype(np.int64)
    room = np.maximum(tail.kv_capacity - own_need, 0)
    order = _by_policy(tail, options)
    # Of the first m instances: room for others, and what the others need.
    rooms, needs = np.cumsum(room[order]), need.sum() - np.cumsum(own_need[order])
    least = -(-len(need) // capacity)
    for m in range(least, int(np.count_nonzero(tail.counts))):
        if rooms[m - 1] < needs[m - 1]:
            continue
        destinations = order[:m]
        stays = np.zeros(len(tail.numbers), dtype=bool)
        stays[destinations] = True
        moved = np.flatnonzero(~stays[tail.instance])
        moved = moved[np.argsort(-need[moved], kind="stable")]
        to = _fill(destinations, need[moved], room, tail, capacity)
        if to is not None:
            return Placement(destinations, moved, to)
    return None


def _by_policy(tail: Tail, options: MigrationOptions) -> Ints:
    """Positions of all instances, the most wanted as destination first."""
    designated = np.zeros(len(tail.numbers), dtype=bool)
    if options.policy == "inference":
        designated = np.isin(tail.numbers, options.inference_instances)
    return np.lexsort((tail.numbers, -tail.counts, ~designated))


def _fill(destinations: Ints, need: Ints, room: Ints, tail: Tail, capacity: int) -> Ints | None:
    """The destination of each sample, needs descending; None where one cannot be placed."""
    # Nearly always memory is no constraint, and thousands of samples are placed at once.
    to = _fill_evenly(destinations, len(need), tail, capacity)
    if (np.bincount(to, need, minlength=len(room)) <= room).all():
        return to
    return _fill_within(destinations, need, room, tail, capacity)


def _fill_evenly(destinations: Ints, moved: int, tail: Tail, capacity: int) -> Ints:
    """The destination of each sample, always the one with the fewest; memory is not looked at."""
    counts = tail.counts[destinations]
    level = _level(counts, moved, capacity)
    places = np.maximum(level - counts, 0)
    each = np.repeat(destinations, places)
    # Places of a destination are filled from its own count upwards.
    before = np.repeat(np.cumsum(places) - places, places)
    fill = np.arange(len(each)) - before + np.repeat(counts, places)
    return each[np.lexsort((tail.numbers[each], fill))[:moved]]


def _level(counts: Ints, moved: int, capacity: int) -> int:
    """The lowest level up to which filling makes room for `moved` more, at most `capacity`."""
    low, high = 0, capacity
    while low < high:
        middle = (low + high) // 2
        if np.maximum(middle - counts, 0).sum() >= moved:
            high = middle
        else:
            low = middle + 1
    return low


def _fill_within(
    destinations: Ints, need: Ints, room: Ints, tail: Tail, capacity: int
) -> Ints | None:
    """The same within the room for KV caches, needs descending; None where one has no place."""
    counts, numbers = tail.counts, tail.numbers
    open_ = [
        (int(counts[each]), int(numbers[each]), int(each))
        for each in destinations
        if counts[each] < capacity
    ]
    heapq.heapify(open_)
    left = room.tolist()
    small: list[tuple[int, int, int, int]] = []  # too small for the last sample, widest first
    to = []
    for tokens in need.tolist():
        while small and -small[0][0] >= tokens:
            heapq.heappush(open_, heapq.heappop(small)[1:])
        while open_ and left[open_[0][2]] < tokens:
            count, number, each = heapq.heappop(open_)
            heapq.heappush(small, (-left[each], count, number, each))
        if not open_:
            return None
        count, number, each = open_[0]
        to.append(each)
        left[each] -= tokens
        if count + 1 < capacity:
            heapq.heapreplace(open_, (count + 1, number, each))
        else:
            heapq.heappop(open_)
    return _ints(to)


def _ints(values: list[int]) -> Ints:
    return np.array(values, dtype=np.int64)
