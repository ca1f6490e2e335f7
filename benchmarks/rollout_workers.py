"""The ranks' part of rollout.py: a job that generates and scores, and does not train."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from megatron_rlhfuse.arguments import parse_arguments

WARM_UPS = 2
"""Each way: caches of the processor, and rates that were measured."""


def main() -> None:
    target = Path(sys.argv.pop(1))
    args = parse_arguments()
    import torch.distributed as dist

    from megatron_rlhfuse.trainer import Trainer

    with Trainer(args) as trainer:
        prompts = trainer.next_prompts()
        rows = []
        for turn in range(-WARM_UPS, args.train_iters):
            lengths: dict[bool, Any] = {}
            row: dict[str, Any] = {}
            for fused in (False, True):
                seconds, samples, extra = _rollout(trainer, prompts, fused)
                lengths[fused] = {s.sample_id: s.response for s in samples}
                row["fused_s" if fused else "serial_s"] = seconds
                row |= extra
            row["mismatched_tokens"] = _mismatched(lengths[False], lengths[True])
            if dist.get_rank() == 0:
                numbers = {k: round(v, 3) for k, v in row.items() if isinstance(v, int | float)}
                print(f"rollout {turn + 1} of {args.train_iters}: {numbers}", file=sys.stderr)
            if turn >= 0:
                rows.append(row)
        if dist.get_rank() == 0:
            target.write_text(json.dumps(_summary(rows)))


def _rollout(trainer: Any, prompts: Any, fused: bool) -> tuple[float, Any, dict[str, Any]]:
    import torch.distributed as dist

    generation = trainer.generation
    trainer.args.fuses_rollout = fused
    controller = generation._controller
    rates = None
    if controller is not None and fused:
        mean = sum(len(p.token_ids) for p in prompts) / len(prompts)
        mean += controller.history.distribution().mean
        rates = controller.meter.rates(mean)
    dist.barrier()
    began = time.perf_counter()
    trainer.generate(1, prompts)
    scored = trainer.infer(1, prompts)
    seconds = time.perf_counter() - began
    samples = [item.sample for item in scored]
    extra: dict[str, Any] = {}
    observed = generation.observe()
    totals = [None, None]
    dist.all_gather_object(totals, observed)
    if fused:
        extra["migrated"] = sum(each["migrated"] for each in totals)
        extra["recomputed_tokens"] = sum(each["recomputed"] for each in totals)
        if trainer._decision is not None:
            extra["threshold"] = trainer._decision.threshold
        if rates is not None:
            extra |= _predict(controller, generation.rollout(prompts), rates, samples, extra)
    trainer.args.fuses_rollout = True
    generation.wake()
    if generation._engine is not None:
        generation._engine.free_cache()  # the other way finds no prompts in the cache either
    dist.barrier()
    if dist.get_rank() == 0:
        trainer.queue.delete(1)
        trainer.queue.board(1).delete(trainer.args.rollout_instances)
    dist.barrier()
    return seconds, samples, extra


def _predict(
    controller: Any, rollout: Any, rates: Any, samples: Any, extra: dict[str, Any]
) -> dict[str, float]:
    """Simulated with the lengths that came out and the rates known before."""
    from megatron_rlhfuse.migration.simulate import simulate_rollout

    lengths = tuple(len(sample.response) for sample in sorted(samples, key=lambda s: s.sample_id))
    case = controller.case(rollout, rates, lengths)
    known = controller.history.distribution()
    fused = simulate_rollout(case, lengths, extra["threshold"], distribution=known)
    serial = simulate_rollout(case, lengths, None, fused=False)
    return {"predicted_serial_s": serial.stage_s, "predicted_fused_s": fused.stage_s}


def _mismatched(one: dict[int, Any], other: dict[int, Any]) -> int:
    assert one.keys() == other.keys()
    return sum(
        abs(len(one[key]) - len(other[key]))
        + sum(a != b for a, b in zip(one[key], other[key], strict=False))
        for key in one
    )


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    def median(name: str) -> float:
        values = [row[name] for row in rows if name in row]
        return round(statistics.median(values), 4) if values else float("nan")

    result: dict[str, Any] = {name: median(name) for name in ("serial_s", "fused_s")}
    result["speedup"] = round(result["serial_s"] / result["fused_s"], 4)
    for name in ("predicted_serial_s", "predicted_fused_s"):
        result[name] = median(name)
    predicted = result["predicted_serial_s"] / result["predicted_fused_s"]
    result["predicted_speedup"] = round(predicted, 4)
    result["speedup_over_predicted"] = round(result["speedup"] / predicted, 4)
    migrated = sum(row["migrated"] for row in rows)
    result["migrated"] = migrated / len(rows)
    recomputed = sum(row["recomputed_tokens"] for row in rows)
    result["recomputed_tokens_per_sample"] = round(recomputed / migrated, 3) if migrated else None
    result["mismatched_tokens"] = sum(row["mismatched_tokens"] for row in rows)
    result["threshold"] = median("threshold")
    result["repeats"] = len(rows)
    for name in ("serial_s", "fused_s"):
        values = [row[name] for row in rows]
        result[f"{name.removesuffix('_s')}_spread_s"] = [
            round(min(values), 4),
            round(max(values), 4),
        ]
    return result


if __name__ == "__main__":
    main()
