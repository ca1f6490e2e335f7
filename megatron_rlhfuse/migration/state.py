"""What the migration planner sees of a rollout, and what it answers.

Plain frozen data. Numbers of instances and samples are the caller's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

Transfer = Literal["kv", "tokens"]
"""How a sample travels: with its KV cache, or as tokens that the destination prefills again."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A sample that is not finished; `response_tokens` are those it has so far."""

    sample_id: int
    prompt_tokens: int
    response_tokens: int


@dataclass(frozen=True)
class InstanceState:
    """A generation instance.

    Attributes:
        node: instances on one node share memory
        unfinished: its samples, those that wait for a place in its batch included
        kv_capacity: tokens its KV cache holds
    """

    instance: int
    node: str
    unfinished: tuple[Unfinished, ...]
    kv_capacity: int


@dataclass(frozen=True)
class RolloutState:
    """All generation instances at one moment.

    Attributes:
        finished_waiting: finished samples that inference has not scored yet
        time: seconds since generation began
    """

    instances: tuple[InstanceState, ...]
    finished_waiting: int
    time: float = 0.0

    @property
    def unfinished(self) -> int:
        return sum(len(each.unfinished) for each in self.instances)


class Move(NamedTuple):
    """One sample goes from one instance to another; a tuple, because a plan has thousands."""

    sample_id: int
    source: int
    destination: int
    transfer: Transfer


@dataclass(frozen=True)
class Migration:
    """What to do; instances with samples that are no destination give all of them away.

    Attributes:
        destinations: instances that keep or take the tail, ascending
        moves: by destination's load, not by number; every sample at most once
        stage_without_s: predicted seconds until the last sample is scored if nothing moves and
            every instance starts inference once it has no samples of its own
        stage_with_s: the same with the moves, their transfers included
    """

    destinations: tuple[int, ...]
    moves: tuple[Move, ...]
    stage_without_s: float
    stage_with_s: float
