"""A run in a few numbers: where each metric began and where it ended, and what its time went to.

PURE: from the records of `metrics.jsonl` to numbers and words.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from megatron_rlhfuse.observe.metrics import METRICS, STAGE_SECONDS

Records = Sequence[Mapping[str, Any]]

COMPARED = {
    "reward_mean": "Reward",
    "score_mean": "Score, before KL",
    "kl": "KL to the reference",
    "kl_sequence": "KL to the reference, per response",
    "policy_loss": "Policy loss",
    "value_loss": "Value loss",
    "explained_variance": "Explained variance of the value",
    "entropy": "Entropy",
    "clip_fraction": "Clipped tokens",
    "response_length_mean": "Response length, mean",
    "response_length_p99": "Response length, 99th percentile",
    "stop_fraction": "Responses that ended by themselves",
    "logprob_difference_mean": "Rollout and training log-probability, mean difference",
    "padded_fraction": "Training, share of tokens that is padding",
    "replica_imbalance": "Training, dearest replica over the mean",
    "micro_batches": "Training, micro-batches of a step",
    "makespan_s": "Fused step, mean",
    "makespan_over_planned": "Fused step, measured over planned",
    "bubble_fraction": "Fused step, idle share",
    "tokens_per_s": "Throughput",
    "samples_per_s": "Throughput, samples",
}
"""The metrics compared between the first and the last iterations, with their labels."""


class Change(NamedTuple):
    """A metric's mean over the first and over the last iterations."""

    name: str
    label: str
    unit: str
    start: float
    end: float


class StageTime(NamedTuple):
    """Median seconds of a stage, and its share of the median iteration (NaN if unknown)."""

    label: str
    seconds: float
    share: float


def window(records: Records) -> int:
    """How many iterations the means at both ends are over: a fifth of the run, at most 10."""
    return max(1, min(10, len(records) // 5))


def changes(records: Records) -> list[Change]:
    """Start and end of every metric of COMPARED that was measured at both."""
    count = window(records)
    found = []
    for name, label in COMPARED.items():
        start, end = _finite(records[:count], name), _finite(records[-count:], name)
        if start and end:
            unit = METRICS[name].unit
            found.append(Change(name, label, unit, statistics.fmean(start), statistics.fmean(end)))
    return found


def stage_times(records: Records) -> list[StageTime]:
    """Medians of the stages and of the whole iteration, over the iterations that have them."""
    whole = _finite(records, "iteration_s")
    iteration = statistics.median(whole) if whole else math.nan
    fields = {**STAGE_SECONDS, "iteration_s": "whole iteration"}
    times = []
    for name, label in fields.items():
        if measured := _finite(records, name):
            seconds = statistics.median(measured)
            share = seconds / iteration if iteration else math.nan
            times.append(StageTime(label, seconds, share))
    return times


def not_finite(records: Records) -> dict[str, list[int]]:
    """Metrics that were NaN or infinite (null in the file), and in which iterations."""
    found: dict[str, list[int]] = {}
    for record in records:
        for name, value in record.items():
            if value is None:
                found.setdefault(name, []).append(record["iteration"])
    return found


def _finite(records: Records, name: str) -> list[float]:
    return [record[name] for record in records if record.get(name) is not None]


def text(records: Records) -> str:
    """The same numbers for a terminal: the first metrics of COMPARED that there are, and times."""
    lines = [f"{len(records)} iterations; means over the first and the last {window(records)}"]
    for change in changes(records):
        lines.append(f"  {change.label:54} {change.start:10.4g} -> {change.end:.4g} {change.unit}")
    lines.append("median seconds")
    for time in stage_times(records):
        share = "" if math.isnan(time.share) else f"  {time.share:4.0%}"
        lines.append(f"  {time.label:54} {time.seconds:10.3f}{share}")
    return "\n".join(lines)
