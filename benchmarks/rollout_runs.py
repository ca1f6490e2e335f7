"""Rollouts of rollout.py on ranks that do not train, and what is made of their numbers."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from megatron_rlhfuse.rollout.prompt_rounds import PromptBatch


@dataclass
class Rollout:
    """One of them, the same on every rank."""

    seconds: float
    lengths: dict[int, int]
    """Response tokens by sample, of those to train."""
    tokens: dict[int, tuple[int, ...]]
    observed: dict[str, float]
    """Over all ranks, of `GenerationStage.observe`."""
    discarded: float
    """Tokens of prompts that were left out."""


class Rollouts:
    """Makes rollouts, one after the other."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.iteration = 0

    def run(self, batch: PromptBatch) -> Rollout:
        """Generates and scores; both sides find caches empty."""
        trainer = self.trainer
        self.iteration += 1
        dist.barrier()
        began = time.perf_counter()
        trainer.generate(self.iteration, batch)
        scored = trainer.infer(self.iteration, batch)
        seconds = time.perf_counter() - began
        observed: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(observed, trainer.generation.observe())
        trainer.generation.wake()
        if trainer.generation._engine is not None:
            trainer.generation._engine.free_cache()
        dist.barrier()
        samples = [item.sample for item in scored]
        totals = {key: sum(each[key] for each in observed) for key in observed[0]}
        discarded = totals["discarded"]
        return Rollout(
            seconds,
            {sample.sample_id: len(sample.response) for sample in samples},
            {sample.sample_id: sample.response for sample in samples},
            totals,
            discarded + trainer._rollout.discarded_tokens,
        )

    def tell(self, turn: int, **values: float) -> None:
        if dist.get_rank() == 0:
            shown = {key: round(value, 3) for key, value in values.items()}
            which = f"turn {turn + 1} of {self.trainer.args.train_iters}"
            print(f"{which if turn >= 0 else 'warm-up'}: {shown}", file=sys.stderr)


def mismatched(one: dict[Any, Any], other: dict[Any, Any]) -> int:
    """Tokens that differ between the same samples of two sides."""
    assert one.keys() == other.keys()
    return sum(
        abs(len(one[key]) - len(other[key]))
        + sum(a != b for a, b in zip(one[key], other[key], strict=False))
        for key in one
    )


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where one side says nothing."""
    if len(set(one)) == 1 or len(set(other)) == 1:
        return 0.0
    return statistics.correlation(one, other, method="ranked")


def medians(rows: Sequence[dict[str, float]], *names: str) -> dict[str, Any]:
    """By name; None where no row has it."""
    result: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        result[name] = round(statistics.median(values), 4) if values else None
    return result


def speedup(rows: Sequence[dict[str, float]], before: str, after: str) -> dict[str, Any]:
    """Of medians; and the range of both sides."""
    result: dict[str, Any] = {
        "speedup": round(
            statistics.median(row[before] for row in rows)
            / statistics.median(row[after] for row in rows),
            4,
        ),
        "repeats": len(rows),
    }
    for name in (before, after):
        values = [row[name] for row in rows]
        result[name.removesuffix("_s") + "_spread_s"] = [
            round(min(values), 4),
            round(max(values), 4),
        ]
    return result
