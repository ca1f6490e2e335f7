"""Plans a fused pipeline schedule for models that share devices.

PROBLEM.json describes models and devices (docs/planner.md; examples in examples/problems), or is a
plan, which is then checked and drawn without a search. Prints what was found against the lower
bound and serial 1F1B. Ctrl-C ends a search with the best plan so far.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_rlhfuse.cli import Refuse, positive_seconds, whole_number
from megatron_rlhfuse.observe.jsonl import write_atomically
from megatron_rlhfuse.schedule import plan as plans
from megatron_rlhfuse.schedule.draw_numbers import headline, show
from megatron_rlhfuse.schedule.errors import OrderError, ProblemError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.fields import HIGHEST
from megatron_rlhfuse.schedule.order import (
    order_from_csv,
    order_to_csv,
    order_to_tokens,
    parse_order,
)
from megatron_rlhfuse.schedule.plan import Plan
from megatron_rlhfuse.schedule.problem import Problem, load_json, parse_problem

DEFAULT_SECONDS = 10.0
METHODS = ("guided", "annealing", "exact", "greedy")
FILES = ("output", "csv", "png", "svg", "html", "trace")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("problem", metavar="PROBLEM.json", type=Path, help="a problem, or a plan")
    parser.add_argument("-o", "--output", metavar="PLAN.json", type=Path, help="write the plan")
    parser.add_argument(
        "--seconds",
        metavar="S",
        type=positive_seconds,
        help="time to search (default: 10, or no limit with --iterations)",
    )
    parser.add_argument(
        "--iterations",
        metavar="N",
        type=whole_number(1),
        help="bound the search by its steps: the result is the same on every machine",
    )
    parser.add_argument("--threads", metavar="T", type=whole_number(1), help="default: all cores")
    parser.add_argument(
        "--seed", metavar="N", type=whole_number(0), default=0, help="of the search (default: 0)"
    )
    parser.add_argument(
        "--method",
        choices=METHODS,
        default="guided",
        help="guided (default); annealing: the paper's, slower, for reference; exact: OR-tools' "
        "CP-SAT, small problems only; greedy: no search",
    )
    parser.add_argument(
        "--stop-at-bound",
        action="store_true",
        help="end as soon as no plan can be shorter, instead of lowering the memory after that",
    )
    parser.add_argument(
        "--memory-limit",
        metavar="X",
        type=float,
        help="cap on the activation memory of every device, in place of the problem's",
    )
    parser.add_argument(
        "--order", metavar="FILE.csv", type=Path, help="check and use this order, do not search"
    )
    parser.add_argument(
        "--csv", metavar="FILE", type=Path, help="write the order, a row per device"
    )
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw it below serial 1F1B")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="the same as SVG")
    parser.add_argument("--html", metavar="FILE", type=Path, help="a page to zoom into it")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="a Chrome trace, for Perfetto")
    parser.add_argument(
        "--pareto",
        metavar="FOLDER",
        type=Path,
        help="search the trade of time against memory; writes a plan for each point",
    )


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    _check_arguments(args, refuse)
    try:
        data = load_json(args.problem)
        given = plans.parse_plan(data) if plans.is_plan(data) else None
        problem = given.timeline.problem if given is not None else parse_problem(data)
        if args.memory_limit is not None:
            problem = replace(problem, memory_limit=(args.memory_limit,) * problem.devices)
        if args.pareto is not None:
            return _run_pareto(problem, args)
        plan, how = _make(problem, given, args)
        _report(plan, how)
        _write_files(plan, args)
    except OrderError as error:
        print(error.grid)
        refuse(_in_file(error, args.order or args.problem))
    except ScheduleError as error:
        refuse(_in_file(error, args.problem))
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")
    except UnicodeDecodeError as error:
        refuse(f"{args.order}: not text: {error.reason}")
    return 0


def _check_arguments(args: argparse.Namespace, refuse: Refuse) -> None:
    for name in FILES:
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            refuse(f"argument --{name}: {path} must be a file in a folder that exists")
        if path is not None and name in ("png", "svg") and path.suffix.lower() != f".{name}":
            refuse(f"argument --{name}: {path} must end in .{name}")
    if args.memory_limit is not None and not 0 <= args.memory_limit <= HIGHEST:
        refuse(
            f"argument --memory-limit: want a number of at least 0 and at most {HIGHEST:g}, "
            f"got {args.memory_limit}"
        )
    if args.pareto is not None and (args.method != "guided" or args.order is not None):
        refuse("argument --pareto: goes with the guided search only")
    if args.pareto is not None and any(getattr(args, name) is not None for name in FILES):
        refuse("argument --pareto: writes a plan per point to its folder, and no other file")
    if args.method == "exact" and args.iterations is not None:
        refuse("argument --iterations: the exact method is bounded by --seconds")


def _make(problem: Problem, given: Plan | None, args: argparse.Namespace) -> tuple[Plan, str]:
    """The plan and, in a few words, where it is from."""
    from megatron_rlhfuse.schedule.search import greedy

    if args.order is not None:
        order = parse_order(problem, order_from_csv(args.order.read_text(encoding="utf-8")))
        timeline = evaluate(problem, order)
        return _checked(timeline, greedy(problem).makespan, f"order of {args.order}")
    if given is not None:
        timeline = evaluate(problem, given.timeline.order)
        return _checked(timeline, given.greedy, f"plan of {args.problem}, checked")
    if args.method == "greedy":
        timeline = greedy(problem)
        return plans.make_plan(timeline, greedy=timeline.makespan, seconds=0.0), "greedy"
    if args.method == "exact":
        return _solve(problem, args)
    with _progress(args) as progress:
        return _search(problem, args, progress)


def _checked(timeline: Timeline, greedy: float, how: str) -> tuple[Plan, str]:
    plans.check_limits(timeline)
    return plans.make_plan(timeline, greedy=greedy, seconds=0.0), how


def _search(problem: Problem, args: argparse.Namespace, progress: Any) -> tuple[Plan, str]:
    from megatron_rlhfuse.schedule import search

    method = search.search if args.method == "guided" else search.anneal
    found = method(
        problem,
        **_budget(args),
        threads=args.threads,
        seed=args.seed,
        stop_at_bound=args.stop_at_bound,
        progress=progress,
    )
    plan = plans.make_plan(found.timeline, greedy=found.greedy, seconds=found.seconds)
    return plan, f"{args.method} search, {found.seconds:.1f} s, {found.turns:,} {found.unit}"


def _solve(problem: Problem, args: argparse.Namespace) -> tuple[Plan, str]:
    from megatron_rlhfuse.schedule.exact import solve_exactly
    from megatron_rlhfuse.schedule.search import greedy

    seconds = args.seconds or DEFAULT_SECONDS
    found = solve_exactly(problem, seconds)
    plan = plans.make_plan(found.timeline, greedy=greedy(problem).makespan, seconds=seconds)
    proof = "proven optimal" if found.optimal else f"no plan is shorter than {show(found.bound)}"
    return plan, f"exact (CP-SAT): {proof}"


def _budget(args: argparse.Namespace) -> dict[str, Any]:
    seconds = args.seconds
    if seconds is None and args.iterations is None:
        seconds = DEFAULT_SECONDS
    return {"seconds": seconds, "iterations": args.iterations}


@contextmanager
def _progress(args: argparse.Namespace) -> Iterator[Any]:
    """What the search calls while it goes on: a line on a terminal; Ctrl-C ends the search."""
    from megatron_rlhfuse.schedule.search import Progress, StopSearch

    interrupted = False

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True

    def show_progress(now: Progress) -> None:
        if sys.stderr.isatty():
            gap = now.makespan / now.lower_bound - 1
            line = (
                f"\r{now.seconds:6.1f} s  makespan {show(now.makespan)} "
                f"({100 * gap:.2f} % above the bound)  peak memory {show(now.peak_activation)}"
            )
            print(f"{line}\033[K", end="", file=sys.stderr, flush=True)
        if interrupted:
            raise StopSearch

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield show_progress
    finally:
        signal.signal(signal.SIGINT, previous)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _report(plan: Plan, how: str) -> None:
    timeline = plan.timeline
    bound = "no plan is shorter"
    if not plan.at_bound:
        bound = f"{100 * (timeline.makespan / plan.lower_bound - 1):.2f} % above the lower bound"
    bound += f" ({show(plan.lower_bound)})" if not plan.at_bound else ""
    peak = max(timeline.peak_activation)
    serial_peak = max(plan.serial.peak_activation)
    speedup = plan.serial_1f1b / timeline.makespan
    print(headline(timeline))
    print(f"makespan     {show(timeline.makespan)}: {bound}")
    print(f"serial 1F1B  {show(plan.serial_1f1b)}: the plan is {speedup:.2f}x as fast")
    print(f"greedy       {show(plan.greedy)}")
    print(f"bubbles      {100 * timeline.bubble_fraction():.1f} % of the devices' time")
    print(f"peak memory  {show(peak)} of activations; serial 1F1B {show(serial_peak)}")
    print(f"by           {how}")


def _write_files(plan: Plan, args: argparse.Namespace) -> None:
    timeline = plan.timeline
    if args.output is not None:
        write_atomically(args.output, json.dumps(plans.plan_to_json(plan)) + "\n")
    if args.csv is not None:
        write_atomically(args.csv, order_to_csv(order_to_tokens(timeline.order)))
    if args.trace is not None:
        from megatron_rlhfuse.schedule.chrome_trace import chrome_trace

        write_atomically(args.trace, json.dumps(chrome_trace(timeline)) + "\n")
    if args.html is not None:
        from megatron_rlhfuse.schedule.draw_html import draw_html

        panels = [("serial 1F1B", plan.serial), ("fused", timeline)]
        write_atomically(args.html, draw_html(panels, plan.lower_bound))
    if args.png is not None or args.svg is not None:
        from megatron_rlhfuse.schedule.draw import draw_timeline, save_figure

        panels = [("serial 1F1B", plan.serial), ("fused", timeline)]
        figure = draw_timeline(panels, plan.lower_bound)
        for kind in ("png", "svg"):
            if getattr(args, kind) is not None:
                save_figure(figure, getattr(args, kind))
    written = [str(path) for name in FILES if (path := getattr(args, name)) is not None]
    if written:
        print(f"wrote        {', '.join(written)}")


def _run_pareto(problem: Problem, args: argparse.Namespace) -> int:
    from megatron_rlhfuse.schedule.draw import save_figure
    from megatron_rlhfuse.schedule.draw_pareto import draw_pareto
    from megatron_rlhfuse.schedule.pareto import pareto
    from megatron_rlhfuse.schedule.search import greedy

    args.pareto.mkdir(parents=True, exist_ok=True)
    with _progress(args) as progress:
        found = pareto(
            problem, **_budget(args), threads=args.threads, seed=args.seed, progress=progress
        )
    first = greedy(problem)
    print(headline(found[0]))
    print("makespan  peak memory  plan")
    points = [plans.make_plan(timeline, greedy=first.makespan, seconds=0.0) for timeline in found]
    for number, plan in enumerate(points):
        path = args.pareto / f"plan-{number:02d}.json"
        write_atomically(path, json.dumps(plans.plan_to_json(plan)) + "\n")
        peak = max(plan.timeline.peak_activation)
        print(f"{show(plan.timeline.makespan):>8}  {show(peak):>11}  {path}")
    serial = points[0].serial
    print(f"{show(serial.makespan):>8}  {show(max(serial.peak_activation)):>11}  (serial 1F1B)")
    picture = args.pareto / "front.png"
    save_figure(draw_pareto(found, serial, points[0].lower_bound), picture)
    print(f"drawn in  {picture}")
    return 0


def _in_file(error: ScheduleError, path: Path) -> str:
    """The message with the file's name, once; of the problem's file where a field is at fault."""
    message = str(error)
    if isinstance(error, ProblemError) and message.startswith(f"{path}: "):
        return message
    return f"{path}: {message}"
