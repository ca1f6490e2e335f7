"""Weights in sealed memory files, read back by the safetensors library."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from megatron_rlhfuse.rollout.weight_buckets import WeightBuckets

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

tensors = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=3), st.sampled_from(DTYPES)),
    min_size=1,
    max_size=8,
).map(
    lambda shapes: {
        f"layer.{number}.weight": torch.randn(shape).to(dtype)
        for number, (shape, dtype) in enumerate(shapes)
    }
)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@settings(deadline=None)
@given(tensors, st.integers(1, 400))
def test_buckets_hold_the_stream_exactly_within_their_size(
    weights: dict[str, torch.Tensor], bucket_bytes: int
) -> None:
    before = open_files()
    buckets = WeightBuckets(weights.items(), 1, bucket_bytes)
    try:
        read: dict[str, torch.Tensor] = {}
        for path in buckets.paths:
            part = load_file(path)
            assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= bucket_bytes
            assert not read.keys() & part.keys()
            read |= part
        assert read.keys() == weights.keys()
        for name, tensor in weights.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)
        assert buckets.bytes == sum(tensor.nbytes for tensor in weights.values())
        buckets.require_names(weights)
    finally:
        buckets.close()
        buckets.close()
    assert open_files() == before


def test_views_are_written_as_they_look() -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    buckets = WeightBuckets({"t": whole.t(), "row": whole[1]}.items(), 1)
    with safe_open(buckets.paths[0], framework="pt") as file:
        assert torch.equal(file.get_tensor("t"), whole.t())
        assert torch.equal(file.get_tensor("row"), whole[1])
    buckets.close()


def test_buckets_have_no_name_and_cannot_be_changed() -> None:
    shared = set(os.listdir("/dev/shm"))
    buckets = WeightBuckets({"a": torch.ones(4)}.items(), 1)
    assert set(os.listdir("/dev/shm")) <= shared
    with pytest.raises(PermissionError), open(buckets.paths[0], "r+b") as file:
        file.write(b"x")
    buckets.close()


def test_names_that_differ_are_told() -> None:
    buckets = WeightBuckets({"a": torch.ones(1), "b": torch.ones(1)}.items(), 9)
    with pytest.raises(ValueError, match=r"version 9 .*: missing c, d; unexpected b"):
        buckets.require_names(["a", "c", "d"])
    buckets.close()


def test_a_stream_that_breaks_off_leaves_nothing_open() -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(10)
        yield "b", torch.ones(10)
        raise ConnectionError("lost a rank")

    before = open_files()
    with pytest.raises(ConnectionError):
        WeightBuckets(broken(), 1, bucket_bytes=1)
    assert open_files() == before


def test_streams_that_are_no_weights_are_refused() -> None:
    with pytest.raises(ValueError, match="version 1 has no tensors"):
        WeightBuckets([], 1)
    with pytest.raises(ValueError, match="holds a twice"):
        WeightBuckets([("a", torch.ones(1)), ("a", torch.ones(1))], 1)
    with pytest.raises(ValueError, match=r"a is torch\.int64"):
        WeightBuckets([("a", torch.ones(1, dtype=torch.int64))], 1)
