"""Samples that are on their way from one engine to another, and their bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample, Sample

token_ids = st.lists(st.integers(0, 200_000), max_size=20).map(tuple)
finite = st.floats(max_value=0.0, allow_infinity=False, allow_nan=False)

requests = st.builds(
    GenerationRequest,
    sample_id=st.integers(0, 1 << 30),
    prompt=token_ids.filter(bool),
    seed=st.integers(0, 2**63 - 1),
)


kv_files = st.lists(
    st.builds("/proc/{}/fd/{}".format, st.integers(1, 1 << 22), st.integers(0, 1 << 16)), max_size=3
).map(tuple)


@st.composite
def partial_samples(draw: st.DrawFn) -> PartialSample:
    request, response = draw(requests), draw(token_ids)
    return PartialSample(
        request=request,
        response=response,
        log_probs=tuple(draw(finite) for _ in response),
        generator=draw(st.none() | st.binary(max_size=50)),
        kv_tokens=draw(st.integers(0, len(request.prompt) + len(response) - 1)),
        kv_files=draw(kv_files),
        weight_version=draw(st.integers(0, 1 << 30)),
        started=draw(st.floats(0, 1e10)),
    )


BEGUN = PartialSample(
    request=GenerationRequest(3, (1, 2), 7),
    response=(5, 6),
    log_probs=(-0.5, -1.0),
    generator=b"\x00\xff",
    kv_tokens=3,
    kv_files=("/proc/1/fd/5",),
    weight_version=2,
    started=1.5,
)


def changed(**changes: Any) -> bytes:
    """BEGUN's bytes with other fields."""
    return json.dumps(json.loads(BEGUN.to_bytes()) | changes).encode()


@given(partial_samples())
def test_bytes_give_back_the_sample_exactly(sample: PartialSample) -> None:
    again = PartialSample.from_bytes(sample.to_bytes())
    assert again == sample
    assert again.sample_id == sample.request.sample_id
    assert [x.hex() for x in again.log_probs] == [x.hex() for x in sample.log_probs]
    hash(again)  # as it was: tuples all through


def test_a_field_too_few_or_too_many_is_refused() -> None:
    assert PartialSample.from_bytes(changed()) == BEGUN
    for name in json.loads(BEGUN.to_bytes()):
        fields = json.loads(BEGUN.to_bytes())
        del fields[name]
        with pytest.raises(ValueError, match=f"needs the fields .*'{name}'"):
            PartialSample.from_bytes(json.dumps(fields).encode())
    with pytest.raises(ValueError, match="needs the fields"):
        PartialSample.from_bytes(changed(finished=2.0))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff", "utf-8"),
        (b"", "Expecting value"),
        (BEGUN.to_bytes()[:-1], "delimiter"),
        (b"[]", "needs the fields"),
        (Sample(3, (1,), (5,), (-0.5,), "stop", 0, 0, 0.0, 0.0).to_bytes(), "needs the fields"),
        (changed(request=[3, [1, 2], 7]), "sample_id, prompt and seed"),
        (changed(request={"sample_id": 3, "prompt": [1, 2]}), "sample_id, prompt and seed"),
        (changed(request={"sample_id": 3, "prompt": [], "seed": 7}), "prompt is"),
        (changed(generator="no base64!"), "base64"),
        (changed(log_probs=[-0.5]), "sample 3: 2 response tokens"),
        (changed(kv_tokens=4), "kv_tokens is 4"),
        (changed(kv_files=[7]), "kv_files: want paths of memory files, got 7"),
        (changed(kv_files=["/etc/passwd"]), "want paths of memory files, got '/etc/passwd'"),
        (changed(kv_files=["/proc/1/fd/5/../../mem"]), "want paths of memory files"),
        (changed(kv_files=["/proc/1/fd/5\n"]), "want paths of memory files"),
        (changed(kv_files=["/proc/self/fd/5"]), "want paths of memory files"),
    ],
)
def test_bytes_that_are_no_partial_sample_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PartialSample.from_bytes(data)


def test_what_is_no_partial_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="sample 3: 2 response tokens need as many log_probs"):
        replace(BEGUN, log_probs=(-0.5,))
    # The last token so far is computed where the sample goes on.
    for tokens in (-1, 4):
        with pytest.raises(ValueError, match=f"kv_tokens is {tokens}; .* below 4"):
            replace(BEGUN, kv_tokens=tokens)
    with pytest.raises(ValueError, match="JSON"):
        replace(BEGUN, log_probs=(-0.5, float("nan"))).to_bytes()
