"""What a whole job has left in its run folder: metrics, weights, trace."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from megatron_rlhfuse.observe.metrics import METRICS

Event = dict[str, Any]


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[dict[str, Any]]:
    """The metrics of every iteration, without those of time and memory."""
    groups = ("time", "rollout", "fusion")
    measured = {name for name, metric in METRICS.items() if metric.group in groups}
    measured |= {"time", "fusion", "peak_rss_mb"}
    return [{k: v for k, v in record.items() if k not in measured} for record in metrics(run)]


def same_everywhere(run: Path) -> list[dict[str, Any]]:
    """What was learned, without how far an engine's log-probabilities are from training's.

    Those differ in the last bit with the samples that were decoded together.
    """
    return [
        {k: v for k, v in record.items() if not k.startswith("logprob_difference")}
        for record in learned(run)
    ]


def migrated(run: Path) -> list[dict[str, Any]]:
    """Metrics of the iterations in which samples migrated."""
    return [record for record in metrics(run) if record.get("migrated_samples")]


def assert_equal_weights(run: Path, expected: Path) -> None:
    """Every tensor of both models, bit for bit."""
    for model in ("actor", "critic"):
        found, wanted = (
            load_file(folder / "models" / model / "model.safetensors") for folder in (run, expected)
        )
        assert found.keys() == wanted.keys()
        assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


def events_of(run: Path) -> list[Event]:
    return json.loads((run / "trace.json").read_text())["traceEvents"]


def spans_of(run: Path, category: str) -> list[Event]:
    return [e for e in events_of(run) if e["ph"] == "X" and e["cat"] == category]


def during(run: Path, iteration: int) -> list[Event]:
    """The spans of all ranks that end in an iteration.

    It begins on each rank at its own time: a sample that came from another may be older.
    """
    found = tracks(run)
    spans: list[Event] = []
    for (rank, _), track in found.items():
        (whole,) = (e for e in found[rank, "main"] if e["name"] == f"iteration {iteration}")
        first, last = whole["ts"], end_of(whole)
        spans += [e for e in track if first < end_of(e) <= last and e is not whole]
    return spans


def tracks(run: Path) -> dict[tuple[int, str], list[Event]]:
    """Spans by rank and track, in order."""
    events = events_of(run)
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    found: dict[tuple[int, str], list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] == "X":
            found[event["pid"], names[event["pid"], event["tid"]]].append(event)
    return found


def end_of(span: Event) -> float:
    return span["ts"] + span["dur"]
