"""One HTML page on which a schedule can be looked at closely: zoom, tooltips, baselines.

The page holds everything it needs and asks no network for anything; its policy forbids it. What
comes from a problem (names of models) and the labels is escaped, inside the script's data too.

PURE: from timelines to a string.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any

from megatron_rlhfuse.schedule.draw_numbers import (
    BUBBLE,
    KIND_NAMES,
    Labelled,
    Numbers,
    color,
    compare,
    headline,
    legend,
    memory_curve,
    model_names,
    show,
    shown_devices,
    shown_name,
    worst_device,
)
from megatron_rlhfuse.schedule.draw_script import CSS, SCRIPT
from megatron_rlhfuse.schedule.evaluate import Timeline

MAX_ROWS = 256
MAX_BOXES = 200_000
"""Subtasks per schedule that browsers draw without a pause."""


def draw_html(timelines: Labelled, lower_bound: float | None) -> str:
    """The whole page; the last of `timelines` is the plan, those before it are its baselines.

    Raises ScheduleError if there is no timeline.
    """
    numbers = compare(timelines, lower_bound)
    labels = [shown_name(label) for label, _ in timelines]
    plan = timelines[-1][1]
    shown = shown_devices(timelines, MAX_ROWS, MAX_BOXES)
    title = headline(plan)
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<p>{escape(_explanation(labels, numbers))}</p>",
        _table(labels, numbers, lower_bound),
        f"<div class='bar'>{_legend(plan, lower_bound)}</div>",
        f"<div class='bar'>{_controls(labels)}</div>",
        _note(plan.problem.devices - shown),
        *(
            f"<section id='panel{number}'><h2>{escape(label)}</h2><canvas></canvas></section>"
            for number, label in enumerate(labels)
        ),
        f"<section id='memory'><h2>activation memory, {escape(labels[-1])}</h2>"
        "<p id='reading'></p><canvas></canvas></section>",
        "<div id='tip' hidden></div>",
    ]
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; "
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">\n"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n<script type='application/json' id='data'>"
        + _script_json(_data(timelines, lower_bound, shown))
        + f"</script>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def _data(timelines: Labelled, bound: float | None, shown: int) -> dict[str, Any]:
    """What the script draws.

    A subtask is [token, model, kind, stage, start, end]; a memory curve a list of [time, value].
    """
    plan = timelines[-1][1]
    problem, names = plan.problem, model_names(plan.problem)
    worst = worst_device(plan)
    devices = sorted({*range(shown), worst})
    limits = [limit if math.isfinite(limit) else None for limit in problem.memory_limit]
    return {
        "models": [
            {
                "name": name,
                "colors": {kind: color(number, kind) for kind in model.kinds},
            }
            for number, (name, model) in enumerate(zip(names, problem.models, strict=True))
        ],
        "kinds": KIND_NAMES,
        "bubble": BUBBLE,
        "bound": bound,
        "schedules": [
            {
                "makespan": timeline.makespan,
                "rows": [_row(timeline, device) for device in range(shown)],
            }
            for _, timeline in timelines
        ],
        "memory": {str(device): memory_curve(plan, device) for device in devices},
        "peak": max(plan.peak_activation),
        "worst": worst,
        "limits": {str(device): limits[device] for device in devices},
    }


def _row(timeline: Timeline, device: int) -> list[list[Any]]:
    return [
        [
            subtask.token,
            subtask.model,
            subtask.kind,
            subtask.stage,
            timeline.start[device][position],
            timeline.end(device, position),
        ]
        for position, subtask in enumerate(timeline.order[device])
    ]


def _script_json(data: dict[str, Any]) -> str:
    """JSON that cannot end the script element it stands in, whatever its strings hold."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text


def _explanation(labels: Sequence[str], numbers: Sequence[Numbers]) -> str:
    """Two sentences for someone who has never seen such a picture."""
    outcome = f"{labels[-1]} takes {show(numbers[-1].makespan)}"
    sooner = True
    if len(labels) > 1:
        outcome += f" where {labels[0]} takes {show(numbers[0].makespan)}"
        sooner = numbers[-1].makespan < numbers[0].makespan
    aim = "so that the same work ends sooner" if sooner else "which saves nothing here"
    return (
        "Each row is a device and each box one micro-batch on one stage of a model: light is its "
        "forward pass, full colour its backward pass, and grey a bubble, in which the device "
        "waits. Stage fusion lets the micro-batches of one model run in the bubbles of another, "
        f"{aim}: {outcome}."
    )


def _table(labels: Sequence[str], numbers: Sequence[Numbers], lower_bound: float | None) -> str:
    head = ["schedule", "makespan", "speed-up", "bubbles", "above the lower bound", "peak memory"]
    rows = [
        [
            escape(label),
            show(found.makespan),
            "\u2013" if found.speedup is None else f"{found.speedup:.2f}\u00d7",
            f"{found.bubbles:.1%}",
            "\u2013" if found.gap is None else f"{found.gap:.1%}",
            show(found.peak),
        ]
        for label, found in zip(labels, numbers, strict=True)
    ]
    if lower_bound is not None:
        rows.append(["lower bound", show(lower_bound), *["\u2013"] * 4])
    lines = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    header = "".join(f"<th>{cell}</th>" for cell in head)
    return f"<table><thead><tr>{header}</tr></thead><tbody>{lines}</tbody></table>"


def _legend(plan: Timeline, lower_bound: float | None) -> str:
    meanings = "".join(
        f"<span><i style='background:{fill}'></i>{escape(text)}</span>"
        for fill, text in legend(plan.problem)
    )
    bound = "" if lower_bound is None else f"<span>dashed: lower bound {show(lower_bound)}</span>"
    return meanings + bound


def _controls(labels: Sequence[str]) -> str:
    toggles = "".join(
        f"<label><input type='checkbox' checked data-panel='{number}'> {escape(label)}</label>"
        for number, label in enumerate(labels[:-1])
    )
    return (
        "<button data-zoom='0.5'>zoom in</button><button data-zoom='2'>zoom out</button>"
        f"<button data-zoom='0'>whole</button>{toggles}"
        "<span class='muted'>wheel: zoom; drag: move; double click: whole</span>"
    )


def _note(left_out: int) -> str:
    return f"<p class='muted'>{left_out} more devices are not shown.</p>" if left_out else ""
