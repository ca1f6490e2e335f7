"""How every picture of the project looks: one palette, one set of sizes.

The colours stay apart for colour-blind readers and in print; a stage or a series has the same
colour wherever it appears.
"""

from __future__ import annotations

from typing import Any

INK = "#1f2933"
MUTED = "#7b8794"
RULE = "#e4e7eb"
PAPER = "#ffffff"

SERIES = ("#2563a8", "#d9822b", "#2a9d74", "#8a63b5")
"""Colours of the lines of a panel, in order."""

STAGES = {
    "generation": "#3f7fbf",
    "inference": "#e8a33d",
    "training": "#2f9e77",
    "actor_training": "#2f9e77",
    "critic_training": "#8cc9a1",
    "weight_sync": "#9673b9",
    "checkpoint": "#a0715e",
    "wait": "#d3d9e0",
    "sample": "#a9c8e6",
    "other": "#b8c0c9",
}
"""Colours of the stages and of the trace categories of `observe/trace.py`."""

LEGEND: dict[str, Any] = {
    "borderaxespad": 0.2,
    "handlelength": 1.1,
    "handletextpad": 0.5,
    "columnspacing": 1.3,
}
"""How close legends are set; matplotlib takes these as arguments."""

ABOVE: dict[str, Any] = {**LEGEND, "loc": "lower right", "bbox_to_anchor": (1.0, 1.0)}
"""A legend in one row over the right end of a wide picture."""

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": RULE,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.08,
    "savefig.facecolor": PAPER,
    "savefig.dpi": 150,
}
"""matplotlib settings under which every figure is made and saved."""
