"""Traces: cheap to record, well-formed once merged, mergeable after a kill."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.observe.trace import CLOCK_NS, Tracer, lay_out, merge

Event = dict[str, Any]


def merged(directory: Path) -> list[Event]:
    return json.loads(merge(directory).read_text())["traceEvents"]


def spans_of(events: list[Event]) -> list[Event]:
    return [event for event in events if event["ph"] == "X"]


def thread_names(events: list[Event]) -> dict[tuple[int, int], str]:
    named = [event for event in events if event["name"] == "thread_name"]
    return {(event["pid"], event["tid"]): event["args"]["name"] for event in named}


def check_well_formed(events: list[Event]) -> None:
    """What a viewer relies on: naming first, sorted, nothing negative, spans of a thread nest."""
    timed = [event for event in events if event["ph"] != "M"]
    assert events[len(events) - len(timed) :] == timed
    times = [event["ts"] for event in timed]
    assert times == sorted(times)
    assert not times or times[0] == 0.0
    names = thread_names(events)
    threads = defaultdict(list)
    for span in spans_of(events):
        assert span["dur"] >= 0
        assert (span["pid"], span["tid"]) in names
        threads[span["pid"], span["tid"]].append(span)
    for spans in threads.values():
        ends: list[float] = []
        for span in spans:
            while ends and ends[-1] <= span["ts"] + 1e-3:  # a nanosecond of rounding
                ends.pop()
            end = span["ts"] + span["dur"]
            assert not ends or end <= ends[-1] + 1e-3, f"{span} overlaps its parent's end"
            ends.append(end)


def test_nested_spans_are_timed_and_nest(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)
    before = time.time()
    with tracer.span("iteration", "iteration", iteration=1):
        with tracer.span("generation", "generation"):
            time.sleep(0.02)
        with tracer.span("training", "training"), tracer.span("actor", "actor_training"):
            time.sleep(0.01)
    after = time.time()
    tracer.flush()
    trace = json.loads(merge(tmp_path).read_text())
    events = trace["traceEvents"]
    check_well_formed(events)
    spans = {span["name"]: span for span in spans_of(events)}
    assert spans["iteration"]["args"] == {"iteration": 1}
    assert 20e3 <= spans["generation"]["dur"] <= spans["iteration"]["dur"]
    assert 30e3 <= spans["iteration"]["dur"] <= (after - before + 1e-3) * 1e6
    assert spans["training"]["ts"] >= spans["generation"]["ts"] + spans["generation"]["dur"]
    assert {span["tid"] for span in spans.values()} == {0}
    assert before - 1e-3 <= trace["otherData"]["start_unix_s"] <= after


def test_span_that_fails_is_kept_with_its_error(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)
    with pytest.raises(KeyError), tracer.span("generation", "generation"):
        raise KeyError
    tracer.flush()
    assert spans_of(merged(tmp_path))[0]["args"] == {"error": "KeyError"}


def test_ranks_tracks_and_threads_are_named(tmp_path: Path) -> None:
    for rank in (10, 2):
        tracer = Tracer(tmp_path, rank)
        now = time.time()
        tracer.add("decode", now, now + 1, track="engine 10", category="generation", samples=4)
        tracer.add("decode", now, now + 1, track="engine 9", category="generation")
        with tracer.span("training", "training"):
            pass
        tracer.counter("unfinished", now, 7, "engine 9")
        tracer.flush()
    events = merged(tmp_path)
    check_well_formed(events)
    processes = [(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"]
    assert processes == [(2, "rank 2"), (10, "rank 10")]
    names = {tid: name for (pid, tid), name in thread_names(events).items() if pid == 2}
    assert names == {0: "main", 1: "engine 9", 2: "engine 10"}
    counters = [event for event in events if event["ph"] == "C"]
    assert [(c["name"], c["args"]) for c in counters] == [
        ("engine 9: unfinished", {"value": 7})
    ] * 2


def test_threads_have_tracks_of_their_own(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)

    def score() -> None:
        with tracer.span("score", "inference"):
            time.sleep(0.005)

    thread = threading.Thread(target=score, name="scorer")
    with tracer.span("generation", "generation"):
        thread.start()
    thread.join()
    tracer.flush()
    events = merged(tmp_path)
    check_well_formed(events)
    names = thread_names(events)
    tracks = {span["name"]: names[0, span["tid"]] for span in spans_of(events)}
    assert tracks == {"generation": "main", "score": "scorer"}


def test_samples_that_overlap_get_lanes(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)
    start = 1.7e9
    for sample, (begin, end) in enumerate([(0, 5), (0, 2), (1, 3), (4, 6)]):
        tracer.add(f"s{sample}", start + begin, start + end, "engine 0 samples", "sample")
    tracer.flush()
    events = merged(tmp_path)
    check_well_formed(events)
    names = thread_names(events)
    lanes = {span["name"]: names[0, span["tid"]] for span in spans_of(events)}
    assert lanes == {
        "s0": "engine 0 samples",
        "s1": "engine 0 samples #2",
        "s2": "engine 0 samples #3",
        "s3": "engine 0 samples #2",
    }


def test_clock_set_back_gives_no_negative_duration(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)
    tracer.add("decode", 100.0, 99.5, track="engine 0", category="generation")
    tracer.flush()
    (span,) = spans_of(merged(tmp_path))
    assert span["dur"] == 0
    assert span["args"] == {"clock_set_back_s": 0.5}


def test_killed_run_merges_and_goes_on(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, rank=0)
    for _ in range(2):
        with tracer.span("training", "training"):
            pass
    tracer.flush()
    part = tmp_path / "trace-rank0.jsonl"
    part.write_bytes(part.read_bytes()[:-9])
    assert len(spans_of(merged(tmp_path))) == 1
    tracer = Tracer(tmp_path, rank=0)  # the resumed run appends to the same part
    with tracer.span("training", "training"):
        pass
    tracer.flush()
    assert len(spans_of(merged(tmp_path))) == 2


def test_nothing_to_merge_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="trace-rank"):
        merge(tmp_path)


def test_tracer_that_is_off_writes_nothing(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path / "run", rank=0, enabled=False)
    with tracer.span("training", "training"):
        tracer.add("decode", 1, 2, track="engine 0", category="generation")
        tracer.counter("unfinished", 1, 2, "engine 0")
    tracer.flush()
    assert not (tmp_path / "run").exists()


INTERVALS = st.lists(
    st.tuples(st.integers(0, 40_000), st.integers(0, 20_000)).map(lambda x: (x[0], x[0] + x[1])),
    max_size=30,
)


@given(INTERVALS, st.booleans())
def test_lanes_nest_and_hardly_change_a_span(spans: list[tuple[int, int]], nest: bool) -> None:
    spans.sort(key=lambda span: (span[0], -span[1]))
    lanes, ends = lay_out(spans, nest)
    for position, (start, end) in enumerate(spans):
        assert start <= ends[position] <= end
        assert end - ends[position] < 2 * CLOCK_NS
        for later in range(position + 1, len(spans)):
            if lanes[later] == lanes[position]:
                disjoint = spans[later][0] >= ends[position]
                assert disjoint or (nest and ends[later] <= ends[position])


def test_spans_that_follow_each_other_up_to_the_clock_share_a_lane() -> None:
    outer, first, second = (0, 9000), (0, 4300), (4000, 9200)
    assert lay_out([outer, first, second]) == ([0, 0, 0], [9000, 4000, 9000])
