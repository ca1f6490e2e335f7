"""Draws schedules one above the other on a single time axis, so that what one saves is seen.

A row is a device: light is forward, full colour backward, dark the weight gradient, grey a bubble
(idle time before the schedule's end). The last schedule is the plan: its activation memory is
drawn below, a line per device.

PURE, but for `save_figure`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_rlhfuse.observe import style
from megatron_rlhfuse.schedule.draw_numbers import (
    BUBBLE,
    LIMIT,
    Labelled,
    Numbers,
    color,
    compare,
    headline,
    legend,
    memory_curve,
    show,
    shown_devices,
    shown_name,
    worst_device,
)
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline

MAX_ROWS = 48
MAX_BOXES = 60_000
"""Subtasks drawn per schedule; where devices hold more, fewer devices are shown."""
MAX_NUMBERS = 2000
"""Beyond it no micro-batch numbers are written: each is a text of its own, which is slow."""
MAX_VECTORS = 10_000
"""Beyond it the boxes of an SVG are pixels: viewers choke on more polygons."""

WIDTH_INCHES = 12.0
AXIS_POINTS = 800.0
"""Width of the time axis, roughly: the margins take the rest."""
ROW_INCHES = 0.3
PANEL_INCHES = 4.2
"""Highest panel; its rows get thinner instead."""
MEMORY_INCHES = 1.5
TITLE_INCHES = 0.3
LETTER_POINTS, KEY_POINTS = 5.0, 30.0
"""Widths in the legend: of a letter, roughly, and of what else an entry takes."""
LEGEND_ROW_INCHES = 0.18
NUMBER_POINTS = 6.5
ROW_FILL = 0.84
DASHES = (0, (4, 2))


def draw_timeline(timelines: Labelled, lower_bound: float | None) -> Figure:
    """The picture of `timelines`, the plan last, in the colours of `observe/style.py`.

    Shows at most MAX_ROWS devices, and a note of how many are left out. Raises ScheduleError if
    there is no timeline.
    """
    numbers = compare(timelines, lower_bound)
    plan = timelines[-1][1]
    shown = shown_devices(timelines, MAX_ROWS, MAX_BOXES)
    panel = min(PANEL_INCHES, ROW_INCHES * shown + 0.1)
    heights = [panel] * len(timelines) + [MEMORY_INCHES]
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.42 * len(heights) + 1.0))
        grid = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)
        axes = list(grid[:, 0])
        span = max(each.makespan for each in numbers)
        axes[0].set_xlim(0, span)
        written = sum(len(row) for _, each in timelines for row in each.order[:shown])
        for each, (label, timeline), found in zip(axes, timelines, numbers, strict=False):
            boxes = _boxes(timeline, shown)
            _draw_rows(each, boxes, shown, timeline.makespan)
            if written <= MAX_NUMBERS:
                _write_numbers(each, boxes, span)
            _label(each, label, _panel_title(found, timelines[0][0]))
        if len(timelines) > 1:
            _mark_saving(axes[-2], numbers[-1].makespan, numbers[0].makespan, shown)
        if lower_bound is not None:
            _mark_bound(axes[-2], lower_bound)
        _draw_memory(axes[-1], plan, shown)
        left_out = plan.problem.devices - shown
        note = f"; {left_out} more devices are not shown" if left_out else ""
        axes[-1].set_xlabel(f"time, in the unit of the problem{note}")
        rows = _legend(axes[0], plan, panel)
        figure.set_figheight(figure.get_figheight() + LEGEND_ROW_INCHES * (rows - 1))
        figure.suptitle(
            headline(plan), x=0.01, ha="left", fontsize=12, fontweight="bold", parse_math=False
        )
    return figure


def save_figure(figure: Figure, path: Path | str) -> None:
    """Writes a PNG or an SVG, as the suffix of `path` says. Raises ScheduleError for another."""
    suffix = Path(path).suffix.lower()
    if suffix not in (".png", ".svg"):
        raise ScheduleError(f"{path}: a picture is a .png or a .svg file")
    with matplotlib.rc_context({**style.RC, "svg.hashsalt": "schedule"}):
        metadata = {"Date": None} if suffix == ".svg" else None
        figure.savefig(path, format=suffix[1:], metadata=metadata)


class Box(NamedTuple):
    """A subtask on the picture."""

    device: int
    start: float
    end: float
    model: int
    kind: str
    micro_batch: int


def _boxes(timeline: Timeline, shown: int) -> list[Box]:
    return [
        Box(
            device,
            timeline.start[device][position],
            timeline.end(device, position),
            subtask.model,
            subtask.kind,
            subtask.micro_batch,
        )
        for device in range(shown)
        for position, subtask in enumerate(timeline.order[device])
    ]


def _draw_rows(axes: Axes, boxes: list[Box], shown: int, makespan: float) -> None:
    for device in range(shown):
        axes.broken_barh([(0, makespan)], (device - ROW_FILL / 2, ROW_FILL), facecolor=BUBBLE)
    fills = {(box.model, box.kind): color(box.model, box.kind) for box in boxes}
    row, start, end = np.array([box[:3] for box in boxes], dtype=float).reshape(-1, 3).T
    low, high = row - ROW_FILL / 2, row + ROW_FILL / 2
    corners = np.stack([start, low, start, high, end, high, end, low], axis=-1)
    width = (end - start) / axes.get_xlim()[1] * AXIS_POINTS
    axes.add_collection(
        PolyCollection(
            list(corners.reshape(-1, 4, 2)),
            facecolors=[fills[box.model, box.kind] for box in boxes],
            edgecolors=style.PAPER,
            # A gap between neighbours, unless it would swallow them.
            linewidths=np.clip((width - 3) / 6, 0.0, 0.7),
            rasterized=len(boxes) > MAX_VECTORS,
            # Moving the edges of boxes narrower than a pixel to pixels would show stripes.
            snap=None if width.min(initial=1.0) >= 1.0 else False,
        ),
        autolim=False,
    )
    axes.set_ylim(shown - 0.5, -0.5)
    step = max(1, -(-shown // 24))
    axes.set_yticks(range(0, shown, step))
    axes.set_ylabel("device")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="x", length=0, labelbottom=False)


def _write_numbers(axes: Axes, boxes: list[Box], span: float) -> None:
    for box in boxes:
        text = str(box.micro_batch)
        room = (box.end - box.start) / span * AXIS_POINTS
        if room < NUMBER_POINTS * (0.64 * len(text) + 0.3):
            continue
        axes.text(
            (box.start + box.end) / 2,
            box.device,
            text,
            ha="center",
            va="center_baseline",
            fontsize=NUMBER_POINTS,
            color=style.INK if box.kind == "F" else style.PAPER,
            clip_on=True,
            in_layout=False,
        )


def _panel_title(found: Numbers, first: str) -> str:
    parts = [f"makespan {show(found.makespan)}"]
    if found.speedup is not None:
        parts.append(f"{found.speedup:.2f}\u00d7 as fast as {shown_name(first)}")
    parts.append(f"bubbles {found.bubbles:.1%}")
    parts.append(f"peak memory {show(found.peak)}")
    if found.gap is not None:
        parts.append(f"{found.gap:.1%} above the lower bound")
    return "  \u00b7  ".join(parts)


def _label(axes: Axes, label: str, numbers: str) -> None:
    axes.set_title(shown_name(label), parse_math=False)
    axes.set_title(numbers, loc="right", fontweight="normal", fontsize=9, parse_math=False)


def _mark_saving(axes: Axes, end: float, first_end: float, shown: int) -> None:
    """An arrow over the time that the plan does not need."""
    if first_end - end < 0.075 * first_end:  # no room for it
        return
    middle = (shown - 1) / 2
    axes.annotate(
        "",
        (end, middle),
        (first_end, middle),
        arrowprops={"arrowstyle": "<->", "color": style.MUTED, "shrinkA": 2, "shrinkB": 2},
    )
    axes.annotate(
        f"saves {show(first_end - end)} ({1 - end / first_end:.0%})",
        ((end + first_end) / 2, middle),
        xytext=(0, 3),
        textcoords="offset points",
        ha="center",
        va="bottom",
        fontsize=8.5,
    )


def _mark_bound(axes: Axes, bound: float) -> None:
    axes.axvline(bound, color=style.INK, linewidth=1, linestyle=DASHES)
    axes.annotate(
        f"lower bound {show(bound)}",
        (bound, 0.0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -2),
        textcoords="offset points",
        ha="right" if bound > 0.9 * axes.get_xlim()[1] else "center",
        va="top",
        fontsize=8,
    )


def _draw_memory(axes: Axes, plan: Timeline, shown: int) -> None:
    worst = worst_device(plan)
    limit = plan.problem.memory_limit[worst]
    why = "closest to its limit" if np.isfinite(limit) else "the fullest"
    for device in [*(d for d in range(shown) if d != worst), worst]:
        times, values = zip(*memory_curve(plan, device), (plan.makespan, 0.0), strict=True)
        bold = device == worst
        axes.step(
            times,
            values,
            where="post",
            color=style.INK if bold else "#b8c0c9",
            linewidth=1.3 if bold else 0.7,
            rasterized=len(times) * shown > MAX_VECTORS * 4,
            label=f"device {device}, {why}" if bold else None,
        )
    if np.isfinite(limit):
        axes.axhline(
            limit, color=LIMIT, linewidth=1, linestyle=DASHES, label=f"its limit, {show(limit)}"
        )
    axes.set_ylim(0, 1.12 * max([*plan.peak_activation, limit if np.isfinite(limit) else 0]) or 1)
    axes.set_ylabel("activation memory")
    axes.legend(ncols=2, **{**style.ABOVE, "loc": "lower left", "bbox_to_anchor": (0.0, 1.0)})


def _legend(axes: Axes, plan: Timeline, panel: float) -> int:
    """Sets the legend above the title of the first panel, `panel` inches high; returns its rows."""
    handles = [Patch(color=fill, label=text) for fill, text in legend(plan.problem)]
    widths = [LETTER_POINTS * len(str(handle.get_label())) + KEY_POINTS for handle in handles]
    fits = sum(widths) <= AXIS_POINTS
    columns = len(handles) if fits else int(AXIS_POINTS // max(widths))
    drawn = axes.legend(
        handles=handles,
        ncols=columns,
        **{**style.LEGEND, "loc": "lower left", "bbox_to_anchor": (0.0, 1 + TITLE_INCHES / panel)},
    )
    for text in drawn.get_texts():
        text.set_parse_math(False)
    return -(-len(handles) // columns)
