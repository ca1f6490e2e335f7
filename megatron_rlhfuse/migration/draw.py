"""Draws a simulated rollout: the stage against the threshold, and serial and fused timelines.

A row is an instance; blank is idle. PURE.
"""

from __future__ import annotations

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_rlhfuse.migration.simulate import ThresholdChoice
from megatron_rlhfuse.migration.timeline import InstanceTimeline, RolloutTimeline
from megatron_rlhfuse.observe import style

MAX_ROWS = 64
WIDTH_INCHES = 12.0
CURVE_INCHES = 2.4
ROW_INCHES = 0.3
PANEL_INCHES = 3.6
"""Highest timeline; its rows get thinner instead."""
ROW_FILL = 0.84

COLORS = {
    "generation": style.STAGES["generation"],
    "migration": style.STAGES["weight_sync"],
    "inference": style.STAGES["inference"],
}


def draw(choice: ThresholdChoice, serial: RolloutTimeline, fused: RolloutTimeline) -> Figure:
    """The picture, in the colours of `observe/style.py`; at most MAX_ROWS instances are shown."""
    shown = min(MAX_ROWS, len(fused.instances))
    panel = min(PANEL_INCHES, ROW_INCHES * shown + 0.3)
    heights = [CURVE_INCHES, panel, panel]
    with matplotlib.rc_context(style.RC):
        figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 1.6))
        curve, *rows = figure.subplots(3, height_ratios=heights)
        _draw_curve(curve, choice)
        rows[1].sharex(rows[0])
        rows[0].set_xlim(0, max(serial.stage_s, fused.stage_s))
        _draw_rollout(rows[0], serial, shown)
        _draw_rollout(rows[1], fused, shown)
        rows[0].set_title("Serial: inference after generation")
        rows[1].set_title(f"Fused, threshold {choice.threshold:g}")
        rows[0].tick_params(labelbottom=False)
        left_out = len(fused.instances) - shown
        note = f"; {left_out} more instances are not shown" if left_out else ""
        rows[1].set_xlabel(f"seconds since generation began{note}")
        handles = [Patch(color=color, label=name) for name, color in COLORS.items()]
        rows[0].legend(handles=handles, ncols=len(handles), **style.ABOVE)
        rows[1].set_title(_saving(serial, fused), loc="right", fontweight="normal", fontsize=9)
        figure.draw_without_rendering()  # the layout is made under these settings
    return figure


def _draw_curve(axes: Axes, choice: ThresholdChoice) -> None:
    shares, seconds = zip(*choice.curve, strict=True)
    axes.plot(shares, seconds, marker="o", markersize=4, color=style.SERIES[0], label="fused")
    axes.axhline(choice.serial_s, color=style.MUTED, linestyle="--", linewidth=1, label="serial")
    chosen = dict(choice.curve)[choice.threshold]
    axes.plot([choice.threshold], [chosen], "o", markersize=8, color=style.SERIES[1])
    axes.annotate(
        f"{choice.serial_s / chosen:.2f}\u00d7 as fast as serial",
        (choice.threshold, chosen),
        xytext=(0, -9),
        textcoords="offset points",
        ha="left" if choice.threshold < shares[-1] / 2 else "right",
        va="top",
    )
    axes.set_title("Generation and inference")
    axes.set_xlabel("migration threshold, share of the samples still unfinished")
    axes.set_ylabel("seconds")
    axes.set_ylim(0, 1.15 * max(choice.serial_s, *seconds))
    axes.legend(ncols=2, **style.ABOVE)


def _draw_rollout(axes: Axes, timeline: RolloutTimeline, shown: int) -> None:
    for instance in timeline.instances[:shown]:
        _draw_instance(axes, instance)
    axes.axvline(timeline.stage_s, color=style.INK, linewidth=1, linestyle="--")
    axes.set_ylim(shown - 0.5, -0.5)
    axes.set_yticks(range(0, shown, max(1, -(-shown // 16))))
    axes.set_ylabel("instance")
    axes.grid(visible=False)


def _draw_instance(axes: Axes, instance: InstanceTimeline) -> None:
    """Generation as high as the batch is, relative to the instance's largest."""
    bottom = instance.instance + ROW_FILL / 2
    most = max([batch for _, batch in instance.batches] or [1]) or 1
    for start, end in instance.generation:
        axes.broken_barh(
            [(start, end - start)],
            (bottom - ROW_FILL, ROW_FILL),
            facecolor=COLORS["generation"],
            alpha=0.3,
            linewidth=0,
        )
    axes.fill_between(
        [time for time, _ in instance.batches],
        [bottom - ROW_FILL * batch / most for _, batch in instance.batches],
        bottom,
        step="post",
        color=COLORS["generation"],
        linewidth=0,
    )
    for name, spans in (("migration", instance.migration), ("inference", instance.inference)):
        axes.broken_barh(
            [(start, end - start) for start, end in spans],
            (bottom - ROW_FILL, ROW_FILL),
            facecolor=COLORS[name],
            linewidth=0,
        )


def _saving(serial: RolloutTimeline, fused: RolloutTimeline) -> str:
    parts = [f"{fused.stage_s:.1f} s", f"{serial.stage_s / fused.stage_s:.2f}\u00d7 as fast"]
    if fused.migrated_s is not None and fused.migration is not None:
        parts.append(
            f"{fused.moved} samples moved after {fused.migrated_s:.1f} s, to instance "
            f"{_listed(fused.migration.destinations)}"
        )
    return "  \u00b7  ".join(parts)


def _listed(numbers: tuple[int, ...]) -> str:
    first = ", ".join(map(str, numbers[:4]))
    return first if len(numbers) <= 4 else f"{first}, ... ({len(numbers)})"
