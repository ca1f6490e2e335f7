"""How fused plans fare where micro-batches differ in cost: simulated, every mode of dispatch.

    python benchmarks/dispatch_pipeline.py [--batches N]

Mini-batches of log-normal lengths are dealt out by every mode. A plan is made as a job makes it,
for micro-batches of the mean cost; then it is run with what each of them really costs. The last
line of standard output is JSON, by mode, medians over the mini-batches:
  step              time of a fused step over that of micro-batches in order, one model after the
                    other, 1F1B
  fused_speedup     back-to-back 1F1B over fused, of the same micro-batches, for 1F1B in the better
                    of both orders: cheapest first, or cheapest at both ends
  over_planned      a fused step over what its plan says
  micro_batches     of either model
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence

import numpy as np

from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import PACKED, PADDED, Layout
from megatron_rlhfuse.dispatch.micro_batches import (
    Limit,
    deal,
    deal_in_order,
    fused_order,
    pipeline_order,
)
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.evaluate import predecessor
from megatron_rlhfuse.schedule.order import Order, Subtask
from megatron_rlhfuse.schedule.problem import Model, Problem
from megatron_rlhfuse.schedule.search import search

STAGES = 8
BATCH = 64
ROWS = 4
TOKENS = 8192
LONGEST = 8192
COST = SequenceCost(1.0, 1 / 50_000)
"""In the ratio of a 7-billion-parameter Llama."""
CRITIC = 0.5
"""Its cost, of the actor's."""
ITERATIONS = 300
ORDERS = (pipeline_order, fused_order)

MODES: dict[str, tuple[Limit, Layout]] = {
    "in order": (Limit(rows=ROWS), PADDED),
    "rows, cheapest at both ends": (Limit(rows=ROWS), PADDED),
    "rows": (Limit(rows=ROWS), PADDED),
    "rows, packed": (Limit(rows=ROWS), PACKED),
    "tokens": (Limit(tokens=TOKENS), PADDED),
    "tokens, packed": (Limit(tokens=TOKENS), PACKED),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batches", type=int, default=9, help="mini-batches (default: 9)")
    print(json.dumps(pipelines(parser.parse_args().batches)))
    return 0


def pipelines(batches: int) -> dict[str, dict[str, float]]:
    """The figures above, by mode."""
    found: dict[str, list[tuple[float, ...]]] = {mode: [] for mode in MODES}
    for seed in range(batches):
        drawn = np.random.default_rng(seed).lognormal(6.0, 1.0, BATCH)
        lengths = [int(each) for each in np.clip(np.rint(drawn), 1, LONGEST)]
        base = 0.0
        for mode, (limit, layout) in MODES.items():
            runs = (
                deal_in_order(BATCH, 1, ROWS)
                if mode == "in order"
                else deal(lengths, 1, limit, COST, layout, beside_another="ends" not in mode)
            )[0]
            costs = [layout.cost(lengths, run, COST) for run in runs]
            serial, fused, planned = _times(costs)
            base = base or serial
            if mode != "in order":
                serial = min(_times(order(costs, costs))[0] for order in ORDERS)
            found[mode].append((fused / base, serial / fused, fused / planned, len(runs)))
        print(f"mini-batch {seed + 1} of {batches}", file=sys.stderr)
    names = ("step", "fused_speedup", "over_planned", "micro_batches")
    return {
        mode: {
            name: round(statistics.median(column), 3)
            for name, column in zip(names, zip(*rows, strict=True), strict=True)
        }
        for mode, rows in found.items()
    }


def _times(costs: Sequence[float]) -> tuple[float, float, float]:
    """Serial and fused makespan with these costs of micro-batches; that of the fused plan."""
    mean = statistics.fmean(costs)
    problem = Problem(
        STAGES,
        tuple(
            Model(
                name,
                len(costs),
                (mean * factor,) * STAGES,
                (2 * mean * factor,) * STAGES,
                (1.0,) * STAGES,
                (devices,),
            )
            for name, factor, devices in (
                ("actor", 1.0, tuple(range(STAGES))),
                ("critic", CRITIC, tuple(reversed(range(STAGES)))),
            )
        ),
    )
    plan = search(problem, iterations=ITERATIONS, threads=1).timeline
    weights = [cost / mean for cost in costs]
    return (
        _makespan(problem, one_f_one_b(problem), weights),
        _makespan(problem, plan.order, weights),
        plan.makespan,
    )


def _makespan(problem: Problem, order: Order, weights: Sequence[float]) -> float:
    """As `schedule.evaluate`, with micro-batch m taking weights[m] times as long."""
    ended: dict[Subtask, float] = {}
    free, done = [0.0] * len(order), [0] * len(order)
    while sum(done) < sum(map(len, order)):
        for device, row in enumerate(order):
            while done[device] < len(row):
                subtask = row[done[device]]
                before = predecessor(problem, subtask)
                if before is not None and before not in ended:
                    break
                ready = ended[before] if before is not None else 0.0
                duration = problem.models[subtask.model].duration(subtask.kind, subtask.stage)
                free[device] = max(free[device], ready) + duration * weights[subtask.micro_batch]
                ended[subtask] = free[device]
                done[device] += 1
    return max(free)


if __name__ == "__main__":
    sys.exit(main())
