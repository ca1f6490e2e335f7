"""How fast samples are dealt out and laid out, how evenly, and how much padding that saves.

    python benchmarks/dispatch.py [--samples N] [--groups N] [--steps N]

The last line of standard output is JSON:
  partition_s, imbalance   --samples log-normal lengths into --groups: seconds, largest over mean
  partition_speedup        plain Python of the same algorithm over the compiled one, on a tenth
  padded_fraction, padded_fraction_in_order, computed_ratio
                           of batches with the toy model's lengths in micro-batches of four; the
                           tokens computed in order over those computed when dealt out
  step_...                 of dispatch_steps.py
  pack_..., unpack_..., copy_...
                           of dispatch_packing.py
  logprob_...              of dispatch_logprob.py
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from dispatch_logprob import logprob
from dispatch_packing import packing
from dispatch_reference import balance as plain_balance
from dispatch_steps import COST, ROWS, draw_lengths, steps

from megatron_rlhfuse.dispatch.balance import balance
from megatron_rlhfuse.dispatch.layout import Runs
from megatron_rlhfuse.dispatch.micro_batches import Limit, deal, deal_in_order, measure


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=100_000, help="to be partitioned")
    parser.add_argument("--groups", type=int, default=512, help="that they are partitioned into")
    parser.add_argument("--steps", type=int, default=5, help="training steps of each side; 0: none")
    options = parser.parse_args()
    result = partition(options.samples, options.groups) | padding() | packing() | logprob()
    if options.steps:
        result |= steps(options.steps)
    print(json.dumps(result))
    return 0


def partition(samples: int, groups: int) -> dict[str, Any]:
    costs = [COST(tokens) for tokens in _lengths(samples)]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        found = balance(costs, groups)
        seconds.append(time.perf_counter() - began)
    sums = [sum(costs[item] for item in group) for group in found]
    part, few = costs[: samples // 10], max(1, groups // 10)
    compiled, plain = (_seconds(each, part, few) for each in (balance, plain_balance))
    return {
        "partition_s": round(statistics.median(seconds), 4),
        "imbalance": round(max(sums) / statistics.fmean(sums), 7),
        "partition_speedup": round(plain / compiled, 1),
    }


def padding() -> dict[str, Any]:
    sides = [[], []]  # type: list[list[Any]]
    for seed in range(50):
        lengths = draw_lengths(seed)
        for side, dealt in zip(sides, _both(lengths), strict=True):
            side.append(measure(lengths, dealt, COST))
    computed, in_order = (sum(each.computed for each in side) for side in sides)
    tokens = sum(each.tokens for each in sides[0])
    return {
        "padded_fraction": round(1 - tokens / computed, 4),
        "padded_fraction_in_order": round(1 - tokens / in_order, 4),
        "computed_ratio": round(in_order / computed, 4),
    }


def _both(lengths: Sequence[int]) -> tuple[list[Runs], list[Runs]]:
    return deal(lengths, 1, Limit(rows=ROWS), COST), deal_in_order(len(lengths), 1, ROWS)


def _seconds(function: Any, costs: Sequence[float], groups: int) -> float:
    began = time.perf_counter()
    function(costs, groups)
    return time.perf_counter() - began


def _lengths(count: int) -> list[int]:
    drawn = np.random.default_rng(0).lognormal(6.0, 1.0, count)
    return [int(each) for each in np.clip(np.rint(drawn), 1, 8192)]


if __name__ == "__main__":
    sys.exit(main())
