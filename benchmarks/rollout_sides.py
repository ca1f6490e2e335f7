"""What rollout.py compares: two ways to make rollouts, by turns, on ranks that do not train.

A comparison gets a Trainer and returns what is printed; sides of one turn make the same samples,
but where prompts are left out. Rollouts before the first that counts warm up caches and rates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from rollout_runs import Rollout, Rollouts, medians, mismatched, rank_correlation, speedup

from megatron_rlhfuse.migration.lengths import LengthHistory
from megatron_rlhfuse.migration.simulate import simulate_rollout
from megatron_rlhfuse.rollout.prompt_rounds import DrawnPrompt, PromptBatch

WARM_UPS = 2


def compare_fusion(trainer: Any) -> dict[str, Any]:
    """Generation, then inference; and both at once, with the tail migrated."""
    rollouts = Rollouts(trainer)
    batch = trainer.next_prompts(1)
    rows: list[dict[str, float]] = []
    for turn in range(-WARM_UPS, trainer.args.train_iters):
        made = {}
        for fuses in (False, True) if turn % 2 == 0 else (True, False):
            trainer.args.fuses_rollout = fuses
            if fuses:
                rates = _rates(trainer, batch)
            made[fuses] = rollouts.run(batch)
            if fuses:
                decision = trainer._decision
        serial, fused = made[False], made[True]
        row = {
            "serial_s": serial.seconds,
            "fused_s": fused.seconds,
            "migrated": fused.observed["migrated"],
            "recomputed_tokens": fused.observed["recomputed"],
            "mismatched_tokens": mismatched(serial.tokens, fused.tokens),
        }
        if decision is not None:
            row["threshold"] = decision.threshold
            if rates is not None:
                row |= _predict_fusion(trainer, batch, rates, decision, fused)
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    result = medians(rows, "serial_s", "fused_s", "predicted_serial_s", "predicted_fused_s")
    result |= speedup(rows, "serial_s", "fused_s")
    if result["predicted_fused_s"] is not None:
        predicted = result["predicted_serial_s"] / result["predicted_fused_s"]
        result["predicted_speedup"] = round(predicted, 4)
        result["speedup_over_predicted"] = round(result["speedup"] / predicted, 4)
    migrated = sum(row["migrated"] for row in rows)
    recomputed = sum(row["recomputed_tokens"] for row in rows)
    result["migrated"] = migrated / len(rows)
    result["recomputed_tokens_per_sample"] = round(recomputed / migrated, 3) if migrated else None
    result["mismatched_tokens"] = sum(row["mismatched_tokens"] for row in rows)
    return result | medians(rows, "threshold")


def compare_dispatch(trainer: Any) -> dict[str, Any]:
    """Prompts to instances by turns; those first that had the longest responses so far; and those
    that will have them, as if responses always were as long as before.

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
        decisions = [trainer._decision]
        trainer.args.rollout_dispatch = "longest-first"
        lengths = [float(plain.lengths[each]) for each in range(len(batch))]
        trainer.lengths.load_state_dict(
            {
                "prompts": [each.prompt.index for each in batch.drawn],
                "means": lengths,
                "regression": [1.0, 1.0],
            }
        )
        foreseen = rollouts.run(batch)
        decisions.append(trainer._decision)
        trainer.lengths.load_state_dict(known)  # of earlier turns only
        remembered = rollouts.run(batch)
        row = {
            "round_robin_s": plain.seconds,
            "longest_first_s": remembered.seconds,
            "foreseen_s": foreseen.seconds,
            "rank_correlation": rank_correlation(expected, lengths),
            "mismatched_tokens": mismatched(plain.tokens, remembered.tokens)
            + mismatched(plain.tokens, foreseen.tokens),
        }
        if rates is not None and None not in decisions:
            case, made = _case(trainer, batch, rates, plain)
            sides = (("round_robin", "round-robin"), ("foreseen", "longest-first"))
            for (name, dispatch), decision in zip(sides, decisions, strict=True):
                row[f"predicted_{name}_s"] = simulate_rollout(
                    case,
                    made,
                    decision.threshold,
                    trainer.args.fuses_rollout,
                    dispatch,  # type: ignore[arg-type]
                    distribution=trainer.generation._controller.history.distribution(),
                ).stage_s
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    names = ("round_robin_s", "longest_first_s", "foreseen_s")
    result = medians(rows, *names, "predicted_round_robin_s", "predicted_foreseen_s")
    result |= medians(rows, "rank_correlation") | speedup(rows, "round_robin_s", "longest_first_s")
    result["foreseen_speedup"] = speedup(rows, "round_robin_s", "foreseen_s")["speedup"]
    return result | {"mismatched_tokens": sum(row["mismatched_tokens"] for row in rows)}


def compare_rebalance(trainer: Any) -> dict[str, Any]:
    """One migration in a rollout; and as many as pay."""
    rollouts = Rollouts(trainer)
    batch = trainer.next_prompts(1)
    rows: list[dict[str, float]] = []
    for turn in range(-WARM_UPS, trainer.args.train_iters):
        row: dict[str, float] = {}
        tokens = []
        sides = (("once", False), ("rebalanced", True))
        for name, rebalance in sides if turn % 2 == 0 else reversed(sides):
            controller = trainer.generation._controller
            if controller is not None:
                controller._options = replace(controller._options, rebalance=rebalance)
            made = rollouts.run(batch)
            tokens.append(made.tokens)
            row[f"{name}_s"] = made.seconds
            row[f"{name}_migrated"] = made.observed["migrated"]
            if trainer._decision is not None:
                row[f"{name}_migrations"] = len(trainer._decision.migrations)
        row["mismatched_tokens"] = mismatched(*tokens)
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    counts = [f"{name}_{what}" for name in ("once", "rebalanced") for what in _MOVED]
    return (
        medians(rows, "once_s", "rebalanced_s", *counts)
        | speedup(rows, "once_s", "rebalanced_s")
        | {"mismatched_tokens": sum(row["mismatched_tokens"] for row in rows)}
    )


_MOVED = ("migrated", "migrations")


def compare_extra_prompts(trainer: Any) -> dict[str, Any]:
    """All prompts of an iteration are trained; and the longest are deferred to one of their own.

    A turn is as many iterations as it takes until the deferred ones are trained. The other side
    makes the very same samples, in the order in which their prompts were drawn.
    """
    rollouts = Rollouts(trainer)
    trained, drawn = trainer.rounds._trained, trainer.sampler.batch_size
    if drawn == trained or trained % (drawn - trained):
        raise SystemExit("--extra must be one over a whole number, and above 0")
    iterations = trained // (drawn - trained) + 1
    rows: list[dict[str, float]] = []
    controller = trainer.generation._controller
    # Each side chooses its thresholds by the lengths that it has seen itself.
    histories = [LengthHistory(trainer.args.rollout_max_new_tokens) for _ in range(2)]
    for turn in range(-1, trainer.args.train_iters):
        draws: list[DrawnPrompt] = []
        row = {"tail_batched_s": 0.0, "plain_s": 0.0, "discarded_tokens": 0.0}
        tail_batched: dict[Any, Any] = {}
        if controller is not None:
            controller.history = histories[0]
        for _ in range(iterations):
            batch = trainer.next_prompts(rollouts.iteration + 1)
            draws += batch.drawn if batch.leaves_out else ()
            made = rollouts.run(batch)
            row["tail_batched_s"] += made.seconds
            row["discarded_tokens"] += made.discarded
            tail_batched |= _by_draw(batch, made)
        assert trainer.rounds.deferred == 0
        if controller is not None:
            controller.history = histories[1]
        plain: dict[Any, Any] = {}
        for start in range(0, len(draws), trained):
            batch = PromptBatch(tuple(draws[start : start + trained]), batch.copies, trained)
            made = rollouts.run(batch)
            row["plain_s"] += made.seconds
            plain |= _by_draw(batch, made)
        row["mismatched_tokens"] = mismatched(plain, tail_batched)
        row["samples"] = len(plain)
        row["longest_tokens"] = max(map(len, plain.values()))
        row["discarded_share"] = row["discarded_tokens"] / sum(map(len, plain.values()))
        rollouts.tell(turn, **row)
        if turn >= 0:
            rows.append(row)
    return (
        medians(rows, "plain_s", "tail_batched_s", "samples", "longest_tokens", "discarded_share")
        | speedup(rows, "plain_s", "tail_batched_s")
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
    trainer: Any, batch: PromptBatch, rates: Any, decision: Any, fused: Rollout
) -> dict[str, float]:
    case, lengths = _case(trainer, batch, rates, fused)
    known = trainer.generation._controller.history.distribution()
    together = simulate_rollout(case, lengths, decision.threshold, distribution=known)
    serial = simulate_rollout(case, lengths, None, fused=False)
    return {"predicted_serial_s": serial.stage_s, "predicted_fused_s": together.stage_s}
