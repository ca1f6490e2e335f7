"""What a simulated rollout looks like: bars per instance, and the numbers to compare."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rlhfuse.migration.case import RolloutCase
from megatron_rlhfuse.migration.generation import Generation, Migrated
from megatron_rlhfuse.migration.scoring import Scoring
from megatron_rlhfuse.migration.state import Migration

Spans = tuple[tuple[float, float], ...]
"""(start, end), ascending, none of them empty."""


@dataclass(frozen=True)
class InstanceTimeline:
    """One instance; all times in seconds since generation began.

    Attributes:
        generation: prefill and decoding
        migration: sending samples away, or waiting for those that come
        inference: scoring
        batches: (time, samples that decode from then on)
        generation_end_s: when it had no samples any more
        idle_s: of the stage, in which it does none of these
    """

    instance: int
    generation: Spans
    migration: Spans
    inference: Spans
    batches: tuple[tuple[float, int], ...]
    generation_end_s: float
    inference_busy_s: float
    idle_s: float


@dataclass(frozen=True)
class RolloutTimeline:
    """A whole stage: generation and inference.

    Attributes:
        finished_s, scored_s: end of generation and of scoring, by sample
        scored_by: instance, by sample
        migrated_s: when samples moved; None where none did
        stage_s: until the last sample is scored
    """

    instances: tuple[InstanceTimeline, ...]
    finished_s: tuple[float, ...]
    scored_s: tuple[float, ...]
    scored_by: tuple[int, ...]
    migration: Migration | None
    migrated_s: float | None
    stage_s: float

    @property
    def generation_s(self) -> float:
        return max(self.finished_s)

    @property
    def moved(self) -> int:
        return len(self.migration.moves) if self.migration is not None else 0

    def to_json(self) -> dict[str, Any]:
        """Bars and totals, without the single samples."""
        return {
            "stage_s": self.stage_s,
            "generation_s": self.generation_s,
            "migrated_s": self.migrated_s,
            "moved": self.moved,
            "destinations": list(self.migration.destinations) if self.migration else [],
            "instances": [vars(each) for each in self.instances],
        }


def build_timeline(
    case: RolloutCase, generation: Generation, scoring: Scoring, migrated: Migrated | None
) -> RolloutTimeline:
    """The timeline of a rollout, with what `migrated` changes in it."""
    busy: list[list[float]] = [[] for _ in range(case.instances)]
    for instance, start in zip(scoring.instance, scoring.start, strict=True):
        busy[instance].append(start)
    instances = tuple(
        _instance(case, each, generation, sorted(busy[each]), scoring.end, migrated)
        for each in range(case.instances)
    )
    return RolloutTimeline(
        instances=instances,
        finished_s=tuple((migrated or generation).finished),
        scored_s=tuple(start + case.rates.inference_s for start in scoring.start),
        scored_by=tuple(scoring.instance),
        migration=migrated.migration if migrated is not None else None,
        migrated_s=migrated.time if migrated is not None else None,
        stage_s=scoring.end,
    )


def _instance(
    case: RolloutCase,
    instance: int,
    generation: Generation,
    scored: list[float],
    stage_s: float,
    migrated: Migrated | None,
) -> InstanceTimeline:
    first = generation.decodings[instance]
    spans, pauses = [(0.0, first.end)], []
    batches = list(zip(first.times, first.batches, strict=True))
    if migrated is not None and (pause := _pause(instance, migrated)) is not None:
        stop = migrated.time
        spans = [(0.0, min(first.end, stop))]
        batches = [point for point in batches if point[0] < stop] + [(stop, 0)]
        pauses = [(stop, stop + pause)]
        later = migrated.decodings.get(instance)
        if later is not None:
            pauses = [(later.times[0] - pause, later.times[0])]
            spans.append((later.times[0], later.end))
            batches += zip(later.times, later.batches, strict=True)
    inference_s = case.rates.inference_s
    released = (migrated or generation).released[instance]
    drawn = [_joined(each) for each in (spans, pauses)]
    inference = _joined([(start, start + inference_s) for start in scored])
    used = sum(end - start for each in (*drawn, inference) for start, end in each)
    return InstanceTimeline(
        instance=instance,
        generation=drawn[0],
        migration=drawn[1],
        inference=inference,
        batches=tuple(batches),
        generation_end_s=released,
        inference_busy_s=sum(end - start for start, end in inference),
        idle_s=max(0.0, stage_s - used),
    )


def _pause(instance: int, migrated: Migrated) -> float | None:
    """Seconds for which the migration holds the instance up; None where it has no part in it."""
    if instance in migrated.decodings:
        return migrated.arrive[instance]
    if any(move.source == instance for move in migrated.migration.moves):
        return migrated.leave[instance]
    return None


def _joined(spans: list[tuple[float, float]]) -> Spans:
    """Without empty ones, those that touch as one."""
    joined: list[tuple[float, float]] = []
    for start, end in spans:
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)
