"""What rollout.py compares: two ways to make rollouts, by turns, on ranks that do not train.

A comparison gets a Trainer and returns what is printed; sides of one turn make the same samples,
but where prompts are left out. Rollouts before the first that counts warm up caches and rates.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist

from megatron_rlhfuse.migration.simulate import simulate_rollout
from megatron_rlhfuse.rollout.prompt_rounds import DrawnPrompt, PromptBatch

WARM_UPS = 2


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
            print(f"turn {turn + 1} of {self.trainer.args.train_iters}: {shown}", file=sys.stderr)


def compare_fusion(trainer: Any) -> dict[str, Any]:
    """Generation, then inference; and both at once, with the tail migrated."""
    rollouts = Rollouts(trainer)
    batch = trainer.next_prompts(1)
    rows: list[dict[str, float]] = []
    for turn in range(-WARM_UPS, trainer.args.train_iters):
        trainer.args.fuses_rollout = False
        serial = rollouts.run(batch)
        trainer.args.fuses_rollout = True
        rates = _rates(trainer, batch)
        fused = rollouts.run(batch)
        row = {
            "serial_s": serial.seconds,
            "fused_s": fused.seconds,
            "migrated": fused.observed["migrated"],
            "recomputed_tokens": fused.observed["recomputed"],
            "mismatched_tokens": _mismatched(serial.tokens, fused.tokens),
        }
        if trainer._decision is not None:
            row["threshold"] = trainer._decision.threshold
            if rates is not None:
                row |= _predict_fusion(trainer, batch, rates, fused)
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    result = _medians(rows, "serial_s", "fused_s", "predicted_serial_s", "predicted_fused_s")
    result |= _speedup(rows, "serial_s", "fused_s")
    if result["predicted_fused_s"] is not None:
        predicted = result["predicted_serial_s"] / result["predicted_fused_s"]
        result["predicted_speedup"] = round(predicted, 4)
        result["speedup_over_predicted"] = round(result["speedup"] / predicted, 4)
    migrated = sum(row["migrated"] for row in rows)
    recomputed = sum(row["recomputed_tokens"] for row in rows)
    result["migrated"] = migrated / len(rows)
    result["recomputed_tokens_per_sample"] = round(recomputed / migrated, 3) if migrated else None
    result["mismatched_tokens"] = sum(row["mismatched_tokens"] for row in rows)
    return result | _medians(rows, "threshold")


def compare_dispatch(trainer: Any) -> dict[str, Any]:
    """Prompts to instances by turns; and those first that had the longest responses so far.

    Every turn answers the same prompts with new random numbers, as epochs do.
    """
    rollouts = Rollouts(trainer)
    first = trainer.next_prompts(1)
    rows: list[dict[str, float]] = []
    for turn in range(-WARM_UPS, trainer.args.train_iters):
        batch = _redrawn(first, turn + WARM_UPS + 1)
        known = trainer.lengths.state_dict()
        expected = [trainer.lengths.expected(each.prompt.index) for each in batch.drawn]
        rates = _rates(trainer, batch)
        trainer.args.rollout_dispatch = "round-robin"
        plain = rollouts.run(batch)
        trainer.lengths.load_state_dict(known)  # of earlier turns only
        trainer.args.rollout_dispatch = "longest-first"
        sorted_ = rollouts.run(batch)
        row = {
            "round_robin_s": plain.seconds,
            "longest_first_s": sorted_.seconds,
            "rank_correlation": _rank_correlation(
                expected, [plain.lengths[each] for each in range(len(expected))]
            ),
            "mismatched_tokens": _mismatched(plain.tokens, sorted_.tokens),
        }
        if rates is not None:
            case, lengths = _case(trainer, batch, rates, plain)
            for name, dispatch, known_lengths in (
                ("predicted_round_robin_s", "round-robin", expected),
                ("predicted_longest_first_s", "longest-first", expected),
                ("predicted_with_known_lengths_s", "longest-first", None),
            ):
                row[name] = simulate_rollout(
                    case,
                    lengths,
                    0.0,
                    trainer.args.fuses_rollout,
                    dispatch,  # type: ignore[arg-type]
                    expected=known_lengths,
                ).stage_s
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    names = ("round_robin_s", "longest_first_s")
    predicted = (f"predicted_{name}" for name in (*names, "with_known_lengths_s"))
    return (
        _medians(rows, *names, *predicted, "rank_correlation")
        | _speedup(rows, *names)
        | {"mismatched_tokens": sum(row["mismatched_tokens"] for row in rows)}
    )


def compare_rebalance(trainer: Any) -> dict[str, Any]:
    """One migration in a rollout; and as many as pay."""
    rollouts = Rollouts(trainer)
    batch = trainer.next_prompts(1)
    rows: list[dict[str, float]] = []
    for turn in range(-WARM_UPS, trainer.args.train_iters):
        row: dict[str, float] = {}
        tokens = []
        for name, rebalance in (("once", False), ("rebalanced", True)):
            controller = trainer.generation._controller
            if controller is not None:
                controller._options = replace(controller._options, rebalance=rebalance)
            made = rollouts.run(batch)
            tokens.append(made.tokens)
            row[f"{name}_s"] = made.seconds
            row[f"{name}_migrated"] = made.observed["migrated"]
            if trainer._decision is not None:
                row[f"{name}_migrations"] = len(trainer._decision.migrations)
        row["mismatched_tokens"] = _mismatched(*tokens)
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    counts = [f"{name}_{what}" for name in ("once", "rebalanced") for what in _MOVED]
    return (
        _medians(rows, "once_s", "rebalanced_s", *counts)
        | _speedup(rows, "once_s", "rebalanced_s")
        | {"mismatched_tokens": sum(row["mismatched_tokens"] for row in rows)}
    )


_MOVED = ("migrated", "migrations")


def compare_extra_prompts(trainer: Any) -> dict[str, Any]:
    """All prompts of an iteration are trained; and the longest are deferred to one of their own.

    A turn is as many iterations as it takes until the deferred ones are trained. The other side
    makes the very same samples, in the order in which their prompts were drawn.
    """
    rollouts = Rollouts(trainer)
    trained, drawn = trainer.rounds._trained, trainer.sampler._batch_size
    if drawn == trained or trained % (drawn - trained):
        raise SystemExit("--extra must be one over a whole number, and above 0")
    iterations = trained // (drawn - trained) + 1
    rows: list[dict[str, float]] = []
    for turn in range(-1, trainer.args.train_iters):
        draws: list[DrawnPrompt] = []
        row = {"tail_batched_s": 0.0, "plain_s": 0.0, "discarded_tokens": 0.0}
        tail_batched: dict[Any, Any] = {}
        for _ in range(iterations):
            batch = trainer.next_prompts(rollouts.iteration + 1)
            draws += batch.drawn if batch.leaves_out else ()
            made = rollouts.run(batch)
            row["tail_batched_s"] += made.seconds
            row["discarded_tokens"] += made.discarded
            tail_batched |= _by_draw(batch, made)
        assert trainer.rounds.deferred == 0
        plain: dict[Any, Any] = {}
        for start in range(0, len(draws), trained):
            batch = PromptBatch(tuple(draws[start : start + trained]), batch.copies, trained)
            made = rollouts.run(batch)
            row["plain_s"] += made.seconds
            plain |= _by_draw(batch, made)
        row["mismatched_tokens"] = _mismatched(plain, tail_batched)
        row["samples"] = len(plain)
        row["longest_tokens"] = max(map(len, plain.values()))
        row["discarded_share"] = row["discarded_tokens"] / sum(map(len, plain.values()))
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    return (
        _medians(rows, "plain_s", "tail_batched_s", "samples", "longest_tokens", "discarded_share")
        | _speedup(rows, "plain_s", "tail_batched_s")
        | {"mismatched_tokens": sum(row["mismatched_tokens"] for row in rows)}
    )


COMPARISONS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "fusion": compare_fusion,
    "dispatch": compare_dispatch,
    "rebalance": compare_rebalance,
    "extra-prompts": compare_extra_prompts,
}


def _by_draw(batch: PromptBatch, made: Rollout) -> dict[tuple[int, int, int], tuple[int, ...]]:
    """Responses by the iteration and the position that their prompt was drawn at."""
    found = {}
    for sample, response in made.tokens.items():
        origin = batch.drawn[sample // batch.copies]
        found[origin.iteration, origin.position, sample % batch.copies] = response
    return found


def _redrawn(batch: PromptBatch, iteration: int) -> PromptBatch:
    drawn = tuple(replace(each, iteration=iteration) for each in batch.drawn)
    return replace(batch, drawn=drawn)


def _rates(trainer: Any, batch: PromptBatch) -> Any:
    """Those measured so far; on rank 0, where there is a controller."""
    controller = trainer.generation._controller
    if controller is None:
        return None
    prompt = sum(len(each.token_ids) for each in batch) / len(batch)
    return controller.meter.rates(prompt + controller.history.distribution().mean)


def _case(trainer: Any, batch: PromptBatch, rates: Any, made: Rollout) -> tuple[Any, Any]:
    """The rollout as the simulation takes it, with the lengths that came out."""
    lengths = tuple(tokens for _, tokens in sorted(made.lengths.items()))
    generation = trainer.generation
    return generation._controller.case(generation.rollout(batch), rates, lengths), lengths


def _predict_fusion(
    trainer: Any, batch: PromptBatch, rates: Any, fused: Rollout
) -> dict[str, float]:
    case, lengths = _case(trainer, batch, rates, fused)
    known = trainer.generation._controller.history.distribution()
    threshold = trainer._decision.threshold
    together = simulate_rollout(case, lengths, threshold, distribution=known)
    serial = simulate_rollout(case, lengths, None, fused=False)
    return {"predicted_serial_s": serial.stage_s, "predicted_fused_s": together.stage_s}


def _mismatched(one: dict[int, Any], other: dict[int, Any]) -> int:
    assert one.keys() == other.keys()
    return sum(
        abs(len(one[key]) - len(other[key]))
        + sum(a != b for a, b in zip(one[key], other[key], strict=False))
        for key in one
    )


def _rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where one side says nothing."""
    if len(set(one)) == 1 or len(set(other)) == 1:
        return 0.0
    return statistics.correlation(one, other, method="ranked")


def _medians(rows: Sequence[dict[str, float]], *names: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in names:
        values = [row[name] for row in rows if name in row]
        result[name] = round(statistics.median(values), 4) if values else None
    return result


def _speedup(rows: Sequence[dict[str, float]], before: str, after: str) -> dict[str, Any]:
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
