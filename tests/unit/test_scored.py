"""Scored samples on the wire: exact round trips, and no code from it."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load, save

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample

finite = st.floats(allow_nan=False, allow_infinity=False)
single = st.floats(allow_nan=False, width=32)


@st.composite
def scored_samples(draw: st.DrawFn) -> ScoredSample:
    length = draw(st.integers(0, 5))

    def per_token(elements: st.SearchStrategy[float]) -> list[float]:
        return draw(st.lists(elements, min_size=length, max_size=length))

    optional = st.booleans()
    return ScoredSample(
        sample=Sample(
            sample_id=draw(st.integers(0, 2**31)),
            prompt=tuple(draw(st.lists(st.integers(0, 2**20), min_size=1, max_size=4))),
            response=tuple(draw(st.integers(0, 2**20)) for _ in range(length)),
            log_probs=tuple(per_token(finite)),
            stop_reason=draw(st.sampled_from(["stop", "length"])),
            weight_version=draw(st.integers(0, 1000)),
            instance=draw(st.integers(0, 100)),
            started=draw(finite),
            finished=draw(finite),
        ),
        log_probs=torch.tensor(per_token(single)),
        reference_log_probs=torch.tensor(per_token(single)) if draw(optional) else None,
        values=torch.tensor(per_token(single)) if draw(optional) else None,
        score=draw(finite),
    )


def example() -> ScoredSample:
    sample = Sample(3, (1, 2), (4, 5), (-0.5, -0.25), "stop", 7, 1, 1.0, 2.0)
    return ScoredSample(sample, torch.tensor([-1.0, -2.0]), torch.ones(2), torch.zeros(2), 0.1)


@settings(deadline=None)
@given(scored_samples())
def test_bytes_hold_a_sample_exactly(scored: ScoredSample) -> None:
    read = ScoredSample.from_bytes(scored.to_bytes())
    for field in dataclasses.fields(ScoredSample):
        before, after = getattr(scored, field.name), getattr(read, field.name)
        if isinstance(before, torch.Tensor):
            assert after.dtype == torch.float32
            assert torch.equal(before, after), field.name
        else:
            assert before == after, field.name


def test_views_of_a_larger_tensor_travel_alone() -> None:
    wide = torch.arange(8.0)
    scored = dataclasses.replace(example(), log_probs=wide[2:4], values=wide[6:8])
    read = ScoredSample.from_bytes(scored.to_bytes())
    assert read.log_probs.tolist() == [2.0, 3.0]
    assert read.values is not None and read.values.tolist() == [6.0, 7.0]


@pytest.mark.parametrize("data", [b"", b"nonsense", b"\x00" * 64, b"\xff" * 64])
def test_bytes_of_anything_else_are_refused(data: bytes) -> None:
    with pytest.raises(SafetensorError):
        ScoredSample.from_bytes(data)


def test_a_cut_message_is_refused() -> None:
    whole = example().to_bytes()
    for end in (7, 40, len(whole) - 1):
        with pytest.raises(SafetensorError):
            ScoredSample.from_bytes(whole[:end])


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_is_refused_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "ran"
    attack = pickle.dumps(Trap(path))
    with pytest.raises(SafetensorError):
        ScoredSample.from_bytes(attack)
    tensors = load(example().to_bytes())
    tensors["sample"] = torch.frombuffer(bytearray(attack), dtype=torch.uint8)
    with pytest.raises(ValueError):
        ScoredSample.from_bytes(save(tensors))
    with pytest.raises(ValueError):
        Sample.from_bytes(attack)
    assert not path.exists()
    pickle.loads(attack)
    assert path.exists(), "the trap itself does not work"
