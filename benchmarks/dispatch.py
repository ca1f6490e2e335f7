"""How fast samples are dealt out, how evenly, and how much padding that saves.

    python benchmarks/dispatch.py [--samples N] [--groups N] [--steps N]

The last line of standard output is JSON:
  partition_s, imbalance   --samples log-normal lengths into --groups: seconds, largest over mean
  partition_speedup        plain Python of the same algorithm over the compiled one, on a tenth
  padded_fraction, padded_fraction_in_order, computed_ratio
                           of batches with the toy model's lengths in micro-batches of four; the
                           tokens computed in order over those computed when dealt out
  step_speedup             forward and backward of a small random model over such micro-batches, in
                           order over dealt out; by turns, medians
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
from dispatch_reference import balance as plain_balance

from megatron_rlhfuse.dispatch.balance import balance
from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.micro_batches import Limit, Runs, deal, deal_in_order, measure

ROWS = 4
BATCH = 64
COST = SequenceCost(1.0, 1 / 8192)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=100_000, help="to be partitioned")
    parser.add_argument("--groups", type=int, default=512, help="that they are partitioned into")
    parser.add_argument("--steps", type=int, default=5, help="training steps of each side; 0: none")
    options = parser.parse_args()
    result = partition(options.samples, options.groups) | padding()
    if options.steps:
        result |= train(options.steps)
    print(json.dumps(result))
    return 0


def partition(samples: int, groups: int) -> dict[str, Any]:
    costs = [COST(tokens) for tokens in _lengths(samples, 6.0, 1.0, 8192)]
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
        lengths = _lengths(BATCH, 3.0, 1.0, 160, seed)
        for side, dealt in zip(sides, _both(lengths), strict=True):
            side.append(measure(lengths, dealt, COST))
    computed, in_order = (sum(each.computed for each in side) for side in sides)
    tokens = sum(each.tokens for each in sides[0])
    return {
        "padded_fraction": round(1 - tokens / computed, 4),
        "padded_fraction_in_order": round(1 - tokens / in_order, 4),
        "computed_ratio": round(in_order / computed, 4),
    }


def train(steps: int) -> dict[str, Any]:
    """Steps of a Llama without an optimizer: what differs is forward and backward."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
        )
    )
    seconds: tuple[list[float], list[float]] = ([], [])
    for step in range(-1, steps):
        lengths = _lengths(BATCH, 3.0, 1.0, 160, step + 1)
        sides = list(zip(_both(lengths), seconds, strict=True))
        for dealt, taken in sides if step % 2 else reversed(sides):
            began = time.perf_counter()
            for run in (run for runs in dealt for run in runs):
                tokens = torch.zeros(len(run), max(lengths[each] for each in run), dtype=torch.long)
                model(tokens).logits.mean().backward()
            model.zero_grad()
            if step >= 0:
                taken.append(time.perf_counter() - began)
        print(f"step {step + 1} of {steps}", file=sys.stderr)
    dealt_s, in_order_s = map(statistics.median, seconds)
    return {
        "step_s": round(dealt_s, 3),
        "step_in_order_s": round(in_order_s, 3),
        "step_speedup": round(in_order_s / dealt_s, 3),
    }


def _both(lengths: Sequence[int]) -> tuple[list[Runs], list[Runs]]:
    return deal(lengths, 1, Limit(rows=ROWS), COST), deal_in_order(len(lengths), 1, ROWS)


def _seconds(function: Any, costs: Sequence[float], groups: int) -> float:
    began = time.perf_counter()
    function(costs, groups)
    return time.perf_counter() - began


def _lengths(count: int, mu: float, sigma: float, longest: int, seed: int = 0) -> list[int]:
    drawn = np.random.default_rng(seed).lognormal(mu, sigma, count)
    return [int(each) for each in np.clip(np.rint(drawn), 1, longest)]


if __name__ == "__main__":
    sys.exit(main())
