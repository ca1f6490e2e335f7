"""Plans the twelve published instances, and measures evaluation and scaling of the search.

    python benchmarks/plan.py [--seconds S] [--threads T] [--seed N] [--method guided|annealing]
                              [--instances 0,1,...] [--skip-scaling]

Standard output: a JSON line per instance with
  instance, makespan, lower_bound, peak_activation (of the fullest device), least_memory (bound at
  this makespan), published_makespan, published_peak, seconds, seconds_to_bound,
  seconds_to_published_peak (both met; null if not), moves_per_s (turns, or swaps of an annealing);
a line per problem size with the speed of evaluating a swap incrementally and from scratch, and of
the guided search; one
for the largest problem, how its search goes on; and a summary as the last line. Progress goes to
standard error.

The published figures are those of the paper's solver (RLHFuse, NSDI '25; its search took 20 to
4979 s on at least 512 CPUs).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_rlhfuse import _planner
from megatron_rlhfuse.schedule.bounds import lower_bound, reaches
from megatron_rlhfuse.schedule.network import to_network
from megatron_rlhfuse.schedule.problem import Problem, load_problem, parse_problem
from megatron_rlhfuse.schedule.search import Progress, anneal, greedy, search

PROBLEMS = Path(__file__).resolve().parent.parent / "examples" / "problems"

PUBLISHED = (
    (708, 19.7),
    (372, 15.75),
    (225, 15.6),
    (702, 20.5),
    (366, 18.55),
    (225, 15.6),
    (618, 39.72),
    (330, 29.88),
    (186, 26.24),
    (613, 38.72),
    (318, 32.16),
    (186, 26.24),
)
"""Makespan and peak activation memory of the paper's best plan for each instance."""

SIZES = ((4, 16), (8, 32), (16, 64), (32, 128), (64, 256))
"""Devices and micro-batches of each of two models in opposite directions."""

SWAP_SECONDS = 1.0
"""Time for measuring each way of evaluating swaps."""


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="per instance (default: 60)")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--method", choices=("guided", "annealing"), default="guided")
    parser.add_argument("--instances", help="some of 0 to 11, with commas between (default: all)")
    parser.add_argument("--skip-scaling", action="store_true", help="the instances only")
    options = parser.parse_args()
    known = [str(instance) for instance in range(len(PUBLISHED))]
    chosen = known if options.instances is None else options.instances.split(",")
    if not set(chosen) <= set(known):
        parser.error("--instances: want numbers from 0 to 11 with commas between")
    results = [_plan(int(instance), options) for instance in chosen]
    summary = _summary(results)
    if not options.skip_scaling:
        for devices, micro_batches in SIZES:
            _print(_evaluation(devices, micro_batches, options.seed))
        summary |= _print(_largest(options))
    _print({"summary": True, "method": options.method, **summary})
    return 0


def _plan(instance: int, options: argparse.Namespace) -> dict[str, Any]:
    problem = load_problem(PROBLEMS / f"published-{instance:02d}.json")
    makespan, peak = PUBLISHED[instance]
    times: dict[str, float] = {}

    def watch(now: Progress) -> None:
        if reaches(now.makespan, now.lower_bound):
            times.setdefault("bound", now.seconds)
        if reaches(now.makespan, makespan) and reaches(now.peak_activation, peak):
            times.setdefault("published", now.seconds)

    method = search if options.method == "guided" else anneal
    found = method(
        problem,
        seconds=options.seconds,
        threads=options.threads,
        seed=options.seed,
        progress=watch,
    )
    return _print(
        {
            "instance": instance,
            "makespan": found.timeline.makespan,
            "lower_bound": found.lower_bound,
            "peak_activation": round(max(found.timeline.peak_activation), 6),
            "least_memory": round(found.least_memory, 6),
            "published_makespan": makespan,
            "published_peak": peak,
            "seconds": round(found.seconds, 2),
            "seconds_to_bound": _rounded(times.get("bound")),
            "seconds_to_published_peak": _rounded(times.get("published")),
            "moves_per_s": round(found.turns / found.seconds),
        }
    )


def _summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [result["peak_activation"] / result["published_peak"] for result in results]
    return {
        "instances": len(results),
        "at_bound": sum(reaches(r["makespan"], r["lower_bound"]) for r in results),
        "at_most_published_peak": sum(
            reaches(r["peak_activation"], r["published_peak"])
            and reaches(r["makespan"], r["published_makespan"])
            for r in results
        ),
        "at_least_memory": sum(reaches(r["peak_activation"], r["least_memory"]) for r in results),
        "peak_over_published": round(statistics.geometric_mean(ratios), 4),
        "slowest_seconds_to_bound": _slowest(results, "seconds_to_bound"),
        "slowest_seconds_to_published_peak": _slowest(results, "seconds_to_published_peak"),
    }


def _slowest(results: list[dict[str, Any]], name: str) -> float | None:
    """None if an instance did not get there."""
    values = [result[name] for result in results]
    return None if None in values else max(values)


def _opposite(devices: int, micro_batches: int) -> Problem:
    there = list(range(devices))
    sizes = ((5, 10, 1.95, there), (2, 4, 1, there[::-1]))
    return parse_problem(
        {
            "devices": devices,
            "models": [
                {
                    "micro_batches": micro_batches,
                    "forward": forward,
                    "backward": backward,
                    "activation": activation,
                    "pipelines": [pipeline],
                }
                for forward, backward, activation, pipeline in sizes
            ],
        }
    )


def _evaluation(devices: int, micro_batches: int, seed: int) -> dict[str, Any]:
    """Swaps of neighbours, of which none may lengthen the greedy plan, on one core.

    A swap that would is refused in constant time; one that is applied costs as much as it moves.
    The turns of the guided search build the whole plan anew: their number falls with its size.
    """
    problem = _opposite(devices, micro_batches)
    ticked = to_network(problem)
    start = _planner.greedy(ticked.network, ticked.limits)
    incremental = _swap_rate(ticked.network, start, seed, full=False)
    both = _swap_rate(ticked.network, start, seed, full=True)
    turns = search(problem, seconds=2 * SWAP_SECONDS, threads=1, seed=seed)
    full = 1 / (1 / both["rate"] - 1 / incremental["rate"])
    return {
        "size": f"{devices}x{micro_batches}",
        "subtasks": ticked.network.subtasks,
        "swaps_per_s": round(incremental["rate"]),
        "full_evaluations_per_s": round(full),
        "ratio": round(incremental["rate"] / full, 1),
        "applied_share": round(incremental["applied"], 4),
        "subtasks_touched_per_swap": round(incremental["touched"], 1),
        "subtasks_touched_per_applied_swap": round(
            incremental["touched"] / max(incremental["applied"], 1e-9), 1
        ),
        "turns_per_s": round(turns.turns / turns.seconds, 1),
    }


def _swap_rate(
    network: _planner.Network, start: _planner.ScheduleRow, seed: int, full: bool
) -> dict[str, float]:
    swaps, took = 64, 0.0
    while took < SWAP_SECONDS:
        swaps *= 2 if took < SWAP_SECONDS / 8 else math.ceil(SWAP_SECONDS / took)
        _, applied, touched, took = _planner.try_swaps(network, start, swaps, 0, seed, full)
    return {"rate": swaps / took, "touched": touched / swaps, "applied": applied / swaps}


def _largest(options: argparse.Namespace) -> dict[str, Any]:
    """The greedy plan of the largest size, and how its search goes on."""
    problem = _opposite(*SIZES[-1])
    began = time.perf_counter()
    greedy(problem)
    greedy_s = time.perf_counter() - began
    steps: list[tuple[float, float, float]] = []

    def watch(now: Progress) -> None:
        step = (round(now.seconds, 1), now.makespan, round(now.peak_activation, 6))
        if not steps or steps[-1][1:] != step[1:]:
            steps.append(step)

    found = search(
        problem,
        seconds=options.seconds,
        threads=options.threads,
        seed=options.seed,
        progress=watch,
    )
    return {
        "largest": "{}x{}".format(*SIZES[-1]),
        "largest_subtasks": problem.subtasks,
        "largest_greedy_s": round(greedy_s, 3),
        "largest_greedy": found.greedy,
        "largest_makespan": found.timeline.makespan,
        "largest_lower_bound": lower_bound(problem),
        "largest_steps": steps,
    }


def _print(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line), flush=True)
    return line


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 2)


if __name__ == "__main__":
    sys.exit(main())
