"""How an iteration's generation and inference went, on this rank and over all ranks."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.inference.instance import Scoring
from megatron_rlhfuse.observe.metrics import Value
from megatron_rlhfuse.rollout.controller import Decision


class RolloutTimes:
    """Of one rank. Instants are time.time(): samples bring their own from other ranks."""

    def __init__(self) -> None:
        self.began = self.released = time.time()
        """Generation's start; its end on this rank."""
        self.ended = self.first_scored = self.idle_s = 0.0
        self.stages: dict[str, float] = {}
        """Seconds until the last engine was done, and from then on."""
        self.deferred_prompts: int | None = None
        """None where no prompts are left out of training."""
        self.discarded_tokens = 0

    def finish(self, scoring: Scoring, generation_end: float) -> None:
        """At the end of inference. generation_end: time.time() of the last engine's last sample,
        or of when it gave up what was left out."""
        self.ended = time.time()
        generation = min(max(0.0, generation_end - self.began), self.ended - self.began)
        self.stages = {
            "generation": generation,
            "inference": self.ended - self.began - generation,
        }
        self.first_scored = scoring.began
        self.idle_s = max(0.0, self.ended - self.released - scoring.seconds)

    def settle(self, deferred: int, lengths: Mapping[int, int], kept: Collection[int]) -> None:
        """Takes down which samples are not trained, though they were scored.

        deferred: prompts; lengths: response tokens by sample id; kept: samples that are trained
        """
        self.deferred_prompts = deferred
        self.discarded_tokens = sum(n for each, n in lengths.items() if each not in kept)


def reduce_rollout(
    times: RolloutTimes, engine: Mapping[str, float], decision: Decision | None
) -> dict[str, Value]:
    """The metrics of an iteration's rollout, over all ranks. COLLECTIVE.

    engine: what was observed of this rank's engine, zeros without
    """
    memory = max(platform.peak_resident_bytes(), engine["peak_bytes"])
    # Smallest by way of the largest; a rank that has scored nothing says nothing.
    first = -times.first_scored if times.first_scored else -float("inf")
    largest, first = _reduce([memory, first], dist.ReduceOp.MAX)
    names = ("restarts", "migrated", "kv_bytes", "extract_s", "recomputed", "discarded")
    *sums, idle = _reduce([*(engine[name] for name in names), times.idle_s], dist.ReduceOp.SUM)
    total = dict(zip(names, sums, strict=True))
    values: dict[str, Value] = {
        "engine_restarts": int(total["restarts"]),
        "peak_rss_mb": largest / 2**20,
        "rollout_s": times.ended - times.began,
        "rollout_idle_s": idle / dist.get_world_size(),
        "inference_start_s": -first - times.began,
    }
    if times.deferred_prompts is not None:
        values |= {
            "deferred_prompts": times.deferred_prompts,
            "discarded_tokens": int(total["discarded"]) + times.discarded_tokens,
        }
    if decision is not None:
        values |= {
            "migration_threshold": decision.threshold,
            "migrated_samples": int(total["migrated"]),
            "migration_start_s": decision.migrated_at_s,
            "migration_s": total["extract_s"],
            "migrated_kv_mb": total["kv_bytes"] / 2**20,
            "recomputed_tokens": int(total["recomputed"]),
            "predicted_rollout_s": decision.predicted_s,
            "predicted_serial_rollout_s": decision.predicted_serial_s,
        }
    return values


def _reduce(values: Sequence[float], operation: dist.ReduceOp.RedOpType) -> list[float]:
    tensor = torch.tensor(values, dtype=torch.float64, device=platform.device())
    dist.all_reduce(tensor, operation)
    return [float(value) for value in tensor]
