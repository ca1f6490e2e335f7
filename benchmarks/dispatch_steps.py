"""Seconds of forward and backward over a mini-batch, by how it is dealt out; for dispatch.py.

A GPT of random weights in Megatron's local layers, on this process alone, through what the trainer
runs: batches are laid out, the policy's log-probabilities read, the loss's gradient taken.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from dispatch_logprob import one_rank_group
from fused_models import VOCABULARY, gpt_model, seed

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import PACKED, PADDED, Layout, Runs
from megatron_rlhfuse.dispatch.micro_batches import Limit, deal, deal_in_order
from megatron_rlhfuse.pipeline.groups import Layout as Ranks
from megatron_rlhfuse.pipeline.groups import build_process_groups
from megatron_rlhfuse.training.batches import RaggedTokens
from megatron_rlhfuse.training.heads import PolicyHead
from megatron_rlhfuse.training.steps import forward

BATCH, ROWS, LONGEST = 64, 4, 160
LAYERS, HEADS = 4, 8
COST = SequenceCost(1.0, 1 / 8192)
SIDES: dict[str, Layout] = {"in_order": PADDED, "dealt": PADDED, "packed": PACKED}


def steps(count: int) -> dict[str, Any]:
    """step_s, step_in_order_s, step_packed_s: medians, sides by turns; step_speedup and
    step_packed_speedup: of micro-batches of like length, and of packed ones, over those in order.
    """
    platform.prepare()
    compat.apply()
    platform.set_up_rank(0)
    one_rank_group()
    threads = torch.get_num_threads()
    torch.set_num_threads(
        1
    )  # as torchrun's ranks, and so that others' use of the machine counts less
    model, head = _model()
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for step in range(-1, count):  # the first one warms up
        lengths = draw_lengths(step + 1)
        tokens = RaggedTokens.of([[1]] * BATCH, [[2] * (each - 1) for each in lengths])
        tokens = tokens.to(platform.device())
        sides = list(SIDES.items())
        for side, layout in sides if step % 2 else reversed(sides):
            began = time.perf_counter()
            for run in _runs(side, lengths):
                batch = tokens.batch(torch.tensor(run), layout.packed)
                head.log_probs(forward(model, batch), batch).mean().backward()
            platform.synchronize()
            model.zero_grad()
            if step >= 0:
                seconds[side].append(time.perf_counter() - began)
        print(f"step {step + 1} of {count}", file=sys.stderr)
    torch.set_num_threads(threads)
    found = {side: statistics.median(each) for side, each in seconds.items()}
    return {
        "step_s": round(found["dealt"], 3),
        "step_in_order_s": round(found["in_order"], 3),
        "step_packed_s": round(found["packed"], 3),
        "step_speedup": round(found["in_order"] / found["dealt"], 3),
        "step_packed_speedup": round(found["in_order"] / found["packed"], 3),
    }


def draw_lengths(number: int) -> list[int]:
    """Of a mini-batch, as skewed as the toy model's: at least a prompt's and a response's token."""
    drawn = np.random.default_rng(number).lognormal(3.0, 1.0, BATCH)
    return [int(each) for each in np.clip(np.rint(drawn), 2, LONGEST)]


def _runs(side: str, lengths: Sequence[int]) -> Runs:
    if side == "in_order":
        return deal_in_order(len(lengths), 1, ROWS)[0]
    return deal(lengths, 1, Limit(rows=ROWS), COST, SIDES[side])[0]


def _model() -> tuple[torch.nn.Module, PolicyHead]:
    from megatron_rlhfuse.models.packed_attention import PackedAttention

    seed()
    groups = build_process_groups(Ranks.contiguous(1, 1, 1), "actor")
    assert groups is not None
    model = gpt_model(groups, LAYERS, HEADS, LONGEST, PackedAttention)
    return model.to(platform.device()), PolicyHead(VOCABULARY, 1.0, groups.pgc.tp)


if __name__ == "__main__":
    print(json.dumps(steps(5)))
