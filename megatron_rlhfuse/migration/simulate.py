"""Simulates a rollout and the scoring of its samples: serial, fused, and with a migrated tail.

Invariants:
- every sample is finished exactly once and scored exactly once, not before it is finished;
- an instance scores nothing before it has no samples of its own (serial: before anybody has);
- with threshold 0 nothing moves, and the stage is no longer than the serial one;
- until the migration nothing differs from a rollout without one.

Simplified: an instance prefills all its prompts first; each sample takes `inference_s` to score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlhfuse.migration.case import RolloutCase, draw_lengths
from megatron_rlhfuse.migration.dispatch import Dispatch
from megatron_rlhfuse.migration.generation import (
    Generation,
    Migrated,
    generate,
    migrate,
    state_at,
)
from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.planner import MigrationPlanner
from megatron_rlhfuse.migration.scoring import Scoring, score
from megatron_rlhfuse.migration.timeline import RolloutTimeline, build_timeline

__all__ = [
    "RolloutCase",
    "RolloutTimeline",
    "ThresholdChoice",
    "choose_threshold",
    "simulate_rollout",
]

THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class ThresholdChoice:
    """Attributes:
    threshold: the best of the curve, the lowest where several are
    curve: (threshold, mean seconds of the stage)
    serial_s: mean seconds where inference waits for the end of generation
    """

    threshold: float
    curve: tuple[tuple[float, float], ...]
    serial_s: float


def simulate_rollout(
    case: RolloutCase,
    lengths: Sequence[int],
    threshold: float | None,
    fused: bool = True,
    dispatch: Dispatch = "round-robin",
    *,
    distribution: LengthDistribution | None = None,
) -> RolloutTimeline:
    """One rollout.

    Args:
        lengths: of the responses, by sample
        threshold: as in `MigrationOptions`; None and 0 migrate nothing
        fused: False starts inference on all instances once the last sample is finished
        dispatch: of prompts to instances; longest-first as if lengths were known beforehand
        distribution: what the planner knows of the lengths; None is the case's own
    """
    generation = generate(case, lengths, dispatch)
    if not fused:
        return build_timeline(case, generation, _score_at_end(case, generation), None)
    known = distribution or case.distribution()
    scoring, migrated = _fuse(case, generation, threshold or 0.0, known)
    return build_timeline(case, generation, scoring, migrated)


def choose_threshold(
    case: RolloutCase,
    distribution: LengthDistribution | None,
    seed: int,
    draws: int = 4,
    candidates: Sequence[float] = THRESHOLDS,
) -> ThresholdChoice:
    """The threshold with the shortest stage, in the mean over `draws` rollouts.

    Args: distribution: of the lengths; None takes the case's own (listed lengths: as they are).
    """
    known = distribution or case.distribution()
    if distribution is None and not isinstance(case.lengths, LengthDistribution):
        rollouts = [case.lengths]
    else:
        rollouts = draw_lengths(case, known, seed, draws)
    stages: dict[float, list[float]] = {threshold: [] for threshold in candidates}
    serial = []
    for lengths in rollouts:
        generation = generate(case, lengths, "round-robin")
        serial.append(_score_at_end(case, generation).end)
        for threshold, seconds in stages.items():
            scoring, _ = _fuse(case, generation, threshold, known)
            seconds.append(scoring.end)
    curve = tuple((threshold, float(np.mean(seconds))) for threshold, seconds in stages.items())
    best = min(curve, key=lambda point: (point[1], point[0]))
    return ThresholdChoice(best[0], curve, float(np.mean(serial)))


def _score_at_end(case: RolloutCase, generation: Generation) -> Scoring:
    end = max(generation.finished)
    return score(generation.finished, [end] * case.instances, case.rates.inference_s)


def _fuse(
    case: RolloutCase, generation: Generation, threshold: float, known: LengthDistribution
) -> tuple[Scoring, Migrated | None]:
    """The scoring, and what migrated; the planner is asked whenever it would decide."""
    scoring = score(generation.finished, generation.released, case.rates.inference_s)
    planner = MigrationPlanner(case.options(threshold), case.rates, known, case.samples)
    finishes = sorted(generation.finished)
    while planner.asks_at > 0:
        # Observations come with finished samples, the first no earlier than the first of them.
        time = finishes[max(0, case.samples - planner.asks_at - 1)]
        state = state_at(case, generation, scoring, time)
        if state.unfinished == 0:
            break
        migration = planner.observe(state)
        if migration is not None:
            migrated = migrate(case, generation, scoring, state, migration)
            return score(
                migrated.finished, migrated.released, case.rates.inference_s, (scoring, time)
            ), migrated
    return scoring, None
