"""One iteration of a trace: who worked when. PURE: from trace events to rows of bars.

A row is a track of a rank (its main thread, an engine, ...). On a track of samples, which
overlap, the row holds how many of them run at any time instead of the samples.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from megatron_rlhfuse.observe.trace import MAIN_TRACK

ROUNDING_US = 1e-3
"""Timestamps are whole nanoseconds, in floating-point microseconds."""

Event = dict[str, Any]


class Bar(NamedTuple):
    """A span, clipped to the iteration; seconds since the iteration began. A leaf holds no other
    span.
    """

    name: str
    category: str
    start: float
    end: float
    leaf: bool


class Row(NamedTuple):
    """A track of a rank: its bars, or for samples the (time, running from then on) steps."""

    rank: int
    label: str
    bars: list[Bar]
    running: list[tuple[float, int]]

    def busy_seconds(self) -> float:
        """Seconds covered by leaves that are not of category "wait"; they do not overlap."""
        return sum(b.end - b.start for b in self.bars if b.leaf and b.category != "wait")


class Timeline(NamedTuple):
    iteration: int
    seconds: float
    rows: list[Row]


def last_iteration(events: Sequence[Event]) -> Timeline | None:
    """The timeline of the last iteration that most ranks finished, from the events of a
    `trace.json`; None if no span has category "iteration", or none other lies within it.

    "Most ranks": a killed run may have written an iteration of one rank and not of the others.
    Of these, one that saved a checkpoint comes behind those that did not: its stages would be
    thin lines beside the saving.
    """
    spans = [event for event in events if event["ph"] == "X"]
    marks: dict[int, dict[int, tuple[float, float]]] = defaultdict(dict)
    for span in spans:
        if span["cat"] == "iteration":  # the events are in order: a resumed run's attempt wins
            marks[span["args"]["iteration"]][span["pid"]] = (span["ts"], _end(span))
    if not marks:
        return None
    saving = [(span["ts"], _end(span)) for span in spans if span["cat"] == "checkpoint"]

    def rank_of(number: int) -> tuple[int, bool, float]:
        ranks = marks[number].values()
        saved = any(s < end and e > start for start, end in ranks for s, e in saving)
        return len(ranks), not saved, max(end for _, end in ranks)

    iteration = max(marks, key=rank_of)
    start = min(start for start, _ in marks[iteration].values())
    end = max(end for _, end in marks[iteration].values())
    inside = [
        span
        for span in spans
        if span["cat"] != "iteration" and span["ts"] < end and _end(span) > start
    ]
    rows = _rows(inside, _tracks(events), start, end)
    return Timeline(iteration, (end - start) / 1e6, rows) if rows else None


def _tracks(events: Sequence[Event]) -> dict[tuple[int, int], tuple[int, str]]:
    """(pid, tid) -> (rank, track), in the order of the trace; the lanes of a track of samples
    are one.
    """
    of_samples = {(e["pid"], e["tid"]) for e in events if e["ph"] == "X" and e["cat"] == "sample"}
    tracks = {}
    for event in events:
        if event["ph"] == "M" and event["name"] == "thread_name":
            thread, name = (event["pid"], event["tid"]), event["args"]["name"]
            track = re.sub(r" #\d+$", "", name) if thread in of_samples else name
            tracks[thread] = (event["pid"], track)
    return tracks


def _rows(
    spans: Sequence[Event],
    tracks: dict[tuple[int, int], tuple[int, str]],
    start: float,
    end: float,
) -> list[Row]:
    by_track: dict[tuple[int, str], list[Event]] = {track: [] for track in tracks.values()}
    for span in spans:
        by_track[tracks[span["pid"], span["tid"]]].append(span)
    names = Counter(track for (_, track), found in by_track.items() if found)
    rows = []
    for (rank, track), found in by_track.items():
        if not found:
            continue
        label = f"rank {rank}, {track}" if names[track] > 1 else track
        bars = [] if found[0]["cat"] == "sample" else _bars(found, start, end)
        running = [] if bars else _running(found, start, end)
        rows.append(Row(rank, f"rank {rank}" if track == MAIN_TRACK else label, bars, running))
    return rows


def _bars(spans: Sequence[Event], start: float, end: float) -> list[Bar]:
    """The bars of spans of one thread, which are in order and nest."""
    bars = []
    for position, span in enumerate(spans):
        following = spans[position + 1] if position + 1 < len(spans) else None
        bars.append(
            Bar(
                name=span["name"],
                category=span["cat"],
                start=(max(span["ts"], start) - start) / 1e6,
                end=(min(_end(span), end) - start) / 1e6,
                leaf=following is None or following["ts"] >= _end(span) - ROUNDING_US,
            )
        )
    return bars


def _running(spans: Sequence[Event], start: float, end: float) -> list[tuple[float, int]]:
    """How many of `spans` run from each time on."""
    steps: Counter[float] = Counter()
    for span in spans:
        steps[(max(span["ts"], start) - start) / 1e6] += 1
        steps[(min(_end(span), end) - start) / 1e6] -= 1
    times = sorted(steps)
    return list(zip(times, accumulate(steps[time] for time in times), strict=True))


def _end(span: Event) -> float:
    return span["ts"] + span["dur"]
