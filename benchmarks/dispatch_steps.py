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
HIDDEN, LAYERS, HEADS, VOCABULARY = 256, 4, 8, 512
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


def draw_lengths(seed: int) -> list[int]:
    """Of a mini-batch, as skewed as the toy model's: at least a prompt's and a response's token."""
    drawn = np.random.default_rng(seed).lognormal(3.0, 1.0, BATCH)
    return [int(each) for each in np.clip(np.rint(drawn), 2, LONGEST)]


def _runs(side: str, lengths: Sequence[int]) -> Runs:
    if side == "in_order":
        return deal_in_order(len(lengths), 1, ROWS)[0]
    return deal(lengths, 1, Limit(rows=ROWS), COST, SIDES[side])[0]


def _model() -> tuple[torch.nn.Module, PolicyHead]:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    from megatron_rlhfuse.models.packed_attention import PackedAttention

    torch.manual_seed(0)
    parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    groups = build_process_groups(Ranks.contiguous(1, 1, 1), "actor")
    assert groups is not None
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not platform.has_cuda(),
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = PackedAttention
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=LONGEST,
        position_embedding_type="rope",
        pg_collection=groups.pgc,
    )
    return model.to(platform.device()), PolicyHead(VOCABULARY, 1.0, groups.pgc.tp)


if __name__ == "__main__":
    print(json.dumps(steps(5)))
