"""Messages of strangers: whatever the bytes are, reading them raises one error, or gives a value
that the job can have."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.migration.state import Migration, Move
from megatron_rlhfuse.rollout.board_values import (
    Board,
    Report,
    decode_board,
    decode_report,
    encode_board,
    encode_report,
)
from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample, Sample
from megatron_rlhfuse.rollout.wire import DropLog, Limits, MalformedMessageError

LIMITS = Limits(
    samples=16,
    prompt_tokens=4,
    response_tokens=6,
    vocabulary=1000,
    instances=3,
    has_reference=True,
    has_values=False,
)

SAMPLE = Sample(3, (1, 2), (4, 999), (-0.5, -0.25), "stop", 7, 1, 1.0, 2.0)
PARTIAL = PartialSample(
    GenerationRequest(3, (1, 2), 7), (5, 6), (-0.5, -1.0), b"\0\xff", 3, ("/proc/1/fd/5",), 2, 1.5
)
SCORED = ScoredSample(SAMPLE, torch.tensor([-1.0, -2.0]), torch.ones(2), None, 0.1)
REPORT = Report(1, "0", ((3, 2, 1), (4, 4, 6)), 1000, 2, 0.01, 1.5, 30, 0.1)
BOARD = Board((2,), (Migration((1,), (Move(3, 0, 1, "kv"), Move(5, 0, 1, "tokens")), 2.5, 1.5),))

Read = Callable[[bytes], Any]
KINDS: dict[str, tuple[bytes, Any, Read]] = {
    "sample": (SAMPLE.to_bytes(), SAMPLE, lambda data: Sample.from_bytes(data, LIMITS)),
    "partial": (PARTIAL.to_bytes(), PARTIAL, lambda data: PartialSample.from_bytes(data, LIMITS)),
    "scored": (SCORED.to_bytes(), None, lambda data: ScoredSample.from_bytes(data, LIMITS)),
    "report": (encode_report(REPORT).encode(), REPORT, lambda d: decode_report(d, 1, LIMITS)),
    "board": (
        encode_board(BOARD).encode(),
        BOARD,
        lambda data: decode_board(data.decode(errors="replace"), LIMITS),
    ),
}
kinds = st.sampled_from(sorted(KINDS))

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from([10**400, -1, 1e400, "/etc/passwd", "/proc/1/fd/5", "kv", "stop"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def check(kind: str, data: bytes) -> None:
    """Reading raises the one error, or gives a value within the limits."""
    try:
        value = KINDS[kind][2](data)
    except MalformedMessageError:
        return
    if isinstance(value, ScoredSample):
        assert value.values is None and value.reference_log_probs is not None
        assert math.isfinite(value.score) and bool(value.log_probs.isfinite().all())
        value = value.sample
    if isinstance(value, Sample | PartialSample):
        prompt = value.prompt if isinstance(value, Sample) else value.request.prompt
        assert value.sample_id in range(16) and len(prompt) <= 4 and len(value.response) <= 6
        assert all(token in range(1000) for token in (*prompt, *value.response))
        assert len(value.log_probs) == len(value.response)
        assert all(map(math.isfinite, value.log_probs))
    elif isinstance(value, Report):
        assert all(sample in range(16) for sample, _, _ in value.unfinished)
    else:
        assert set(value.left) <= {0, 1, 2}
        assert all(m.sample_id in range(16) and m.destination in range(3) for m in value.moves(0))


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_written_is_read(kind: str) -> None:
    data, expected, read = KINDS[kind]
    value = read(data)
    assert (value.sample if expected is None else value) == (expected or SAMPLE)


@settings(deadline=None)
@given(kinds, st.binary(max_size=200))
def test_random_bytes(kind: str, data: bytes) -> None:
    check(kind, data)


@settings(deadline=None, max_examples=400)
@given(kinds, st.randoms(use_true_random=False))
def test_mutated_bytes(kind: str, rng: random.Random) -> None:
    data = bytearray(KINDS[kind][0])
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[at] = rng.randrange(256)
            case 1:
                del data[at : at + rng.randint(1, 8)]
            case 2:
                data[at:at] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 8)))
            case _:
                data[at:at] = data[: rng.randint(1, len(data))]
        if not data:
            break
    check(kind, bytes(data))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every field and element of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path] if path else []
    for key, inner in items if isinstance(value, dict | list) else ():
        found += places(inner, (*path, key)) if isinstance(inner, dict | list) else [(*path, key)]
    return found


@settings(deadline=None, max_examples=400)
@given(kinds.filter(lambda kind: kind != "scored"), st.randoms(use_true_random=False), json_values)
def test_a_field_of_another_kind(kind: str, rng: random.Random, replacement: Any) -> None:
    values = json.loads(KINDS[kind][0])
    *path, last = rng.choice(places(values))
    inner = values
    for key in path:
        inner = inner[key]
    inner[last] = replacement
    check(kind, json.dumps(values).encode())


@pytest.mark.parametrize("kind", ["sample", "partial", "report", "board"])
@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"9" * 100_000,
        b"null",
        b"\xff\xfe{\x00}\x00",
        "{}".encode("utf-16"),
    ],
    ids=["lists", "objects", "digits", "null", "no UTF-8", "UTF-16"],
)
def test_json_that_is_no_message(kind: str, data: bytes) -> None:
    with pytest.raises(MalformedMessageError):
        KINDS[kind][2](data)


def changed(kind: str, **changes: Any) -> bytes:
    return json.dumps(json.loads(KINDS[kind][0]) | changes).encode()


@pytest.mark.parametrize(
    ("kind", "data", "message"),
    [
        ("sample", changed("sample", sample_id=16), "sample_id must be .* below 16, got 16"),
        ("sample", changed("sample", sample_id=True), "sample_id"),
        ("sample", changed("sample", sample_id=3.0), "sample_id"),
        ("sample", changed("sample", prompt=[1] * 5), "prompt must be a list of at most 4"),
        ("sample", changed("sample", response=[4, 1000]), "response: a token id is not below 1000"),
        ("sample", changed("sample", response=[4, -1]), "negative|unsigned"),
        ("sample", changed("sample", response=[4, 1.0]), "float"),
        ("sample", changed("sample", response="ab"), "response must be a list"),
        ("sample", changed("sample", log_probs=[-0.5, float("nan")]), "NaN is no number"),
        ("sample", changed("sample", log_probs=[-0.5, "1"]), "str"),
        ("sample", KINDS["sample"][0].replace(b"-0.5", b"-1e999"), "not all are finite"),
        ("sample", changed("sample", started=float("inf")), "Infinity is no number"),
        ("sample", changed("sample", instance=3), "instance must be .* below 3"),
        ("sample", changed("sample", stop_reason=["x"] * 999), "stop_reason is"),
        ("sample", KINDS["sample"][0] + b" " * (1 << 20), "at most .* are possible"),
        ("partial", changed("partial", generator="AAAA" * 30_000), "at most"),
        ("partial", changed("partial", generator=7), "generator must be base64"),
        ("partial", changed("partial", kv_files=["/proc/1/fd/5"] * 2000), "kv_files must be"),
        ("partial", changed("partial", kv_files=["/proc/self/fd/5"]), "paths of memory files"),
        ("report", changed("report", instance=2), "instance 2 tells nothing in this place"),
        ("report", changed("report", unfinished=[[1, 2]]), "three numbers"),
        ("report", changed("report", unfinished=[[1, 2, 3]] * 2), "or one twice"),
        ("report", changed("report", unfinished=[[16, 2, 3]]), "cannot be"),
        ("report", changed("report", step_seconds=-0.1), "step_seconds must not be negative"),
        ("report", changed("report", node="x" * 300), "node must be a string"),
        ("board", changed("board", left=[3]), "left must be .* below 3"),
        ("board", changed("board", left=[1, 1]), "left twice"),
        ("board", changed("board", migrations=[{}]), "a migration needs"),
    ],
)
def test_what_is_wrong_is_said(kind: str, data: bytes, message: str) -> None:
    with pytest.raises(MalformedMessageError, match=message):
        KINDS[kind][2](data)


def test_a_flood_has_few_lines(caplog: pytest.LogCaptureFixture) -> None:
    drops = DropLog()
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            drops.add("3/finished", f"fault {number} {'x' * 9999}")
        drops.add("3/scored", "another queue")
        for _ in range(50):
            drops.add("3/tail/report/1", "the same value again", b"value")
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0].startswith("dropped a message of 3/finished that no rank can have sent (1 so")
    assert "another queue" in lines[-2] and "3/tail/report/1" in lines[-1]
    assert 8 < len(lines) < 24 and max(map(len, lines)) < 500
