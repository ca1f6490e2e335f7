"""Predicts the training stage of a cluster, fused and not, without running it.

CLUSTER.json describes the machine and both models (docs/planner.md; examples in
examples/clusters). Prints the time, the bubbles and the memory of every schedule. With --rollout it
is generation and inference that are predicted, by megatron_rlhfuse/migration.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_rlhfuse.cli import Refuse
from megatron_rlhfuse.migration import simulate_command as simulate_rollout_command
from megatron_rlhfuse.observe.jsonl import write_atomically
from megatron_rlhfuse.schedule.cluster import load_cluster
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.problem import problem_to_json
from megatron_rlhfuse.schedule.search_terminal import add_search_flags, budget, watched_search
from megatron_rlhfuse.schedule.simulate import (
    BACK_TO_BACK,
    GREEDY,
    INTERLEAVED,
    SEARCHED,
    SERIAL,
    SPLIT,
    ZB_H1,
    Simulation,
    notes,
    simulate,
    to_json,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = (SERIAL, BACK_TO_BACK, INTERLEAVED, ZB_H1, GREEDY, SEARCHED, SPLIT)
BOUND = "bound, whole backward"

_COLUMNS = (
    ("schedule", "<24"),
    ("mini-batch", ">11"),
    ("stage", ">9"),
    ("bubbles", ">8"),
    ("speed-up", ">9"),
    ("peak", ">9"),
    ("limit", ">9"),
    ("fits", ">5"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cluster", metavar="CLUSTER.json", type=Path, nargs="?", help="the cluster")
    parser.add_argument(
        "--rollout",
        metavar="CASE.json",
        type=Path,
        help="instead of a cluster a rollout: predict generation and inference",
    )
    parser.add_argument(
        "--threshold",
        metavar="SHARE",
        type=simulate_rollout_command.threshold,
        help="of a rollout: migrate its tail at this share of unfinished samples (default: auto)",
    )
    add_search_flags(parser)
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers as JSON")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the times as bars")
    parser.add_argument(
        "--problem",
        metavar="FILE",
        type=Path,
        help="write the fusion problem of a mini-batch, for `rlhfuse plan`",
    )


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    source = _input(args, refuse)
    for flag in ("json", "png", "problem"):
        output = getattr(args, flag)
        if output is not None and output.resolve() == source.resolve():
            refuse(f"argument --{flag}: {output} is the input")
        if output is not None and (output.is_dir() or not output.parent.is_dir()):
            refuse(f"argument --{flag}: {output} must be a file in a folder that exists")
    if args.rollout is not None:
        return simulate_rollout_command.run(args, refuse)
    try:
        cluster = load_cluster(args.cluster)
        with watched_search() as watch:
            simulation = simulate(
                cluster,
                **budget(args.seconds, args.iterations),
                threads=args.threads,
                seed=args.seed or 0,
                progress=watch,
            )
        if args.json is not None:
            write_atomically(args.json, json.dumps(to_json(simulation), indent=1) + "\n")
        if args.problem is not None:
            problem = problem_to_json(simulation.problem)
            write_atomically(args.problem, json.dumps(problem, indent=1) + "\n")
        if args.png is not None:
            draw(simulation).savefig(args.png, format="png")
    except ScheduleError as error:
        refuse(str(error) if str(args.cluster) in str(error) else f"{args.cluster}: {error}")
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")
    print(text(simulation))
    if watch.interrupted:
        print("interrupted: the fused schedules are the best found until then")
    return 0


def _input(args: argparse.Namespace, refuse: Refuse) -> Path:
    """The file to simulate; refuses flags that mean nothing for it."""
    if args.rollout is None:
        if args.cluster is None:
            refuse(
                "the following arguments are required: CLUSTER.json or --rollout CASE.json "
                "(see rlhfuse simulate --help)"
            )
        if args.threshold is not None:
            refuse("argument --threshold: want --rollout CASE.json with it")
        return args.cluster
    if args.cluster is not None:
        refuse(f"argument --rollout: want it without CLUSTER.json, got {args.cluster}")
    for flag in ("problem", "seconds", "iterations", "threads", "seed"):
        if getattr(args, flag) is not None:
            refuse(f"argument --{flag}: it is for a cluster, not for --rollout")
    return args.rollout


def text(simulation: Simulation) -> str:
    """The summary for the terminal: what was simulated, a row per schedule, notes."""
    rows = [[title for title, _ in _COLUMNS], *(_row(simulation, name) for name in ROWS)]
    bound = simulation.lower_bound
    rows.append([BOUND, *_times(simulation, bound), "", "", ""])
    table = [
        "".join(f"{cell:{width}}" for cell, (_, width) in zip(row, _COLUMNS, strict=True)).rstrip()
        for row in rows
    ]
    return "\n".join([*_heading(simulation), "", *table, "", *notes(simulation)])


def draw(simulation: Simulation) -> Figure:
    """A bar per schedule, the lower bound as a line."""
    import matplotlib
    from matplotlib.figure import Figure

    from megatron_rlhfuse.observe import style

    names = [name for name in ROWS if name in simulation.runs]
    times = [simulation.runs[name].time for name in names]
    fused = {GREEDY, SEARCHED, SPLIT}
    with matplotlib.rc_context({**style.RC, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(8.0, 0.8 + 0.42 * len(names)))
        axes = figure.subplots()
        colors = [style.SERIES[name not in fused] for name in names]
        bars = axes.barh(names, times, 0.66, color=colors)
        labels = [f"{time:,.0f} ms   {simulation.speed_up(time):.2f}x" for time in times]
        written = axes.bar_label(bars, labels, padding=4, fontsize=8.5, color=style.INK)
        for label in written:  # the line of the bound may pass behind it
            label.set_bbox({"facecolor": style.PAPER, "edgecolor": "none", "pad": 1.0})
        axes.axvline(simulation.lower_bound, color=style.INK, linestyle="--", linewidth=1)
        axes.annotate(
            BOUND,
            (simulation.lower_bound, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=style.MUTED,
        )
        axes.invert_yaxis()
        axes.set_xlim(0, 1.22 * max(times))
        axes.set_xlabel("ms per mini-batch of both models")
        axes.set_title(_title(simulation), pad=16)
        figure.draw_without_rendering()  # the layout is made under these settings
    return figure


def _heading(simulation: Simulation) -> list[str]:
    cluster, placement, problem = simulation.cluster, simulation.placement, simulation.problem
    training = cluster.training
    lines = [
        f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu.name}, sequence length "
        f"{training.sequence_length}, {cluster.mini_batches} mini-batches of "
        f"{cluster.mini_batch_size} samples, micro-batches of {training.micro_batch_size}"
    ]
    for model, described in zip(problem.models, cluster.models, strict=True):
        lines.append(
            f"{described.role:8}{described.label}, {described.parallelism}: "
            f"{model.micro_batches} micro-batches per pipeline"
        )
        lines.append(
            f"        a micro-batch on a stage: forward {_span(model.forward)} ms, "
            f"backward {_span(model.backward)} ms, activations {_span(model.activation)} GB"
        )
    held = " and ".join(
        f"{len(placed.pipelines) * placed.lanes} of the {placed.name}"
        for placed in placement.models
    )
    lines.append(
        f"layout  {placement.groups} x {placement.devices} devices of "
        f"{placement.ranks_per_device} GPUs; on every {placement.devices} devices there are "
        f"pipelines: {held}"
    )
    lines.append(f"        {problem.p2p:.3g} ms from stage to stage")
    return lines


def _row(simulation: Simulation, name: str) -> list[str]:
    run = simulation.runs.get(name)
    if run is None:
        return [name] + ["-"] * (len(_COLUMNS) - 1)
    device = simulation.fullest_device(run)
    limit = simulation.problem.memory_limit[device]
    return [
        name,
        *_times(simulation, run.time),
        f"{run.peak[device]:.1f} GB",
        f"{limit:.1f} GB",
        "yes" if simulation.fits(run) else "NO",
    ]


def _times(simulation: Simulation, time: float) -> list[str]:
    return [
        f"{time:,.1f} ms",
        f"{simulation.stage_seconds(time):.2f} s",
        f"{100 * simulation.bubble_fraction(time):.1f} %",
        f"{simulation.speed_up(time):.2f}x",
    ]


def _title(simulation: Simulation) -> str:
    cluster = simulation.cluster
    labels = " and ".join(model.label for model in cluster.models)
    return f"Training {labels} on {cluster.gpus} {cluster.gpu.name}"


def _span(values: tuple[float, ...]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"
