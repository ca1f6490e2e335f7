"""Samples, their seeds and their bytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.rollout.samples import (
    GenerationRequest,
    Sample,
    SamplingOptions,
    sample_seed,
)

int64 = st.integers(-(2**63), 2**63 - 1)
token_ids = st.lists(st.integers(0, 200_000), max_size=20).map(tuple)


@st.composite
def samples(draw: st.DrawFn) -> Sample:
    response = draw(token_ids)
    finite = st.floats(max_value=0.0, allow_infinity=False, allow_nan=False)
    return Sample(
        sample_id=draw(st.integers(0, 1 << 30)),
        prompt=draw(token_ids),
        response=response,
        log_probs=tuple(draw(finite) for _ in response),
        stop_reason=draw(st.sampled_from(["stop", "length"])),
        weight_version=draw(st.integers(0, 1 << 30)),
        instance=draw(st.integers(0, 1 << 16)),
        started=draw(st.floats(0, 1e10)),
        finished=draw(st.floats(0, 1e10)),
    )


@given(samples())
def test_bytes_give_back_the_sample_exactly(sample: Sample) -> None:
    again = Sample.from_bytes(sample.to_bytes())
    assert again == sample
    assert isinstance(again.prompt, tuple)
    assert [x.hex() for x in again.log_probs] == [x.hex() for x in sample.log_probs]


@given(samples())
def test_bytes_are_json_and_their_fields_are_checked(sample: Sample) -> None:
    fields = json.loads(sample.to_bytes())
    del fields["instance"]
    with pytest.raises(ValueError, match="instance"):
        Sample.from_bytes(json.dumps(fields).encode())
    with pytest.raises(ValueError, match="needs the fields"):
        Sample.from_bytes(b"[]")


def test_what_is_no_sample_is_refused() -> None:
    sample = Sample(3, (1,), (5, 6), (-0.5, -1.0), "stop", 0, 0, 0.0, 0.0)
    with pytest.raises(ValueError, match="sample 3: 2 response tokens"):
        replace(sample, log_probs=(-0.5,))
    with pytest.raises(ValueError, match="stop_reason is 'abort'"):
        replace(sample, stop_reason="abort")
    with pytest.raises(ValueError, match="JSON"):
        replace(sample, log_probs=(-0.5, float("-inf"))).to_bytes()


def test_seeds_do_not_change_between_versions_of_this_project() -> None:
    # `b2sum -l 64` over the three 8-byte little-endian integers, read the same way and halved.
    assert sample_seed(1234, 7, 42) == 1331701687495201701


@given(int64, int64, int64)
def test_seeds_fit_a_generator_and_differ_between_neighbours(
    run_seed: int, iteration: int, sample_id: int
) -> None:
    seed = sample_seed(run_seed, iteration, sample_id)
    assert 0 <= seed < 2**63
    GenerationRequest(0, (1,), seed)
    others = {
        sample_seed(run_seed ^ 1, iteration, sample_id),
        sample_seed(run_seed, iteration ^ 1, sample_id),
        sample_seed(run_seed, iteration, sample_id ^ 1),
        sample_seed(iteration, run_seed, sample_id) if run_seed != iteration else -1,
    }
    assert seed not in others


def test_seeds_of_a_run_are_all_different_also_in_their_low_half() -> None:
    # torch's CPU generator looks at 32 bits of a seed.
    seeds = [sample_seed(0, i, s) & 0xFFFFFFFF for i in range(20) for s in range(64)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.5}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"min_new_tokens": -1}, "min_new_tokens"),
        ({"max_new_tokens": 4, "min_new_tokens": 5}, "min_new_tokens"),
    ],
)
def test_sampling_options_out_of_range_are_named(changes: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named} is "):
        SamplingOptions(**changes)  # type: ignore[arg-type]


def test_requests_are_checked() -> None:
    with pytest.raises(ValueError, match="prompt"):
        GenerationRequest(0, (), 1)
    with pytest.raises(ValueError, match="seed"):
        GenerationRequest(0, (1,), 2**63)
