"""What samples cost that share a micro-batch, padded to its longest or packed. PURE.

And what forming either kind takes: samples by falling length, numbers that replicas divide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlhfuse.dispatch.cost import SequenceCost

Runs = list[list[int]]
"""Samples by micro-batch."""


@dataclass(frozen=True)
class Layout:
    """How the sequences of a micro-batch lie in memory.

    packed: one behind the other, attention told where each ends; else a row each, padded
    """

    packed: bool

    def tokens(self, lengths: Sequence[int], run: Sequence[int]) -> int:
        """That a micro-batch computes, padding included."""
        found = [lengths[sample] for sample in run]
        return sum(found) if self.packed else len(found) * max(found)

    def cost(self, lengths: Sequence[int], run: Sequence[int], cost: SequenceCost) -> float:
        """Of a micro-batch, padding included."""
        found = [lengths[sample] for sample in run]
        return sum(map(cost, found)) if self.packed else len(found) * cost(max(found))


PADDED = Layout(packed=False)
PACKED = Layout(packed=True)


def by_falling_length(lengths: Sequence[int]) -> list[int]:
    """The samples, longest first."""
    return sorted(range(len(lengths)), key=lambda sample: (-lengths[sample], sample))


def rounded_up(count: int, replicas: int) -> int:
    """The least multiple of `replicas` that is no less than `count`."""
    return -(-count // replicas) * replicas
