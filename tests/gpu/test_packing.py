"""Packing on a GPU: the same bits as on the host, on any stream, without waiting for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

from megatron_rlhfuse.dispatch.packing import Field, Segments, move
from tests.unit.packing_reference import DTYPES, POSITION_DTYPES, bits, random_values

pytestmark = pytest.mark.gpu
SAMPLES = 200


@pytest.fixture(autouse=True)
def nothing_waits() -> Iterator[None]:
    """An operation of torch's that waits for the GPU raises; moves do none."""
    torch.cuda.synchronize()
    yield
    torch.cuda.set_sync_debug_mode("default")


def move_without_waiting(fields: list[Field]) -> None:
    torch.cuda.set_sync_debug_mode("error")
    try:
        move(fields)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def on_gpu(field: Field) -> Field:
    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _with_the_place_of(tensor)

    target = there(field.target)
    assert target is not None
    return replace(field, target=target, source=there(field.source), each=there(field.each))


def _with_the_place_of(tensor: Tensor) -> Tensor:
    """A copy on the GPU that is as far behind an aligned address as the tensor in its storage."""
    offset = tensor.storage_offset()
    memory = torch.empty(offset + tensor.numel(), dtype=tensor.dtype, device="cuda")
    memory[offset:].copy_(tensor.reshape(-1))
    return memory[offset:].view(tensor.shape)


def ragged(longest: int, seed: int) -> Tensor:
    """Lengths, some of them 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest + 1, (SAMPLES,), generator=generator)
    lengths[::7], lengths[3::11] = 0, 1
    return lengths


def sample_fields(dtype: torch.dtype, longest: int, seed: int, kind: str) -> list[Field]:
    """On the host: padded, packed and out of rows again, each at some place of its storage."""
    lengths = ragged(longest, seed)
    starts = lengths.cumsum(0) - lengths
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))
    width, tokens = longest + seed, int(lengths.sum())
    shuffled = Segments.to_rows(starts[order], lengths[order], width)
    packed = Segments.to_packed(starts[order], lengths[order])
    cut_out = Segments.from_rows(lengths, width, torch.full_like(lengths, seed))

    def memory(count: int, place: int) -> Tensor:
        return random_values(count + place, dtype, seed + place)[place:]

    fields = []
    for i, (segments, read, written) in enumerate(
        [
            (shuffled, tokens, SAMPLES * width),
            (packed, tokens, tokens),
            (cut_out, SAMPLES * width, tokens),
        ]
    ):
        source = memory(read, (seed + i) % 5) if kind == "source" else None
        each = memory(SAMPLES, i) if kind == "each" else None
        fields.append(Field(segments, memory(written, (seed * i) % 7), source, each, fill=1))
    return fields


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["source", "each", "positions"])
def test_the_same_bits_as_on_the_host(dtype: torch.dtype, kind: str) -> None:
    if kind == "positions" and dtype not in POSITION_DTYPES:
        pytest.skip(f"{dtype} has no positions")
    for seed, longest in enumerate((1, 20, 100, 255, 5000)):
        if kind == "positions" and dtype is torch.uint8:
            longest = min(longest, 256)
        fields = sample_fields(dtype, longest, seed, kind)
        there = [on_gpu(field) for field in fields]
        move_without_waiting(there)
        move(fields)
        for field, other in zip(fields, there, strict=True):
            assert torch.equal(bits(other.target), bits(field.target)), (seed, longest)


def test_a_pass_of_many_fields() -> None:
    fields = [
        field
        for dtype in DTYPES
        for kind in ("source", "each")
        for field in sample_fields(dtype, 100, 1, kind)
    ]
    there = [on_gpu(field) for field in fields]
    move_without_waiting(there)
    move(fields)
    assert len(fields) > 32, "more than a launch holds"
    for field, other in zip(fields, there, strict=True):
        assert torch.equal(bits(other.target), bits(field.target))


def test_there_and_back_stays_on_its_stream() -> None:
    lengths = ragged(3000, 0)
    tokens = torch.empty(int(lengths.sum()), dtype=torch.long, device="cuda")
    starts = lengths.cumsum(0) - lengths
    rows = torch.empty(SAMPLES, 3000, dtype=torch.long, device="cuda")
    back = torch.empty_like(tokens)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what comes too early on another stream reads no tokens
        tokens.copy_(torch.arange(1, len(tokens) + 1, device="cuda"))
        move_without_waiting([Field(Segments.to_rows(starts, lengths, 3000), rows, source=tokens)])
        move_without_waiting([Field(Segments.from_rows(lengths, 3000), back, source=rows)])
        found = back.clone()
    stream.synchronize()
    assert torch.equal(found.cpu(), torch.arange(1, len(tokens) + 1))
    assert int((rows > 0).sum()) == int(lengths.sum())


def test_nothing_to_move() -> None:
    empty = torch.empty(0, device="cuda")
    move_without_waiting([Field(Segments.to_packed([], []), empty, source=empty)])
    move_without_waiting([Field(Segments.to_rows([0], [0], 0), empty, source=empty)])


def test_what_lies_elsewhere_is_named() -> None:
    segments = Segments.to_packed([0], [3])
    here, there = torch.zeros(3), torch.zeros(3, device="cuda")
    for field, name in (
        (Field(segments, there, source=here), "source"),
        (Field(segments, there, each=here[:1]), "each"),
    ):
        with pytest.raises(ValueError, match=rf"fields\[1\]\.{name}: want it on CUDA device"):
            move([Field(segments, there.clone(), source=there.clone()), field])
    with pytest.raises(ValueError, match=r"fields\[1\]\.target: want it on the host"):
        move([Field(segments, here, each=torch.ones(1)), Field(segments, there, source=there)])


def test_the_current_device_stays() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 CUDA devices")
    target = torch.zeros(3, device="cuda:1")
    move_without_waiting(
        [Field(Segments.to_packed([0], [3]), target, each=torch.ones(1, device="cuda:1"))]
    )
    assert torch.cuda.current_device() == 0 and target.tolist() == [1.0] * 3
