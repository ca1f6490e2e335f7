"""The compiled search (csrc/planner/module.cpp). Times and memory are in ticks."""

NO_LIMIT: int
FAILED: int
"""Makespan of a schedule that could not be completed."""

ScheduleRow = tuple[list[int], int, int]

class Network:
    def __init__(
        self,
        streams: list[tuple[int, int, int, int, int, int, int, bool, bool]],
        links: list[tuple[int, int, int]],
        devices: int,
    ) -> None: ...
    @property
    def subtasks(self) -> int: ...

def greedy(network: Network, limits: list[int]) -> ScheduleRow: ...

class Search:
    def __init__(
        self,
        network: Network,
        makespan: int,
        memory: int,
        limits: list[int],
        seed: int,
        walks: int,
    ) -> None: ...
    def run(self, threads: int, seconds: float, turns: int, tighten: bool) -> int: ...
    def offer(self, row: ScheduleRow) -> None: ...
    def best(self) -> ScheduleRow: ...
    @property
    def at_bound(self) -> bool: ...
    @property
    def done(self) -> bool: ...

UNPLANNED: int
"""Number of moves of an annealing that cools by the clock."""

class Annealing:
    def __init__(
        self,
        network: Network,
        makespan: int,
        memory: int,
        limits: list[int],
        start: ScheduleRow,
        seed: int,
        seconds: float,
        moves: int,
    ) -> None: ...
    def run(self, seconds: float, moves: int, tighten: bool) -> int: ...
    def best(self) -> ScheduleRow: ...

def try_swaps(
    network: Network, start: ScheduleRow, swaps: int, slack: int, seed: int, full: bool
) -> tuple[int, int, int, float]: ...
