"""Draws the trade between makespan and peak activation memory."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from megatron_rlhfuse.observe import style
from megatron_rlhfuse.schedule.draw_numbers import headline, show
from megatron_rlhfuse.schedule.evaluate import Timeline


def draw_pareto(points: Sequence[Timeline], serial: Timeline, lower_bound: float) -> Figure:
    """The points of a front, what serial 1F1B takes, and the lower bound of the makespan."""
    memory = [max(point.peak_activation) for point in points]
    times = [point.makespan for point in points]
    with matplotlib.rc_context({**style.RC, "axes.grid.axis": "both"}):
        figure = Figure(figsize=(8.0, 4.5))
        axes = figure.subplots()
        axes.step(memory[::-1], times[::-1], where="post", color=style.SERIES[0], linewidth=1.2)
        axes.plot(memory, times, "o", color=style.SERIES[0], label="fused plans")
        axes.plot(
            max(serial.peak_activation),
            serial.makespan,
            "s",
            color=style.SERIES[1],
            label="serial 1F1B",
        )
        axes.axhline(
            lower_bound,
            color=style.INK,
            linestyle="--",
            linewidth=1,
            label=f"lower bound {show(lower_bound)}",
        )
        axes.set_xlabel("peak activation memory of a device")
        axes.set_ylabel("makespan")
        axes.set_title(headline(points[0]), parse_math=False)
        axes.legend()
        figure.draw_without_rendering()  # the layout is made under these settings
    return figure
