"""Where the time went: spans of every rank, thread and engine, as a Chrome trace.

A rank records spans in memory and appends them to its own part, `trace-rank<r>.jsonl`, at
`flush()`; `merge` makes one `trace.json` of all parts, which opens in Perfetto. Parts of a killed
run merge like any others.

Invariants of `trace.json`:
- JSON object format; one process per rank, one thread per track, all of them named;
- no negative duration, and spans of one thread nest: where spans of a track overlap otherwise,
  further lanes of the track ("engine 0 #2") hold them; a sample has its lane to itself;
- timestamps are microseconds since the earliest event, and events are sorted by them.

Times on one rank are measured with the monotonic clock, anchored to time.time() once, at the
tracer's start; spans of other processes come as time.time() seconds. Rows of different machines
are therefore as well aligned as their clocks are.
"""

from __future__ import annotations

import re
import threading
import time
from collections import defaultdict, deque
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rlhfuse.observe import jsonl

FILE_NAME = "trace.json"
MAIN_TRACK = "main"

CATEGORIES = {
    "iteration": "one whole PPO iteration; args hold its number, `iteration`",
    "generation": "sampling responses",
    "sample": "life of one sample in an engine, on a track of such spans only; they overlap",
    "inference": "scoring samples: log-probabilities, values, rewards",
    "training": "optimizer steps",
    "actor_training": "part of training that belongs to the actor",
    "critic_training": "part of training that belongs to the critic",
    "weight_sync": "moving weights from training to the engines",
    "checkpoint": "saving",
    "wait": "waiting for another rank or engine: idle time by name",
}
"""The categories with a colour of their own in the report; others are drawn grey."""

CLOCK_NS = 1000
"""Overlaps shorter than this are cut off: time.time() seconds as a float are exact to 0.24 us."""

_PART = re.compile(r"trace-rank(\d+)\.jsonl")


class Tracer:
    """Records the spans of one rank; does nothing, at almost no cost, when not enabled.

    Safe to use from several threads of the rank: every thread has its own track.
    """

    def __init__(self, directory: Path | str, rank: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self._path = Path(directory) / f"trace-rank{rank}.jsonl"
        self._events: deque[tuple[Any, ...]] = deque()
        self._clock_to_unix_ns = time.time_ns() - time.perf_counter_ns()
        if enabled:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            if self._path.exists():
                jsonl.repair(self._path)

    def span(self, name: str, category: str, **args: Any) -> _Span | _NoSpan:
        """`with tracer.span("generation", "generation", iteration=3): ...` times the block."""
        return _Span(self, name, category, args) if self.enabled else _NO_SPAN

    def add(
        self, name: str, start_s: float, end_s: float, track: str, category: str, **args: Any
    ) -> None:
        """A span measured elsewhere, in time.time() seconds, on a track such as "engine 0".

        The wall clock it was measured with can be set back in between: the span then gets no
        length, and says by how much in its args.
        """
        if not self.enabled:
            return
        if end_s < start_s:
            args["clock_set_back_s"] = start_s - end_s
            end_s = start_s
        self._events.append((name, category, track, _ns(start_s), _ns(end_s), args))

    def counter(self, name: str, time_s: float, value: float, track: str) -> None:
        """The value of a quantity from `time_s` (time.time() seconds) on."""
        if self.enabled:
            self._events.append((name, None, track, _ns(time_s), value))

    def flush(self) -> None:
        """Appends what was recorded so far to the rank's part.

        Raises TypeError for args that JSON cannot hold.
        """
        lines = []
        while self._events:
            lines.append(jsonl.encode(_record(self._events.popleft())))
        if lines:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(lines)


class _Span:
    """A slotted class, not a generator: half the cost."""

    __slots__ = ("_args", "_category", "_name", "_start", "_tracer")

    def __init__(self, tracer: Tracer, name: str, category: str, args: dict[str, Any]) -> None:
        self._tracer = tracer
        self._name = name
        self._category = category
        self._args = args

    def __enter__(self) -> None:
        self._start = time.perf_counter_ns()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        end = time.perf_counter_ns()
        if kind is not None:
            self._args["error"] = kind.__name__
        offset = self._tracer._clock_to_unix_ns
        self._tracer._events.append(
            (
                self._name,
                self._category,
                threading.current_thread().name,
                self._start + offset,
                end + offset,
                self._args,
            )
        )


class _NoSpan:
    __slots__ = ()

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...


_NO_SPAN = _NoSpan()


def merge(directory: Path | str, out: str = FILE_NAME) -> Path:
    """Makes `directory`/`out` of the parts of all ranks in `directory`; returns its path.

    Raises FileNotFoundError if there is no part, ValueError naming file and line for a bad one.
    """
    directory = Path(directory)
    records = {rank: jsonl.read(path) for rank, path in parts(directory).items()}
    if not records:
        raise FileNotFoundError(f"{directory}: no trace-rank<r>.jsonl to merge")
    origin = min((r["start_ns"] for part in records.values() for r in part), default=0)
    names, events = [], []
    for rank, part in records.items():
        rank_names, rank_events = _rank_events(rank, part, origin)
        names += rank_names
        events += rank_events
    # At equal times the longer span comes first: viewers take it for the parent.
    events.sort(key=lambda event: (event["ts"], -event.get("dur", 0.0)))
    path = directory / out
    trace = {
        "displayTimeUnit": "ms",
        "otherData": {"start_unix_s": origin / 1e9},
        "traceEvents": names + events,
    }
    jsonl.write_atomically(path, jsonl.encode(trace))
    return path


def discard(directory: Path, rank: int, world_size: int) -> None:
    """Removes what an earlier run left of this rank in the folder of a run that starts afresh.

    Rank 0 also removes the merged trace and the parts of ranks that no longer exist.
    """
    for part_rank, path in parts(directory).items():
        if part_rank == rank or (rank == 0 and part_rank >= world_size):
            path.unlink()
    if rank == 0:
        (directory / FILE_NAME).unlink(missing_ok=True)


def parts(directory: Path) -> dict[int, Path]:
    """The trace parts in `directory`, by rank."""
    found = {
        int(match[1]): path
        for path in directory.iterdir()
        if (match := _PART.fullmatch(path.name)) is not None
    }
    return dict(sorted(found.items()))


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)


def _record(event: tuple[Any, ...]) -> dict[str, Any]:
    name, category, track, start_ns = event[:4]
    if track == threading.main_thread().name:
        track = MAIN_TRACK
    record: dict[str, Any] = {"name": name, "track": track, "start_ns": start_ns}
    if category is None:
        return {**record, "value": event[4]}
    return {**record, "category": category, "end_ns": event[4], "args": event[5]}


def _rank_events(
    rank: int, records: list[dict[str, Any]], origin: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The naming events and the timed events of one rank."""
    spans: dict[str, list[dict[str, Any]]] = defaultdict(list)
    events = []
    for record in records:
        if "value" in record:
            # Chrome keeps counters per process, so the track goes into the name.
            label = f"{record['track']}: {record['name']}"
            time_us = (record["start_ns"] - origin) / 1e3
            args = {"value": record["value"]}
            events.append({"name": label, "ph": "C", "pid": rank, "ts": time_us, "args": args})
        else:
            spans[record["track"]].append(record)
    threads: list[str] = []
    for track in sorted(spans, key=_track_order):
        in_order = sorted(spans[track], key=lambda r: (r["start_ns"], -r["end_ns"]))
        nest = any(record["category"] != "sample" for record in in_order)
        lanes, ends = lay_out([(r["start_ns"], r["end_ns"]) for r in in_order], nest)
        for record, lane, end in zip(in_order, lanes, ends, strict=True):
            tid = len(threads) + lane
            events.append(_complete_event({**record, "end_ns": end}, rank, tid, origin))
        threads += [
            track if lane == 0 else f"{track} #{lane + 1}" for lane in range(max(lanes) + 1)
        ]
    return _names(rank, threads), events


def lay_out(spans: list[tuple[int, int]], nest: bool = True) -> tuple[list[int], list[int]]:
    """Lane and end of every (start, end) in ns, sorted by start and then longest first.

    A span takes the first lane where it begins after, or (if `nest`) lies within, what is there.
    Where two overlap by less than CLOCK_NS, the end of one is cut to make that so.
    """
    lanes: list[int] = []
    ends = [end for _, end in spans]
    open_spans: list[list[int]] = []  # per lane: the spans that have not ended, outermost first
    for position, (start, end) in enumerate(spans):
        lane = 0
        for stack in open_spans:
            while stack and (ends[stack[-1]] <= start or _touch(start, end, ends[stack[-1]])):
                ends[stack[-1]] = min(ends[stack[-1]], start)
                stack.pop()
            if not stack or (nest and end < ends[stack[-1]] + CLOCK_NS):
                break
            lane += 1
        if lane == len(open_spans):
            open_spans.append([])
        stack = open_spans[lane]
        if stack:
            ends[position] = min(end, ends[stack[-1]])
        stack.append(position)
        lanes.append(lane)
    return lanes, ends


def _touch(start: int, end: int, earlier_end: int) -> bool:
    """Whether a span follows an earlier one that ends, by the clock's error, after its start."""
    return end > earlier_end and earlier_end - start < CLOCK_NS


def _complete_event(record: dict[str, Any], rank: int, tid: int, origin: int) -> dict[str, Any]:
    return {
        "name": record["name"],
        "cat": record["category"],
        "ph": "X",
        "pid": rank,
        "tid": tid,
        "ts": (record["start_ns"] - origin) / 1e3,
        "dur": (record["end_ns"] - record["start_ns"]) / 1e3,
        "args": record["args"],
    }


def _names(rank: int, threads: list[str]) -> list[dict[str, Any]]:
    """The events that name and order the process of `rank` and its threads."""

    def name(kind: str, tid: int, args: dict[str, Any]) -> dict[str, Any]:
        return {"name": kind, "ph": "M", "pid": rank, "tid": tid, "args": args}

    named = [
        name("process_name", 0, {"name": f"rank {rank}"}),
        name("process_sort_index", 0, {"sort_index": rank}),
    ]
    for tid, thread in enumerate(threads):
        named.append(name("thread_name", tid, {"name": thread}))
        named.append(name("thread_sort_index", tid, {"sort_index": tid}))
    return named


def _track_order(track: str) -> tuple[Any, ...]:
    """The main track first, then by name with numbers in their own order."""
    pieces = re.split(r"(\d+)", track)
    return (track != MAIN_TRACK, [int(p) if p.isdigit() else p for p in pieces])
