"""Packing of ragged samples: against a plain loop, and its promises by properties."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse import _packing, platform
from megatron_rlhfuse.dispatch import packing
from megatron_rlhfuse.dispatch.packing import Field, Segments, move
from tests.unit.packing_reference import DTYPES, POSITION_DTYPES, bits, move_plainly, random_values

LENGTHS = st.lists(st.integers(0, 40), max_size=8)


def test_a_micro_batch_in_one_pass() -> None:
    tokens = torch.tensor([5, 6, 7, 8, 9, 10])
    rows = Segments.to_rows([3, 0], [3, 2], 4)
    padded, mask = torch.empty(2, 4, dtype=torch.long), torch.empty(2, 4, dtype=torch.bool)
    positions, weights = torch.empty(2, 4, dtype=torch.int32), torch.empty(2, 4)
    move(
        [
            Field(rows, padded, source=tokens, fill=-1),
            Field(rows, mask, each=torch.ones(2, dtype=torch.bool)),
            Field(rows, positions),
            Field(rows, weights, each=torch.tensor([0.5, 0.25])),
        ]
    )
    assert padded.tolist() == [[8, 9, 10, -1], [5, 6, -1, -1]]
    assert mask.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0]]
    assert weights.tolist() == [[0.5, 0.5, 0.5, 0.0], [0.25, 0.25, 0.0, 0.0]]


@given(lengths=LENGTHS, spare=st.integers(0, 5), data=st.data())
def test_every_token_once_in_order_and_its_mask(
    lengths: list[int], spare: int, data: st.DataObject
) -> None:
    order = data.draw(st.permutations(range(len(lengths))))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    width = max(lengths, default=0) + spare
    # No token is 0, so that a fill is not taken for one.
    tokens = torch.arange(1, sum(lengths) + 1)
    segments = Segments.to_rows([starts[i] for i in order], [lengths[i] for i in order], width)
    padded = torch.full((len(order), width), -9)
    mask = torch.full((len(order), width), 9, dtype=torch.uint8)
    positions = torch.full((len(order), width), -9, dtype=torch.int16)
    move(
        [
            Field(segments, padded, source=tokens),
            Field(segments, mask, each=torch.ones(len(order), dtype=torch.uint8)),
            Field(segments, positions, fill=-1),
        ]
    )
    assert sorted(padded[padded > 0].tolist()) == tokens.tolist()
    assert torch.equal(mask.bool(), padded > 0)
    for row, sample in enumerate(order):
        length, start = lengths[sample], starts[sample]
        assert torch.equal(padded[row, :length], tokens[start : start + length])
        assert not padded[row, length:].any()
        assert positions[row].tolist() == [*range(length), *[-1] * (width - length)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(lengths=LENGTHS, seed=st.integers(0, 1 << 30), offset=st.integers(0, 3))
def test_there_and_back_is_the_same_bit_for_bit(
    dtype: torch.dtype, lengths: list[int], seed: int, offset: int
) -> None:
    tokens = random_values(sum(lengths), dtype, seed)
    packed = Segments.to_packed([sum(lengths[:i]) for i in range(len(lengths))], lengths)
    width = max(lengths, default=0) + offset
    rows = torch.empty(len(lengths), width, dtype=dtype)
    there = Segments.to_rows(packed.source_starts, lengths, width, offset)
    back = Segments.from_rows(lengths, width, [offset] * len(lengths))
    once, twice = torch.empty_like(tokens), torch.empty_like(tokens)
    move([Field(there, rows, source=tokens)])
    move([Field(back, once, source=rows), Field(packed, twice, source=tokens)])
    assert torch.equal(bits(once), bits(tokens)) and torch.equal(bits(twice), bits(tokens))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40)
@given(
    shapes=st.lists(st.tuples(*[st.integers(0, 30)] * 4), max_size=6),
    fill=st.integers(0, 1),
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(["source", "each", "positions"]),
)
def test_it_is_the_plain_loop_and_touches_nothing_else(
    dtype: torch.dtype, shapes: list[tuple[int, ...]], fill: int, seed: int, kind: str
) -> None:
    """Shapes: a gap before the room, the length, what the room has beyond it, a source's start."""
    if kind == "positions" and dtype not in POSITION_DTYPES:
        kind = "source"
    gaps, lengths, spare, sources = (
        (torch.tensor(c) for c in zip(*shapes, strict=True))
        if (shapes)
        else (torch.zeros(0, dtype=torch.long),) * 4
    )
    rooms = lengths + spare
    starts = (gaps + rooms).cumsum(0) - rooms
    segments = Segments(sources, starts, lengths, rooms)
    target = random_values(int((gaps + rooms).sum()) + 5, dtype, seed)
    source = random_values(60, dtype, seed + 1) if kind == "source" else None
    each = random_values(len(shapes), dtype, seed + 2) if kind == "each" else None
    expected = target.clone()
    move_plainly(Field(segments, expected, source, each, fill))
    move([Field(segments, target, source, each, fill)])
    assert torch.equal(bits(target), bits(expected))


def test_many_threads_equal_one_in_passes_that_stream() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(0, 3000, (900,), generator=generator)
    segments = Segments.to_rows(lengths.cumsum(0) - lengths, lengths, 3001)
    found = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 7):
            torch.set_num_threads(count)
            fields = []
            for dtype in (torch.long, torch.int16, torch.uint8):
                source = random_values(int(lengths.sum()), dtype, 0)
                target = torch.full((900, 3001), 7, dtype=dtype)
                fields.append(Field(segments, target, source=source, fill=3))
            move(fields)
            found.append(torch.cat([bits(field.target) for field in fields]))
    finally:
        torch.set_num_threads(threads)
    for field in fields:
        move_plainly(Field(segments, field.target, field.source, fill=3))
    assert torch.equal(found[0], torch.cat([bits(field.target) for field in fields]))
    assert all(torch.equal(each, found[0]) for each in found[1:])


def test_fills_that_only_floats_have() -> None:
    segments = Segments.to_packed([0], [0])
    segments = Segments(*(table.clone() for table in vars(segments).values()))
    segments.rooms[0] = 3
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        target = torch.zeros(3, dtype=dtype)
        move([Field(segments, target, source=torch.zeros(1, dtype=dtype), fill=-float("inf"))])
        assert target.tolist() == [-float("inf")] * 3


def test_nothing_to_move() -> None:
    move([])
    empty = torch.empty(0, dtype=torch.long)
    move([Field(Segments.to_packed([], []), empty, source=empty)])
    move([Field(Segments.to_rows([0, 0], [0, 0], 0), torch.empty(2, 0), source=torch.empty(0))])


def table(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.long)


ROWS = Segments.to_rows([0, 2], [2, 3], 4)
TOKENS = torch.arange(5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"source": TOKENS.int()}, r"fields\[1\]\.source: want int64, got int32"),
        ({"source": TOKENS.repeat(2)[::2]}, r"fields\[1\]\.source: want it contiguous"),
        ({"target": torch.zeros(4, 2).long().t()}, r"fields\[1\]\.target: want it contiguous"),
        ({"target": torch.zeros(7).long()}, r"fields\[1\]\.segments\.target_starts\[1\]: 4 .*7 el"),
        ({"source": TOKENS[:4]}, r"fields\[1\]\.segments\.source_starts\[1\]: 2 .*4 elements"),
        ({"source": TOKENS.to("meta")}, r"fields\[1\]\.source: .*meta"),
        ({"target": torch.zeros(8, dtype=torch.complex64)}, r"fields\[1\]: dtype: .*complex64"),
        ({"each": table(1, 1)}, r"fields\[1\]\.each: want it or a source"),
        ({"source": None, "each": table(1)}, r"fields\[1\]\.each: has 1 values for 2 segments"),
        ({"source": None, "each": table(1, 1).int()}, r"fields\[1\]\.each: want int64, got int32"),
        ({"source": None, "target": torch.zeros(8)}, r"fields\[1\]\.target: positions .*float32"),
        ({"fill": 0.5}, r"fields\[1\]\.fill: 0.5"),
        ({"fill": float("nan")}, r"fields\[1\]\.fill: nan"),
        ({"fill": 1 << 70}, r"fields\[1\]\.fill: 1180591620717411303424"),
    ],
)
def test_a_field_at_fault_is_named(changed: dict[str, Any], message: str) -> None:
    good = Field(ROWS, torch.zeros(2, 4).long(), source=TOKENS)
    values = {"segments": ROWS, "target": torch.zeros(2, 4).long(), "source": TOKENS, **changed}
    with pytest.raises(ValueError, match=message):
        move([good, Field(**values)])


def test_a_target_that_the_pass_reads_is_refused() -> None:
    memory = torch.arange(20)
    with pytest.raises(ValueError, match=r"fields\[0\]\.source: shares memory with fields\[1\]"):
        move(
            [
                Field(ROWS, torch.zeros(8).long(), source=memory[5:10]),
                Field(ROWS, memory[9:17], source=TOKENS),
            ]
        )


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("lengths", (2, -3), r"lengths\[1\]: is negative"),
        ("lengths", (2, 5), r"lengths\[1\]: 5 is longer than its room, 4"),
        ("target_starts", (0, 3), r"target_starts\[1\]: 3 is before the end .* 4: overlaps"),
        ("target_starts", (4, 0), r"target_starts\[1\]: 0 is before .* does not ascend"),
        ("target_starts", (-1, 4), r"target_starts\[0\]: is negative"),
        ("target_starts", (0, (1 << 63) - 1), r"target_starts\[1\]: .* beyond the target"),
        ("source_starts", (0, -1), r"source_starts\[1\]: -1 .* beyond the source"),
        ("source_starts", (0, (1 << 63) - 1), r"source_starts\[1\]: .* beyond the source"),
    ],
)
def test_a_table_at_fault_is_named(name: str, values: Sequence[int], message: str) -> None:
    segments = Segments(**{**vars(ROWS), name: table(*values)})
    target = torch.full((2, 4), 7)
    with pytest.raises(ValueError, match=r"fields\[0\]\.segments\." + message):
        move([Field(segments, target, source=TOKENS)])
    assert (target == 7).all(), "what is refused has not begun"


def test_tables_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="rooms: has 1 segments, lengths has 2"):
        Segments(**{**vars(ROWS), "rooms": table(4)})
    with pytest.raises(ValueError, match="source_starts: has 2 segments, lengths has 3"):
        Segments.to_rows([0, 3], [3, 5, 2], 6)


def test_lengths_that_are_no_whole_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="want whole numbers"):
        Segments.to_packed([0, 1], torch.tensor([1.5, 2.5]))


def test_positions_beyond_the_dtype_are_refused() -> None:
    fits, beyond = (Segments.to_packed([0], [length]) for length in (256, 257))
    target = torch.zeros(257, dtype=torch.uint8)
    move([Field(fits, target)])
    assert target[:256].tolist() == list(range(256))
    with pytest.raises(ValueError, match=r"lengths\[0\]: 257 has positions beyond uint8"):
        move([Field(beyond, target)])


def test_segments_name_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"lengths\[1\]: 5 is longer than its room, 4"):
        Segments.to_rows([0, 0], [4, 5], 4)
    with pytest.raises(ValueError, match="offset: want 0 to the width 4, got 5"):
        Segments.to_rows([0], [0], 4, offset=5)
    with pytest.raises(ValueError, match=r"lengths\[0\]: 3 is longer than its room, 2"):
        Segments.from_rows([3], 4, [2])
    with pytest.raises(ValueError, match="offsets: want at least 0"):
        Segments.from_rows([3], 4, [-1])
    with pytest.raises(ValueError, match="offsets: 2 for 1 lengths"):
        Segments.from_rows([3], 4, [0, 0])
    with pytest.raises(ValueError, match="rooms: want int64"):
        Segments(table(0), table(0), table(0), torch.zeros(1))
    with pytest.raises(ValueError, match="lengths: want it contiguous"):
        Segments(table(0, 0), table(0, 0), table(0, 0, 0, 0)[::2], table(0, 0))


def test_the_cuda_part_is_built_where_nvcc_is() -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("there is no nvcc")
    part = importlib.import_module("megatron_rlhfuse._packing_cuda")
    # A job on a CPU, which another test may be, has stand-ins for what torch says of GPUs.
    assert part.devices() == (torch.cuda.device_count() if platform.has_cuda() else 0)
    assert part.architectures() and all(name[:3] == "sm_" for name in part.architectures())
    host = packing._describe(0, Field(ROWS, torch.zeros(8).long()), torch.zeros(1).long())
    with pytest.raises(ValueError, match="want it on a CUDA device"):
        part.Pass([host])


def test_a_launch_that_fails_raises() -> None:
    part = pytest.importorskip("megatron_rlhfuse._packing_cuda", reason="it was not built")
    if part.devices():
        pytest.skip("there is a GPU")

    def array(tensor: Tensor, device: int) -> _packing.Array:
        return _packing.Array(tensor.data_ptr(), "int64", tensor.numel(), device)

    target, fill = torch.zeros(8).long(), table(0)
    tables = [array(each, -1) for each in vars(ROWS).values()]
    field = _packing.Field(
        _packing.Segments(*tables), array(target, 0), array(fill, -1), array(TOKENS, 0), None
    )
    work = part.Pass([field, field])
    buffer = torch.zeros(work.table_elements, dtype=torch.long)
    work.write_table(array(buffer, -1))
    # The rows of two fields that share segments are there once, and where each segment's parts
    # begin.
    assert buffer.view(5, 2).tolist() == [
        *(each.tolist() for each in vars(ROWS).values()),
        [0, 1],
    ]
    with pytest.raises(ValueError, match=r"table: want int64 \[table_elements\] on CUDA device 0"):
        work.launch(array(buffer, -1), 0)
    with pytest.raises(RuntimeError, match="packing: cudaGetDevice"):
        work.launch(array(buffer, 0), 0)


def test_a_gpu_without_the_cuda_part_is_told_how_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron_rlhfuse._packing_cuda", None)
    monkeypatch.delattr("megatron_rlhfuse._packing_cuda", raising=False)
    with pytest.raises(RuntimeError, match=r"RLHFUSE_CUDA=1 python setup\.py build_ext --inplace"):
        packing._cuda_part()
