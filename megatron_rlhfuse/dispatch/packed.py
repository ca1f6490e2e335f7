"""Micro-batches of packed sequences: nothing is padded, so any samples may share one. PURE.

What counts is that micro-batches take equally long: a pipeline then has no gaps between them.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlhfuse.dispatch.balance import balance
from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import Runs, by_falling_length, rounded_up


def share_rows(lengths: Sequence[int], rows: int, cost: SequenceCost) -> Runs:
    """Micro-batches of `rows` samples, which divide their number, of nearly equal cost."""
    return balance([cost(length) for length in lengths], len(lengths) // rows, equal_counts=True)


def share_tokens(lengths: Sequence[int], tokens: int, replicas: int, cost: SequenceCost) -> Runs:
    """Few micro-batches, a multiple of `replicas`, of nearly equal cost, none above `tokens`.

    The fewest for which balancing, by cost or by tokens, keeps to the limit, and never more than
    first fit by falling length takes, rounded up to the replicas: whether fewer would do is bin
    packing. Their number of samples is a multiple of `replicas`, none above `tokens`.
    """
    if not lengths:
        return []
    costs = [cost(length) for length in lengths]
    fitted = _first_fit(lengths, tokens)
    most = rounded_up(len(fitted), replicas)
    for groups in range(rounded_up(-(-sum(lengths) // tokens), replicas), most + 1, replicas):
        for weights in (costs, lengths):
            runs = balance(weights, groups)
            if all(sum(lengths[sample] for sample in run) <= tokens for run in runs):
                return runs
    while len(fitted) < most:
        dearest = max(
            (run for run in fitted if len(run) > 1), key=lambda run: sum(costs[i] for i in run)
        )
        fitted.remove(dearest)
        fitted += [dearest[::2], dearest[1::2]]
    return fitted


def _first_fit(lengths: Sequence[int], tokens: int) -> Runs:
    """From the longest on, every sample in the first micro-batch with room for it."""
    runs: Runs = []
    room: list[int] = []
    for sample in by_falling_length(lengths):
        place = next((i for i, left in enumerate(room) if left >= lengths[sample]), len(runs))
        if place == len(runs):
            runs.append([])
            room.append(tokens)
        runs[place].append(sample)
        room[place] -= lengths[sample]
    return runs
