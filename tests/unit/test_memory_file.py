"""Tensors in sealed memory files, read back by the safetensors library."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from megatron_rlhfuse.rollout.memory_file import (
    open_memory_file,
    path_of,
    write_bytes,
    write_tensors,
)

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.uint8,
]

named_tensors = st.lists(
    st.tuples(st.lists(st.integers(0, 5), max_size=4), st.sampled_from(DTYPES)), max_size=8
).map(
    lambda shapes: [
        (f"layer.{number}", torch.randint(0, 100, shape).to(dtype))
        for number, (shape, dtype) in enumerate(shapes)
    ]
)

Keep = Callable[[int], str]


@pytest.fixture
def keep() -> Iterator[Keep]:
    """Takes the descriptor of a memory file, which is closed at the end; returns its path."""
    kept: list[int] = []

    def path(descriptor: int) -> str:
        kept.append(descriptor)
        return path_of(descriptor)

    yield path
    for descriptor in kept:
        os.close(descriptor)


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equality that also float8 has."""
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


@settings(deadline=None)
@given(named_tensors)
def test_safetensors_reads_what_was_written(tensors: list[tuple[str, torch.Tensor]]) -> None:
    descriptor = write_tensors(tensors, "test")
    try:
        with safe_open(path_of(descriptor), framework="pt") as file:
            assert set(file.keys()) == {name for name, _ in tensors}
            for name, tensor in tensors:
                read = file.get_tensor(name)
                assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
                assert same_bytes(read, tensor)
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bit_pattern_survives(keep: Keep, dtype: torch.dtype) -> None:
    patterns = torch.randint(0, 256, (64, 16), dtype=torch.uint8).view(dtype)  # NaNs among them
    with safe_open(keep(write_tensors([("x", patterns)], "test")), framework="pt") as file:
        assert file.get_tensor("x").dtype == dtype
        assert same_bytes(file.get_tensor("x"), patterns)


def test_views_are_written_as_they_look(keep: Keep) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    path = keep(write_tensors([("t", whole.t()), ("row", whole[1])], "test"))
    with safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("t"), whole.t())
        assert torch.equal(file.get_tensor("row"), whole[1])


@pytest.mark.parametrize("data", [b"", b"some bytes", memoryview(torch.arange(9).numpy())])
def test_bytes_come_back(keep: Keep, data: bytes | memoryview) -> None:
    with open(keep(write_bytes(data, "test")), "rb") as file:
        assert file.read() == bytes(data)


def test_bytes_of_an_image_are_an_image(keep: Keep) -> None:
    with open(keep(write_tensors([("x", torch.ones(5))], "test")), "rb") as file:
        image = file.read()
    with safe_open(keep(write_bytes(image, "test")), framework="pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.ones(5))


def test_a_file_has_no_name_and_cannot_be_changed(keep: Keep) -> None:
    path = keep(write_bytes(b"sealed", "test"))
    assert os.readlink(path) == "/memfd:rlhfuse-test (deleted)"
    with open(path, "r+b", buffering=0) as file:
        for change in (
            lambda: file.write(b"x"),
            lambda: file.truncate(0),
            lambda: file.truncate(9),
        ):
            with pytest.raises(PermissionError):
                change()
        assert file.read() == b"sealed"


def test_a_file_is_gone_once_it_is_closed() -> None:
    descriptor = write_bytes(b"gone", "test")
    path = path_of(descriptor)
    with open(path, "rb") as reader:
        os.close(descriptor)
        assert not os.path.exists(path)
        # Who had opened it before keeps it.
        assert reader.read() == b"gone"


def test_a_write_that_fails_leaves_nothing_open() -> None:
    before = os.listdir("/proc/self/fd")
    with pytest.raises(TypeError):
        write_bytes("text", "test")  # type: ignore[arg-type]
    assert os.listdir("/proc/self/fd") == before


def test_a_memory_file_is_opened_by_its_path(keep: Keep) -> None:
    descriptor = open_memory_file(keep(write_bytes(b"keys", "kv")), "kv")
    with open(descriptor, "rb") as file:
        assert file.read() == b"keys"


def unsealed(folder: Path) -> int:
    return os.memfd_create("rlhfuse-kv", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def on_disk(folder: Path) -> int:
    (folder / "memfd:rlhfuse-kv (deleted)").touch()
    return os.open(folder / "memfd:rlhfuse-kv (deleted)", os.O_RDONLY)


def pipe(folder: Path) -> int:
    os.mkfifo(folder / "pipe")
    return os.open(folder / "pipe", os.O_RDWR)


OTHERS: dict[str, Callable[[Path], int]] = {
    "another label": lambda folder: write_bytes(b"weights", "weights"),
    "not sealed": unsealed,
    "on disk": on_disk,
    "a device": lambda folder: os.open("/dev/zero", os.O_RDONLY),
    "a pipe": pipe,
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_no_other_file_is_opened(keep: Keep, tmp_path: Path, other: Callable[[Path], int]) -> None:
    path = keep(other(tmp_path))
    before = os.listdir("/proc/self/fd")
    with pytest.raises((ValueError, OSError)):
        open_memory_file(path, "kv")
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("path", ["/etc/passwd", "/proc/self/environ", "/proc/1/fd/99999", "x"])
def test_a_path_to_something_else_is_an_error(path: str) -> None:
    with pytest.raises((ValueError, OSError)):
        open_memory_file(path, "kv")
