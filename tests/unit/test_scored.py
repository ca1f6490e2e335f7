"""Scored samples on the wire: exact round trips, and no code from it."""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.rollout.wire import Limits, MalformedMessageError

finite = st.floats(allow_nan=False, allow_infinity=False)
single = st.floats(allow_nan=False, allow_infinity=False, width=32)


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
    with pytest.raises(MalformedMessageError):
        ScoredSample.from_bytes(data)


def test_a_cut_message_is_refused() -> None:
    whole = example().to_bytes()
    for end in (7, 40, len(whole) - 1):
        with pytest.raises(MalformedMessageError):
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
    with pytest.raises(MalformedMessageError):
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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["log_probs", "reference_log_probs", "values", "score"])
def test_scores_that_are_no_numbers_are_neither_sent_nor_read(name: str, value: float) -> None:
    bad = value if name == "score" else torch.tensor([0.5, value])
    with pytest.raises(ValueError, match=f"sample 3: {name} holds NaN or infinity"):
        dataclasses.replace(example(), **{name: bad}).to_bytes()
    tensors = load(example().to_bytes())
    tensors[name] = torch.tensor([value], dtype=torch.float64) if name == "score" else bad
    with pytest.raises(MalformedMessageError, match="not finite"):
        ScoredSample.from_bytes(save(tensors))


def test_large_numbers_are_numbers() -> None:
    scored = dataclasses.replace(example(), values=torch.full((2,), 3e38))
    assert torch.equal(ScoredSample.from_bytes(scored.to_bytes()).values, scored.values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_probs": torch.zeros(3)}, r"log_probs is torch.float32 \[3\], not .* \[2\]"),
        ({"log_probs": torch.zeros(2, 1)}, r"\[2, 1\]"),
        ({"values": torch.zeros(2, dtype=torch.float64)}, "values is torch.float64"),
        ({"score": torch.zeros(2, dtype=torch.float64)}, "score is"),
        ({"score": torch.zeros(1)}, "score is torch.float32"),
        ({"sample": torch.zeros(1, 9, dtype=torch.uint8)}, "sample is"),
        ({"other": torch.zeros(2)}, "'other'"),
        ({"sample": None}, "a scored sample holds"),
        ({"score": None}, "a scored sample holds"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    tensors = load(example().to_bytes()) | changes
    data = save({name: tensor for name, tensor in tensors.items() if tensor is not None})
    with pytest.raises(MalformedMessageError, match=message):
        ScoredSample.from_bytes(data)


def test_what_the_algorithm_needs_is_there_and_no_more() -> None:
    whole, bare = example(), dataclasses.replace(example(), reference_log_probs=None, values=None)
    for scored, has in ((whole, True), (bare, False)):
        ScoredSample.from_bytes(scored.to_bytes(), Limits(has_reference=has, has_values=has))
        for wrong in (Limits(has_reference=not has), Limits(has_values=not has)):
            with pytest.raises(MalformedMessageError, match="came, too" if has else "are missing"):
                ScoredSample.from_bytes(scored.to_bytes(), wrong)


def test_a_header_takes_no_memory_for_what_is_not_there() -> None:
    header = (
        b'{"log_probs":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4398046511104]}}'
    )
    for size in (len(header), 2**40, 2**63):
        with pytest.raises(MalformedMessageError):
            ScoredSample.from_bytes(size.to_bytes(8, "little") + header)
    empty = b'{"log_probs":{"dtype":"F32","shape":[0,4611686018427387904],"data_offsets":[0,0]}}'
    with pytest.raises(MalformedMessageError):
        ScoredSample.from_bytes(len(empty).to_bytes(8, "little") + empty)
