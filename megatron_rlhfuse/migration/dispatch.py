"""Which instance makes the samples of which prompt, and in which order it admits them. PURE.

Invariants:
- every prompt is given to exactly one instance, so its samples share the cached prefix;
- without predictions (all the same) longest-first deals out as round-robin does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

Dispatch = Literal["round-robin", "longest-first"]
DISPATCHES: tuple[Dispatch, ...] = ("round-robin", "longest-first")


def dispatch_prompts(
    tokens: Sequence[float], instances: int, dispatch: Dispatch
) -> list[list[int]]:
    """The prompts of each instance, in the order in which it is to admit them.

    Longest-first is Graham's rule of the longest processing time: prompts by falling length, each
    to the instance that has the fewest tokens. An instance that cannot decode all its samples at
    once begins with the longest, so that these are not what it ends with.

    Args: tokens: expected of the responses to a prompt, all together, by prompt; round-robin heeds
        their number only
    """
    if dispatch == "round-robin":
        return [list(range(first, len(tokens), instances)) for first in range(instances)]
    held: list[list[int]] = [[] for _ in range(instances)]
    load = [(0.0, 0, instance) for instance in range(instances)]
    for prompt in sorted(range(len(tokens)), key=lambda each: -tokens[each]):
        total, count, instance = load[0]
        held[instance].append(prompt)
        heapq.heapreplace(load, (total + tokens[prompt], count + 1, instance))
    return held
