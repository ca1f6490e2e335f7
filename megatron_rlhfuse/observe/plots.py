"""The curves of a run: which metrics share a picture, and how they are drawn.

A chart is a row of panels, a panel a few metrics of one unit. What was not measured is not drawn:
a line without a value, a panel without a line, a chart without a panel. A gap in a line is a
value that was not finite.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from megatron_rlhfuse.observe import style
from megatron_rlhfuse.observe.metrics import METRICS, STAGE_SECONDS

Records = Sequence[Mapping[str, Any]]

SMOOTH_FROM = 60
"""Iterations from which a running mean is drawn over the values."""
STACK_FROM = 80
"""Iterations from which the stage seconds are areas: bars would be too thin to see."""


class Panel(NamedTuple):
    """Lines on one pair of axes: field -> label; `band` is the field of a +- around the first.

    from_zero: the axis begins at 0; log: it is logarithmic, where there is a value above 0.
    """

    title: str
    unit: str
    lines: dict[str, str]
    band: str | None = None
    from_zero: bool = False
    log: bool = False


class Chart(NamedTuple):
    """A picture; `name` is its file name, `wide` whether it takes the width of the page."""

    name: str
    panels: tuple[Panel, ...]
    wide: bool = False


CHARTS = (
    Chart(
        "reward",
        (
            Panel(
                "Reward",
                "reward per sample",
                {"reward_mean": "reward", "score_mean": "score, before KL"},
                band="reward_std",
            ),
        ),
    ),
    Chart("kl", (Panel("KL to the reference", METRICS["kl"].unit, {"kl": "KL"}),)),
    Chart(
        "losses",
        (
            Panel("Policy loss", "loss", {"policy_loss": "policy"}),
            Panel("Value loss", "loss", {"value_loss": "value"}),
            Panel("Entropy", METRICS["entropy"].unit, {"entropy": "entropy"}),
        ),
        wide=True,
    ),
    Chart(
        "clipping",
        (
            Panel(
                "Clipped tokens",
                "% of response tokens",
                {"clip_fraction": "policy", "value_clip_fraction": "value"},
                from_zero=True,
            ),
        ),
    ),
    Chart(
        "lengths",
        (
            Panel(
                "Response length",
                "tokens",
                {
                    "response_length_p99": "99th percentile",
                    "response_length_mean": "mean",
                    "response_length_median": "median",
                },
                from_zero=True,
            ),
        ),
    ),
    Chart(
        "throughput",
        (
            Panel("Throughput", "tokens/s", {"tokens_per_s": "tokens"}, from_zero=True),
            Panel("Samples", "samples/s", {"samples_per_s": "samples"}, from_zero=True),
        ),
    ),
    Chart(
        "logprob_difference",
        (
            Panel(
                "Rollout and training log-probability",
                "|difference|, nats",
                {"logprob_difference_mean": "mean", "logprob_difference_max": "largest"},
                log=True,
            ),
        ),
    ),
)


def series(records: Records, name: str) -> np.ndarray:
    """Field `name` of every record, [records] float64; NaN where it is missing or null."""
    values = [record.get(name) for record in records]
    return np.array([math.nan if value is None else value for value in values], dtype=float)


def draw_chart(chart: Chart, records: Records) -> Figure | None:
    """The figure of `chart`, or None where none of its metrics was measured."""
    panels = [
        panel
        for panel in chart.panels
        if any(np.isfinite(series(records, name)).any() for name in panel.lines)
    ]
    if not panels:
        return None
    size = (12.0, 2.8) if chart.wide else (6.0, 3.0)
    figure = Figure(figsize=size)
    for panel, axes in zip(panels, figure.subplots(1, len(panels), squeeze=False)[0], strict=True):
        _draw_panel(axes, panel, records)
    return figure


def draw_stages(records: Records) -> Figure | None:
    """Seconds per stage of every iteration, stacked; the rest of `iteration_s` is "other"."""
    layers = {
        field.removesuffix("_s"): np.nan_to_num(series(records, field)) for field in STAGE_SECONDS
    }
    rest = series(records, "iteration_s") - np.sum(list(layers.values()), axis=0)
    layers["other"] = np.clip(np.nan_to_num(rest), 0.0, None)
    layers = {name: seconds for name, seconds in layers.items() if seconds.any()}
    if not layers:
        return None
    iterations = series(records, "iteration")
    figure = Figure(figsize=(12.0, 3.0))
    axes = figure.subplots()
    labels = [name.replace("_", " ") for name in layers]
    colors = [style.STAGES[name] for name in layers]
    if len(records) < STACK_FROM:
        bottom = np.zeros(len(records))
        for label, color, seconds in zip(labels, colors, layers.values(), strict=True):
            axes.bar(iterations, seconds, 0.78, bottom=bottom, color=color, label=label)
            bottom += seconds
    else:
        axes.stackplot(iterations, *layers.values(), colors=colors, labels=labels, linewidth=0)
    _finish(axes, "Where an iteration's time goes", "seconds", iterations)
    axes.set_ylim(bottom=0)
    axes.legend(ncols=len(layers), **style.ABOVE)
    return figure


def _draw_panel(axes: Axes, panel: Panel, records: Records) -> None:
    iterations = series(records, "iteration")
    values = {name: series(records, name) for name in panel.lines}
    log = panel.log and any((line > 0).any() for line in values.values())
    if log:
        values = {name: np.where(line > 0, line, math.nan) for name, line in values.items()}
    drawn = [name for name, line in values.items() if np.isfinite(line).any()]
    colors = dict(zip(panel.lines, style.SERIES, strict=False))
    for name in drawn:
        _draw_line(axes, iterations, values[name], panel.lines[name], colors[name])
    if panel.band is not None:
        first = next(iter(panel.lines))
        _draw_band(axes, iterations, values[first], series(records, panel.band), colors[first])
    _finish(axes, panel.title, panel.unit, iterations)
    if log:
        _scale_by_decades(axes)
    if panel.unit.startswith("%"):
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.4g}")
    if panel.from_zero:
        axes.set_ylim(0, 1.08 * axes.dataLim.y1 or 1.0)
    if len(axes.get_legend_handles_labels()[0]) > 1:
        axes.legend(loc="best", **style.LEGEND)


def _draw_band(
    axes: Axes, iterations: np.ndarray, center: np.ndarray, spread: np.ndarray, color: str
) -> None:
    """A band of one standard deviation around a line; it takes two points to be seen."""
    if np.isfinite(center + spread).sum() > 1:
        axes.fill_between(
            iterations,
            center - spread,
            center + spread,
            color=color,
            alpha=0.13,
            linewidth=0,
            label="\u00b1 1 std over samples",
        )


def _scale_by_decades(axes: Axes) -> None:
    """A logarithmic axis that begins and ends at a power of ten, and labels only those."""
    axes.set_yscale("log")
    low, high = axes.dataLim.intervaly
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    axes.set_ylim(10.0**first, 10.0 ** max(last, first + 1))
    axes.yaxis.set_minor_locator(NullLocator())


def _draw_line(
    axes: Axes, iterations: np.ndarray, values: np.ndarray, label: str, color: str
) -> None:
    if len(values) >= SMOOTH_FROM:
        axes.plot(iterations, values, color=color, alpha=0.28, linewidth=0.9)
        axes.plot(iterations, running_mean(values, len(values) // 15), color=color, label=label)
    else:
        axes.plot(iterations, values, color=color, label=label, marker="o", markersize=3)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of each value's `window` neighbours around it, fewer at the ends; NaN is left out."""
    half = window // 2
    finite = np.isfinite(values)
    total = np.concatenate(([0.0], np.cumsum(np.where(finite, values, 0.0))))
    count = np.concatenate(([0], np.cumsum(finite)))
    low = np.clip(np.arange(len(values)) - half, 0, None)
    high = np.clip(np.arange(len(values)) + half + 1, None, len(values))
    with np.errstate(invalid="ignore"):
        return (total[high] - total[low]) / (count[high] - count[low])


def _finish(axes: Axes, title: str, unit: str, iterations: np.ndarray) -> None:
    axes.set_title(title)
    axes.set_xlabel("iteration")
    axes.set_ylabel(unit)
    if len(iterations) <= 8:
        axes.set_xticks(iterations)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    # A few iterations do not fill the width: a lone bar would be as wide as the picture.
    margin = max(0.6, 4.0 - 0.5 * len(iterations))
    axes.set_xlim(iterations[0] - margin, iterations[-1] + margin)
