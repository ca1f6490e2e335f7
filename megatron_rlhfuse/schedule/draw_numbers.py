"""What every picture of a schedule shows: its numbers, its colours, its memory over time.

PURE, and without matplotlib: `draw.py`, `draw_html.py` and `chrome_trace.py` share it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from megatron_rlhfuse.observe import style
from megatron_rlhfuse.schedule.bounds import reaches
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, memory_changes
from megatron_rlhfuse.schedule.problem import LETTERS, Problem

KIND_NAMES = {"F": "forward", "B": "backward", "W": "weight gradient"}
SHADES = {"F": (0.58, style.PAPER), "B": (0.0, style.PAPER), "W": (0.45, style.INK)}
"""How far, and towards what, a model's colour is mixed for a kind of subtask."""
BUBBLE = "#edf0f3"
LIMIT = "#b3261e"
NAME_LETTERS = 28

Labelled = Sequence[tuple[str, Timeline]]
"""Schedules of one problem with their names: the baselines, then the plan."""


class Numbers(NamedTuple):
    """What pictures say about a schedule; None where there is nothing to compare it with.

    Attributes:
        speedup: makespan of the first schedule over this one's
        gap: how far the makespan lies above the lower bound, as a share of the bound
        peak: highest activation memory of any device
    """

    makespan: float
    speedup: float | None
    bubbles: float
    gap: float | None
    peak: float


def compare(timelines: Labelled, lower_bound: float | None) -> list[Numbers]:
    """The numbers of every schedule. Raises ScheduleError if there is none."""
    if not timelines:
        raise ScheduleError("timelines: want at least one schedule to draw")
    first = timelines[0][1].makespan
    return [
        Numbers(
            makespan=timeline.makespan,
            speedup=first / timeline.makespan if position else None,
            bubbles=timeline.bubble_fraction(),
            gap=gap_to(timeline.makespan, lower_bound) if lower_bound else None,
            peak=max(timeline.peak_activation),
        )
        for position, (_, timeline) in enumerate(timelines)
    ]


def gap_to(makespan: float, lower_bound: float) -> float:
    """How far a makespan lies above the bound, as a share of it; 0 where it is there."""
    return 0.0 if reaches(makespan, lower_bound) else makespan / lower_bound - 1


def shown_devices(timelines: Labelled, most_rows: int, most_boxes: int) -> int:
    """How many devices, from the first, a picture of so many rows and boxes holds; at least 1."""
    shown = most_rows
    for _, timeline in timelines:
        held = list(accumulate(len(row) for row in timeline.order))
        shown = min(shown, max(1, bisect_right(held, most_boxes)))
    return min(shown, timelines[0][1].problem.devices)


def headline(plan: Timeline) -> str:
    """What the picture is of: one line."""
    names = model_names(plan.problem)
    trained = " and ".join(names) if len(names) <= 3 else f"{len(names)} models"
    devices = plan.problem.devices
    return f"One training step of {trained} on {devices} device{'s' * (devices > 1)}"


def color(model: int, kind: str) -> str:
    """Fill of the subtasks of a kind of a model."""
    share, target = SHADES[kind]
    pairs = zip(_rgb(style.SERIES[model % len(style.SERIES)]), _rgb(target), strict=True)
    return "#" + "".join(f"{round(own * (1 - share) + other * share):02x}" for own, other in pairs)


def legend(problem: Problem) -> list[tuple[str, str]]:
    """Every fill of the picture and what it means."""
    meanings = [
        (color(number, kind), f"{KIND_NAMES[kind]}, {name}")
        for number, name in enumerate(model_names(problem))
        for kind in problem.models[number].kinds
    ]
    return [*meanings, (BUBBLE, "bubble: the device waits")]


def model_names(problem: Problem) -> list[str]:
    """What pictures call the models: by their name, or by their letter where they have none."""
    return [
        shown_name(model.name or LETTERS[number]) for number, model in enumerate(problem.models)
    ]


def shown_name(name: str) -> str:
    """`name` on one line, of printable letters, and not longer than a picture has room for."""
    name = "".join(letter if letter.isprintable() else " " for letter in name)
    return name if len(name) <= NAME_LETTERS else name[: NAME_LETTERS - 1] + "\u2026"


def show(value: float) -> str:
    """Six significant digits, no trailing zeros."""
    return f"{value:.6g}"


def worst_device(timeline: Timeline) -> int:
    """The device with the least memory left under its limit; the fullest if there is no limit."""
    peak, limit = timeline.peak_activation, timeline.problem.memory_limit
    return min(range(len(peak)), key=lambda device: (limit[device] - peak[device], -peak[device]))


def memory_curve(timeline: Timeline, device: int) -> list[tuple[float, float]]:
    """(time, activation memory from then on) of a device, times ascending; starts at time 0.

    Held activations are counted, as in `peak_activation`: the highest value is exactly that peak
    and the last exactly 0.
    """
    held: dict[float, int] = {}
    curve = [(0.0, 0.0)]

    def change(time: float, size: float, count: int) -> None:
        held[size] = held.get(size, 0) + count
        now = sum(each * number for each, number in held.items())
        # Rounding may let a subtask begin a hair before the end of the one before it.
        time = max(time, curve[-1][0])
        if curve[-1][0] == time:
            curve.pop()
        curve.append((time, now))

    row = timeline.order[device]
    for position, (added, freed) in enumerate(memory_changes(timeline.problem, row)):
        if added:
            change(timeline.start[device][position], added, 1)
        if freed:
            change(timeline.end(device, position), freed, -1)
    return curve


def _rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]
