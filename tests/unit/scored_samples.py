"""Rollout batches of random numbers, for the tests of what training reads of them."""

from __future__ import annotations

import random

import torch
from hypothesis import strategies as st

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.training.experience import AdvantageOptions

OPTIONS = AdvantageOptions(
    estimator="gae",
    gamma=0.9,
    lam=0.8,
    whiten=False,
    normalize_std=True,
    kl_estimator="k1",
    kl_in_reward=True,
    reward_clip=None,
    missing_eos_penalty=0.0,
    samples_per_prompt=1,
)
lengths = st.lists(st.integers(1, 6), min_size=2, max_size=6)
seeds = st.integers(0, 2**31)


def scored_samples(response_lengths: list[int], seed: int) -> list[ScoredSample]:
    """A rollout batch with every field set, in the order of sample ids."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    result = []
    for sample_id, length in enumerate(response_lengths):
        numbers = torch.randn(4, length, generator=generator)
        result.append(
            ScoredSample(
                sample=Sample(
                    sample_id=sample_id,
                    prompt=tuple(draw.choices(range(50), k=draw.randint(1, 4))),
                    response=tuple(draw.choices(range(50), k=length)),
                    log_probs=tuple(numbers[0].tolist()),
                    stop_reason=draw.choice(["stop", "length"]),
                    weight_version=0,
                    instance=0,
                    started=0.0,
                    finished=1.0,
                ),
                log_probs=numbers[1],
                reference_log_probs=numbers[2],
                values=numbers[3],
                score=draw.uniform(-3, 3),
            )
        )
    return result
