"""The balancing of csrc/dispatch/balance.h in plain Python: what it must equal, group by group."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

NEGLIGIBLE = 1e-9

Group = tuple[float, list[int]]


def balance(costs: Sequence[float], groups: int, equal_counts: bool = False) -> list[list[int]]:
    """As `megatron_rlhfuse.dispatch.balance.balance`."""
    by_cost = sorted(range(len(costs)), key=lambda item: (-costs[item], item))
    found = [sorted(items) for _, items in _differencing(costs, by_cost, groups, equal_counts)]
    found += [[] for _ in range(groups - len(found))]
    _improve(costs, found, equal_counts, 16 * groups)
    # Sums in the order in which the compiled code adds, or ties would be broken by rounding.
    sums = [_sum(costs, items) for items in found]
    return [sorted(found[g]) for g in sorted(range(groups), key=lambda g: (-sums[g], g))]


def _differencing(
    costs: Sequence[float], by_cost: Sequence[int], groups: int, equal_counts: bool
) -> list[Group]:
    width = groups if equal_counts else 1
    parts: list[list[Group]] = []
    heap: list[tuple[float, int]] = []

    def push(part: list[Group]) -> None:
        lightest = part[-1][0] if len(part) == groups else 0.0
        heapq.heappush(heap, (lightest - part[0][0], len(parts)))
        parts.append(part)

    for start in range(0, len(by_cost), width):
        push([(float(costs[item]), [item]) for item in by_cost[start : start + width]])
    while len(heap) > 1:
        one, other = (parts[heapq.heappop(heap)[1]] for _ in range(2))
        joined = list(one)
        for j, (cost, items) in enumerate(other):
            i = groups - 1 - j
            if i >= len(one):
                joined.append((cost, items))
            else:
                joined[i] = (joined[i][0] + cost, joined[i][1] + items)
        push(sorted(joined, key=lambda group: (-group[0], group[1][0])))
    return parts[heap[0][1]] if heap else []


def _sum(costs: Sequence[float], items: Sequence[int]) -> float:
    total = 0.0
    for item in sorted(items, key=lambda item: (costs[item], item)):
        total += costs[item]
    return total


def _improve(
    costs: Sequence[float], found: list[list[int]], equal_counts: bool, exchanges: int
) -> None:
    sums = [_sum(costs, items) for items in found]
    mean = sum(sums) / len(sums)
    for _ in range(exchanges):
        heaviest = max(range(len(found)), key=lambda g: (sums[g], -g))
        if sums[heaviest] - mean <= NEGLIGIBLE * mean:
            return
        for other in sorted(range(len(found)), key=lambda g: (sums[g], g)):
            if other == heaviest:
                continue
            wanted = (sums[heaviest] - sums[other]) / 2
            given, taken, miss = _best(costs, found[heaviest], found[other], wanted, equal_counts)
            if miss < wanted * (1 - NEGLIGIBLE):
                break
        else:
            return
        for source, target, item in ((heaviest, other, given), (other, heaviest, taken)):
            if item is not None:
                found[source].remove(item)
                found[target].append(item)
        for group in (heaviest, other):
            sums[group] = _sum(costs, found[group])


def _best(
    costs: Sequence[float],
    giver: Sequence[int],
    taker: Sequence[int],
    wanted: float,
    equal_counts: bool,
) -> tuple[int | None, int | None, float]:
    """What is given, what is taken for it, and how far that is from the cost wanted."""
    best: tuple[int | None, int | None, float] = (None, None, wanted)
    lightest = sorted(taker, key=lambda item: (costs[item], item))
    j = 0
    for given in sorted(giver, key=lambda item: (costs[item], item)):
        choices: list[int | None] = [None] if not equal_counts or len(giver) > len(taker) else []
        while j < len(lightest) and costs[lightest[j]] <= costs[given] - wanted:
            j += 1
        choices += lightest[j - 1 : j] if j else []
        choices += lightest[j : j + 1]
        for taken in choices:
            moved = costs[given] - (0.0 if taken is None else costs[taken])
            if abs(moved - wanted) < best[2]:
                best = (given, taken, abs(moved - wanted))
    return best
