"""Plans a fused pipeline schedule for models that share devices.

PROBLEM.json describes models and devices (docs/planner.md; examples in examples/problems), or is a
plan, which is then checked and drawn, and improved if a budget is given. Prints what was found
against the lower bound and serial 1F1B. Ctrl-C ends a search with the best plan so far.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

from megatron_rlhfuse.cli import Refuse
from megatron_rlhfuse.schedule import plan as plans
from megatron_rlhfuse.schedule.baselines import split_backward
from megatron_rlhfuse.schedule.draw_numbers import show
from megatron_rlhfuse.schedule.errors import OrderError, ProblemError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.fields import HIGHEST
from megatron_rlhfuse.schedule.order import Order, order_from_csv, parse_order
from megatron_rlhfuse.schedule.pareto import pareto
from megatron_rlhfuse.schedule.plan import Plan
from megatron_rlhfuse.schedule.plan_output import FILES, report, write_files, write_front
from megatron_rlhfuse.schedule.problem import Problem, load_json, parse_problem
from megatron_rlhfuse.schedule.search import anneal, greedy, search
from megatron_rlhfuse.schedule.search_terminal import (
    DEFAULT_SECONDS,
    add_search_flags,
    budget,
    watched_search,
)

METHODS = ("guided", "annealing", "exact", "greedy")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("problem", metavar="PROBLEM.json", type=Path, help="a problem, or a plan")
    parser.add_argument("-o", "--output", metavar="PLAN.json", type=Path, help="write the plan")
    add_search_flags(parser)
    parser.add_argument(
        "--method",
        choices=METHODS,
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
        "--order",
        metavar="FILE.csv",
        type=Path,
        help="check this order; improve it if a budget is given",
    )
    parser.add_argument(
        "--split-backward",
        action="store_true",
        help="split every backward in halves, for input and for weight gradients: the second can "
        "wait and fill bubbles",
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
        _check_overwriting(args, given is not None, refuse)
        if given is not None or args.order is not None:
            _check_given(args, refuse)
        if args.split_backward:
            problem = split_backward(problem)
        if args.memory_limit is not None:
            problem = replace(problem, memory_limit=(args.memory_limit,) * problem.devices)
        if args.pareto is not None:
            return _run_pareto(problem, args)
        plan, how = _make(problem, given, args)
        report(plan, how)
        write_files(plan, {name: getattr(args, name) for name in FILES})
    except OrderError as error:
        print(error.grid)
        refuse(_in_file(error, args.order or args.problem))
    except ScheduleError as error:
        of_order = args.order is not None and str(error).startswith("order: ")
        refuse(_in_file(error, args.order if of_order else args.problem))
    except BrokenPipeError:
        raise  # for the caller: nobody reads any more
    except OSError as error:
        # The system names no file where a disk is full.
        refuse(f"{error.filename or 'writing the results'}: {error.strerror}")
    except UnicodeDecodeError as error:
        refuse(f"{args.order}: not text: {error.reason}")
    return 0


def _check_arguments(args: argparse.Namespace, refuse: Refuse) -> None:
    for name in FILES:
        path = getattr(args, name)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            refuse(f"argument --{name}: {path} must be a file in a folder that exists")
        if path is not None and str(path) == "-":
            refuse(f"argument --{name}: want a file; /dev/stdout is the standard output")
        if path is not None and name in ("png", "svg") and path.suffix.lower() != f".{name}":
            refuse(f"argument --{name}: {path} must end in .{name}")
    if args.memory_limit is not None and not 0 <= args.memory_limit <= HIGHEST:
        refuse(
            f"argument --memory-limit: want a number of at least 0 and at most {HIGHEST:g}, "
            f"got {args.memory_limit}"
        )
    if args.pareto is not None and ((args.method or "guided") != "guided" or args.stop_at_bound):
        refuse("argument --pareto: goes with the guided search only, and not with --stop-at-bound")
    if args.pareto is not None and any(getattr(args, name) is not None for name in FILES):
        refuse("argument --pareto: writes a plan per point to its folder, and no other file")
    if args.method == "greedy" and (args.seconds or args.iterations or args.stop_at_bound):
        refuse("argument --method: greedy does not search, and takes no budget")
    if args.method in ("greedy", "exact") and (args.seed is not None or args.threads is not None):
        refuse(f"argument --method: {args.method} takes no --seed and no --threads")
    if args.method == "exact" and args.iterations is not None:
        refuse("argument --iterations: the exact method is bounded by --seconds")


def _check_overwriting(args: argparse.Namespace, is_plan: bool, refuse: Refuse) -> None:
    """Refuses an output that is an input, but a plan that is written anew, or another output."""
    taken = {path.resolve(): "an input" for path in (args.problem, args.order) if path is not None}
    for name in FILES:
        path = getattr(args, name)
        if path is None or (path.exists() and not path.is_file()):
            continue
        place = path.resolve()
        if place in taken and not (is_plan and name == "output" and path == args.problem):
            refuse(f"argument --{name}: {path} is {taken[place]}")
        taken[place] = f"written by --{name}"


def _check_given(args: argparse.Namespace, refuse: Refuse) -> None:
    """Refuses flags that would be ignored, or make no sense, where there is an order to start."""
    if args.pareto is not None or args.split_backward:
        flag = "--pareto" if args.pareto is not None else "--split-backward"
        refuse(f"argument {flag}: wants a problem; there is an order of it already")
    if (args.method or "guided") != "guided":
        refuse("argument --method: only the guided search improves an order that is given")
    if args.seconds is None and args.iterations is None:
        for name in ("method", "seed", "threads", "stop_at_bound"):
            value = getattr(args, name)
            if value is not None and value is not False:
                flag = "--" + name.replace("_", "-")
                refuse(
                    f"argument {flag}: wants --seconds or --iterations too, else an order "
                    "that is given is only checked"
                )


def _make(problem: Problem, given: Plan | None, args: argparse.Namespace) -> tuple[Plan, str]:
    """The plan and, in a few words, where it is from."""
    start, origin = None, ""
    if args.order is not None:
        start = parse_order(problem, order_from_csv(args.order.read_text(encoding="utf-8-sig")))
        origin = f"order of {args.order}"
    elif given is not None:
        start, origin = given.timeline.order, f"plan of {args.problem}"
    if start is not None:
        timeline = evaluate(problem, start)
        if args.seconds is None and args.iterations is None:
            plans.check_limits(timeline)
            kept = given is not None and problem == given.timeline.problem
            first = given.greedy if given is not None and kept else greedy(problem).makespan
            seconds = given.seconds if given is not None else 0.0
            return plans.make_plan(timeline, greedy=first, seconds=seconds), f"{origin}, checked"
        if timeline.over_limit() is not None:
            origin += ", which exceeds the memory limit and was left aside"
    if args.method == "greedy":
        timeline = greedy(problem)
        return plans.make_plan(timeline, greedy=timeline.makespan, seconds=0.0), "greedy"
    if args.method == "exact":
        return _solve(problem, args)
    plan, how = _search(problem, start, args)
    return plan, f"{how}, from the {origin}" if origin else how


def _search(problem: Problem, start: Order | None, args: argparse.Namespace) -> tuple[Plan, str]:
    method = args.method or "guided"
    with watched_search() as progress:
        settings = {
            **budget(args.seconds, args.iterations),
            "threads": args.threads,
            "seed": args.seed or 0,
            "stop_at_bound": args.stop_at_bound,
            "progress": progress,
        }
        if method == "guided":
            found = search(problem, start=start, **settings)
        else:
            found = anneal(problem, **settings)
    plan = plans.Plan(found.timeline, found.lower_bound, found.greedy, found.seconds)
    how = f"{method} search, {found.seconds:.1f} s, {found.turns:,} {found.unit}"
    return plan, f"{how}, interrupted" if progress.interrupted else how


def _solve(problem: Problem, args: argparse.Namespace) -> tuple[Plan, str]:
    from megatron_rlhfuse.schedule.exact import solve_exactly

    began = time.monotonic()
    found = solve_exactly(problem, args.seconds or DEFAULT_SECONDS)
    seconds = time.monotonic() - began
    first = greedy(problem)
    best = min(found.timeline, first, key=lambda timeline: timeline.makespan)
    plan = plans.make_plan(best, greedy=first.makespan, seconds=seconds)
    if found.optimal:
        return plan, "exact (CP-SAT): proven optimal"
    ended = f"exact (CP-SAT): time ran out, the optimum is at least {show(found.bound)}"
    return plan, f"{ended}; this is the greedy plan" if best is first else ended


def _run_pareto(problem: Problem, args: argparse.Namespace) -> int:
    if any(args.pareto.glob("plan-*.json")):
        raise ScheduleError(f"{args.pareto}: holds plans already; name another folder")
    args.pareto.mkdir(parents=True, exist_ok=True)
    with watched_search() as progress:
        found = pareto(
            problem,
            **budget(args.seconds, args.iterations),
            threads=args.threads,
            seed=args.seed or 0,
            progress=progress,
        )
    first = greedy(problem).makespan
    write_front([plans.make_plan(each, greedy=first, seconds=0.0) for each in found], args.pareto)
    if progress.interrupted:
        print("interrupted: not all caps on the memory were tried")
    return 0


def _in_file(error: ScheduleError, path: Path) -> str:
    """The message with the file's name, once; of the problem's file where a field is at fault."""
    message = str(error)
    if isinstance(error, ProblemError) and message.startswith(f"{path}: "):
        return message
    return f"{path}: {message}"
