"""Items dealt out into groups of nearly equal cost. PURE."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from megatron_rlhfuse import _dispatch


def balance(costs: Sequence[float], groups: int, equal_counts: bool = False) -> list[list[int]]:
    """The items of each group, ascending; groups by falling cost.

    Largest differencing (Karmarkar and Karp, 1982), then exchanges with the heaviest group. With
    `equal_counts` the sizes of groups differ by at most one.

    Raises ValueError naming the argument: a cost is negative or not finite, or there is no group.
    """
    group_of = _dispatch.balance(np.asarray(costs, dtype=np.float64), groups, equal_counts)
    order = np.argsort(group_of, kind="stable")
    ends = np.cumsum(np.bincount(group_of, minlength=groups))[:-1]
    return [part.tolist() for part in np.split(order, ends)]
