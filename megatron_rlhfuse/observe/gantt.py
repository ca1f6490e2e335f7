"""Draws the timeline of an iteration: a row per rank and engine; what is blank is idle.

A span that holds others is drawn pale and its children full: full colour is where work was
measured, pale is time inside a stage that no finer span accounts for, blank is idle. Of samples
the row shows how many run, relative to the most at any time: the long tail of generation.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_rlhfuse.observe import style
from megatron_rlhfuse.observe.timeline import Bar, Row, Timeline
from megatron_rlhfuse.observe.trace import CATEGORIES

MAX_ROWS = 48
WIDTH_INCHES = 12.0
ROW_INCHES = 0.3
PALE = 0.22
"""Opacity of a span that holds others."""
LETTER = 0.0062
"""Width of a letter of a bar's name, as a share of the time axis."""


def draw_timeline(timeline: Timeline) -> Figure:
    """The picture of `timeline`: at most MAX_ROWS rows, and a note of how many are left out."""
    rows = timeline.rows[:MAX_ROWS]
    figure = Figure(figsize=(WIDTH_INCHES, 1.1 + ROW_INCHES * len(rows)))
    axes = figure.subplots()
    for position, row in enumerate(rows):
        if row.bars:
            _draw_bars(axes, position, row, timeline.seconds)
        else:
            _draw_samples(axes, position, row)
        if position and row.rank != rows[position - 1].rank:
            axes.axhline(position - 0.5, color=style.RULE, linewidth=0.8)
    left_out = len(timeline.rows) - len(rows)
    note = f"; {left_out} more rows are in the trace" if left_out else ""
    axes.set_title(f"Timeline of iteration {timeline.iteration}")
    axes.set_xlabel(f"seconds since the iteration began{note}")
    axes.set_xlim(0, timeline.seconds)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")
    axes.tick_params(axis="y", labelcolor=style.INK)
    handles = _legend(rows)
    axes.legend(handles=handles, ncols=max(1, len(handles)), **style.ABOVE)
    return figure


def _draw_bars(axes: Axes, position: int, row: Row, seconds: float) -> None:
    for leaf, height in ((False, 0.8), (True, 0.56)):
        bars = [bar for bar in row.bars if bar.leaf is leaf]
        axes.broken_barh(
            [(bar.start, bar.end - bar.start) for bar in bars],
            (position - height / 2, height),
            facecolors=[to_rgba(_color(bar.category), 1.0 if leaf else PALE) for bar in bars],
            edgecolor=style.PAPER,
            # A gap between neighbours, unless it would swallow them.
            linewidth=[0.5 if bar.end - bar.start > seconds * LETTER else 0.0 for bar in bars],
        )
    for bar in row.bars:
        if bar.leaf and bar.end - bar.start > seconds * LETTER * (len(bar.name) + 2):
            _write(axes, position, bar)
    _note(axes, position, f"{row.busy_seconds() / seconds:.0%} busy")


def _write(axes: Axes, position: int, bar: Bar) -> None:
    dark = bar.category in ("wait", "critic_training")
    axes.text(
        (bar.start + bar.end) / 2,
        position,
        bar.name,
        ha="center",
        va="center_baseline",
        fontsize=7,
        color=style.INK if dark else style.PAPER,
        clip_on=True,
    )


def _draw_samples(axes: Axes, position: int, row: Row) -> None:
    most = max(count for _, count in row.running)
    bottom, height = position + 0.4, 0.8
    axes.fill_between(
        [time for time, _ in row.running],
        [bottom - height * count / most for _, count in row.running],
        bottom,
        step="post",
        color=style.STAGES["sample"],
        linewidth=0,
    )
    _note(axes, position, f"at most {most}")


def _note(axes: Axes, position: int, text: str) -> None:
    """A remark to the right of a row."""
    axes.annotate(
        text,
        (1.0, position),
        xycoords=("axes fraction", "data"),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=style.MUTED,
        fontsize=8,
    )


def _legend(rows: list[Row]) -> list[Patch]:
    """The categories of the leaves: what is pale is explained by what it holds."""
    used = {bar.category for row in rows for bar in row.bars if bar.leaf}
    used |= {"sample"} if any(row.running for row in rows) else set()
    labels = {**{name: name for name in CATEGORIES}, "sample": "running samples"}
    handles = [
        Patch(color=_color(name), label=label.replace("_", " "))
        for name, label in labels.items()
        if name in used
    ]
    if used - set(CATEGORIES):
        handles.append(Patch(color=_color("other"), label="other"))
    return handles


def _color(category: str) -> str:
    return style.STAGES.get(category, style.STAGES["other"])
