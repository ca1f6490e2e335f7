"""What `rlhfuse plan` prints and writes: the summary, files of all kinds, the folder of a front."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_rlhfuse.observe.jsonl import write_atomically
from megatron_rlhfuse.schedule.baselines import chimera, serial_zb_h1
from megatron_rlhfuse.schedule.bounds import least_memory
from megatron_rlhfuse.schedule.draw_numbers import gap_to, headline, show
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.order import order_to_csv, order_to_tokens
from megatron_rlhfuse.schedule.plan import Plan, plan_to_json

FILES = ("output", "csv", "png", "svg", "html", "trace")
"""The kinds of files, by their flags."""


def report(plan: Plan, how: str) -> None:
    """Prints what was found, `how`, and what to compare it with."""
    timeline = plan.timeline
    print(headline(timeline))
    print(f"makespan     {show(timeline.makespan)}: {_distance(plan)}")
    speedup = plan.serial_1f1b / timeline.makespan
    fits = "" if plan.serial.over_limit() is None else "; it does not keep the memory limit"
    print(f"serial 1F1B  {show(plan.serial_1f1b)}: the plan is {speedup:.2f}x as fast{fits}")
    if any(model.weight_gradient is not None for model in timeline.problem.models):
        print(f"serial ZB-H1 {show(serial_zb_h1(timeline.problem))}")
    with suppress(ScheduleError):  # defined for two identical models only
        bidirectional = evaluate(timeline.problem, chimera(timeline.problem))
        print(f"Chimera      {show(bidirectional.makespan)}")
    print(f"greedy       {show(plan.greedy)}")
    print(f"bubbles      {100 * timeline.bubble_fraction():.1f} % of the devices' time")
    peak, serial_peak = max(timeline.peak_activation), max(plan.serial.peak_activation)
    least = least_memory(timeline.problem, timeline.makespan)
    print(
        f"peak memory  {show(peak)} of activations; bound at this makespan {show(least)}; "
        f"serial 1F1B {show(serial_peak)}"
    )
    print(f"by           {how}")


def _distance(plan: Plan) -> str:
    if plan.at_bound:
        return "no plan is shorter"
    gap = gap_to(plan.timeline.makespan, plan.lower_bound)
    return f"{100 * gap:.2f} % above the lower bound ({show(plan.lower_bound)})"


def write_files(plan: Plan, paths: Mapping[str, Path | None]) -> None:
    """Writes each kind of FILES that has a path, and says so. Raises OSError where it cannot."""
    timeline = plan.timeline
    panels = [("serial 1F1B", plan.serial), ("fused", timeline)]
    for kind, path in paths.items():
        if path is None:
            continue
        if kind == "output":
            _write_plan(plan, path)
        elif kind == "csv":
            write_atomically(path, order_to_csv(order_to_tokens(timeline.order)))
        elif kind == "trace":
            from megatron_rlhfuse.schedule.chrome_trace import chrome_trace

            write_atomically(path, json.dumps(chrome_trace(timeline)) + "\n")
        elif kind == "html":
            from megatron_rlhfuse.schedule.draw_html import draw_html

            write_atomically(path, draw_html(panels, plan.lower_bound))
        else:
            from megatron_rlhfuse.schedule.draw import draw_timeline, save_figure

            save_figure(draw_timeline(panels, plan.lower_bound), path)
    written = [str(path) for path in paths.values() if path is not None]
    if written:
        print(f"wrote        {', '.join(written)}")


def write_front(points: Sequence[Plan], folder: Path) -> None:
    """Prints a front; writes plan-<number>.json for each point, and front.png."""
    from megatron_rlhfuse.schedule.draw import save_figure
    from megatron_rlhfuse.schedule.draw_pareto import draw_pareto

    print(headline(points[0].timeline))
    print("makespan  peak memory  plan")
    for number, plan in enumerate(points):
        path = folder / f"plan-{number:02d}.json"
        _write_plan(plan, path)
        peak = max(plan.timeline.peak_activation)
        print(f"{show(plan.timeline.makespan):>8}  {show(peak):>11}  {path}")
    serial = points[0].serial
    print(f"{show(serial.makespan):>8}  {show(max(serial.peak_activation)):>11}  (serial 1F1B)")
    picture = folder / "front.png"
    save_figure(
        draw_pareto([plan.timeline for plan in points], serial, points[0].lower_bound), picture
    )
    print(f"drawn in  {picture}")


def _write_plan(plan: Plan, path: Path) -> None:
    write_atomically(path, json.dumps(plan_to_json(plan)) + "\n")
