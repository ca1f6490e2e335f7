"""Draws a run's metrics and trace into one HTML page and PNGs.

Reads what the run left in its folder (`metrics.jsonl`, the trace, `args.json`), writes PNGs to
its `plots/` and one self-contained HTML page. Works on a run that is still going on, or was
killed. What a run did not measure is not drawn.
"""

from __future__ import annotations

import argparse
import io
import json
from pathlib import Path
from typing import Any

import matplotlib

from megatron_rlhfuse.cli import Refuse
from megatron_rlhfuse.observe import (
    gantt,
    jsonl,
    metrics,
    page,
    plots,
    style,
    summary,
    timeline,
    trace,
)

SETTINGS_NAME = "args.json"
PLOTS_NAME = "plots"


class BadRunError(ValueError):
    """What is wrong with a run's folder: one line that names the path."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", type=Path, help="folder of the run")
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the HTML page to write (default: report.html in RUN)",
    )


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    output = args.output
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        refuse(f"argument -o/--output: {output} must be a file in a folder that exists")
    try:
        page_path = write_report(args.run, output)
        print(summary.text(_read_metrics(args.run)))
        print(f"report  {page_path}\nplots   {args.run / PLOTS_NAME}")
    except BadRunError as error:
        refuse(str(error))
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")
    return 0


def write_report(folder: Path | str, output: Path | str | None = None) -> Path:
    """Writes the report of the run in `folder`; returns the path of the HTML page.

    Raises BadRunError where the folder holds no run or a damaged one, OSError where nothing can
    be written.
    """
    folder = Path(folder)
    records = _read_metrics(folder)
    settings = _read_settings(folder)
    last = _read_last_iteration(folder)
    pictures = _draw(records, last)
    plots_folder = folder / PLOTS_NAME
    plots_folder.mkdir(exist_ok=True)
    for picture in pictures:
        (plots_folder / f"{picture.title}.png").write_bytes(picture.png)
    notes = [
        f"{name} was not a finite number in iteration {', '.join(map(str, where[:10]))}"
        + (f" and {len(where) - 10} more" if len(where) > 10 else "")
        for name, where in summary.not_finite(records).items()
    ]
    if last is None:
        notes.append("The run left no trace of a whole iteration, so there is no timeline.")
    html = page.render(
        page.Page(
            title=f"Run {folder.resolve().name}",
            iterations=(records[0]["iteration"], records[-1]["iteration"]),
            averaged=summary.window(records),
            changes=summary.changes(records),
            stages=summary.stage_times(records),
            pictures=pictures,
            notes=notes,
            settings=settings,
        )
    )
    path = Path(output) if output is not None else folder / "report.html"
    jsonl.write_atomically(path, html)
    return path


def _draw(records: list[dict[str, Any]], last: timeline.Timeline | None) -> list[page.Picture]:
    """Every picture for which there is data, in the order of the page."""
    drawn: list[page.Picture] = []

    def add(name: str, figure: Any, wide: bool) -> None:
        if figure is not None:
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png")
            drawn.append(page.Picture(name, buffer.getvalue(), wide))

    with matplotlib.rc_context(style.RC):
        for chart in plots.CHARTS:
            add(chart.name, plots.draw_chart(chart, records), chart.wide)
        add("stages", plots.draw_stages(records), True)
        if last is not None:
            add("timeline", gantt.draw_timeline(last), True)
    return drawn


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    if not folder.is_dir():
        raise BadRunError(f"{folder}: no such folder")
    path = folder / metrics.FILE_NAME
    if not path.is_file():
        raise BadRunError(f"{path}: no such file; RUN must be a folder that a run wrote to")
    try:
        records = metrics.read_metrics(path)
    except ValueError as error:
        raise BadRunError(str(error)) from error
    if not records:
        raise BadRunError(f"{path}: empty; the run has finished no iteration yet")
    return records


def _read_settings(folder: Path) -> dict[str, Any] | None:
    path = folder / SETTINGS_NAME
    if not path.exists():
        return None
    try:
        settings = json.loads(path.read_bytes())
    except ValueError as error:
        raise BadRunError(f"{path}: not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise BadRunError(f"{path}: expected a JSON object")
    return settings


def _read_last_iteration(folder: Path) -> timeline.Timeline | None:
    """The last iteration in the run's trace, which is merged first if a part is newer."""
    path = folder / trace.FILE_NAME
    written = [part.stat().st_mtime_ns for part in trace.parts(folder).values()]
    try:
        if written and (not path.exists() or max(written) > path.stat().st_mtime_ns):
            trace.merge(folder)
    except (ValueError, KeyError) as error:
        raise BadRunError(_trace_fault(folder / "trace-rank*.jsonl", error)) from error
    if not path.exists():
        return None
    try:
        return timeline.last_iteration(json.loads(path.read_bytes())["traceEvents"])
    except (ValueError, KeyError, TypeError) as error:
        raise BadRunError(_trace_fault(path, error)) from error


def _trace_fault(path: Path, error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{path}: not a trace of this project: no field {error}"
    return str(error) if str(path.parent) in str(error) else f"{path}: {error}"
