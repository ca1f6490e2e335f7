"""Measures one decision of the migration planner, and the choice of a threshold, at full size.

    python benchmarks/migration_planner.py [--repeat N]

Standard output: a JSON line per size of the tail on 256 instances, with
  unfinished, moved, plan_ms (median), plan_ms_worst;
one with curve_s, the time `choose_threshold` takes for 256 instances and 8192 samples; and a
summary as the last line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

import numpy as np

from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.planner import MigrationOptions, plan_migration
from megatron_rlhfuse.migration.rates import Rates
from megatron_rlhfuse.migration.simulate import RolloutCase, choose_threshold
from megatron_rlhfuse.migration.state import InstanceState, RolloutState, Unfinished

INSTANCES = 256
SAMPLES = 8192
MAX_TOKENS = 2048
PROMPT_TOKENS = 256
TAILS = (512, 2048, 8192)

RATES = Rates(
    decode=((1, 0.02), (64, 0.021), (128, 0.022), (256, 0.03)),
    prefill_tokens_per_s=40_000.0,
    kv_bytes_per_token=800_000.0,
    kv_bytes_per_s=2e11,
    kv_bytes_per_s_between_nodes=4e10,
    transfer_latency_s=0.002,
    inference_s=1.5,
)
LENGTHS = LengthDistribution.log_normal(200, 0.75, MAX_TOKENS)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=20, help="decisions per size (default: 20)")
    options = parser.parse_args()
    plans = [_print(_plan(unfinished, options.repeat)) for unfinished in TAILS]
    curve = _print(_curve())
    slowest = max(line["plan_ms"] for line in plans)
    _print({"summary": True, "instances": INSTANCES, "plan_ms": slowest, **curve})
    return 0


def _plan(unfinished: int, repeat: int) -> dict[str, Any]:
    state = _tail(unfinished)
    options = MigrationOptions(threshold=1.0, max_tokens=MAX_TOKENS)
    took, moved = [], 0
    for _ in range(repeat):
        began = time.perf_counter()
        migration = plan_migration(state, options, RATES, LENGTHS)
        took.append(1000 * (time.perf_counter() - began))
        moved = len(migration.moves) if migration is not None else 0
    return {
        "unfinished": unfinished,
        "moved": moved,
        "plan_ms": round(statistics.median(took), 2),
        "plan_ms_worst": round(max(took), 2),
    }


def _tail(unfinished: int) -> RolloutState:
    """A state with samples spread at random over the instances."""
    homes = np.random.default_rng(0).integers(INSTANCES, size=unfinished).tolist()
    held: list[list[Unfinished]] = [[] for _ in range(INSTANCES)]
    for sample, home in enumerate(homes):
        held[home].append(Unfinished(sample, PROMPT_TOKENS, 300))
    instances = [
        InstanceState(number, f"node{number // 8}", tuple(samples), 400_000)
        for number, samples in enumerate(held)
    ]
    return RolloutState(tuple(instances), SAMPLES - unfinished)


def _curve() -> dict[str, Any]:
    case = RolloutCase(
        instances=INSTANCES,
        instances_per_node=8,
        samples=SAMPLES,
        prompt_tokens=PROMPT_TOKENS,
        lengths=LENGTHS,
        max_tokens=MAX_TOKENS,
        max_num_seqs=256,
        kv_capacity=400_000,
        rates=RATES,
    )
    began = time.perf_counter()
    choice = choose_threshold(case, LENGTHS, seed=0)
    seconds = time.perf_counter() - began
    best = min(stage for _, stage in choice.curve)
    return {
        "curve_s": round(seconds, 2),
        "threshold": choice.threshold,
        "speed_up": round(choice.serial_s / best, 3),
    }


def _print(line: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(line), flush=True)
    return line


if __name__ == "__main__":
    sys.exit(main())
