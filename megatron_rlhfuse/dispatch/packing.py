"""Ragged samples into padded or packed tensors and back: segmented copies with fill.

A field moves n segments: target[target_start : +length] = source[source_start : +length], and the
rest of the target's room becomes the fill. Masks, positions and weights of samples are fields, too,
so one pass writes all of a micro-batch. The work is C++ on the host and one CUDA kernel on a GPU
(`csrc/packing/`). Three samples into rows, with their mask:

    segments = Segments.to_rows(starts, lengths, width)
    tokens, mask = torch.empty(3, width, dtype=torch.int64), torch.empty(3, width)
    move([Field(segments, tokens, source=flat), Field(segments, mask, each=torch.ones(3))])

Invariants
- every element of a room is written once, and no element outside the rooms;
- values are copied bit for bit; the result does not depend on the number of threads or the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from megatron_rlhfuse import _packing

_HOST = -1


@dataclass(frozen=True)
class Segments:
    """Where n segments lie in a source and in a target, in elements: host int64 tensors [n].

    Rooms ascend in the target and do not overlap. A field without a source reads no source_starts.
    """

    source_starts: Tensor
    target_starts: Tensor
    lengths: Tensor
    rooms: Tensor

    def __post_init__(self) -> None:
        for name, table in vars(self).items():
            if table.device.type != "cpu" or table.dtype != torch.int64 or table.dim() != 1:
                raise ValueError(
                    f"{name}: want int64 [n] on the host, got {table.dtype} "
                    f"{list(table.shape)} on {table.device}"
                )
            if not table.is_contiguous():
                raise ValueError(f"{name}: want it contiguous")
            if len(table) != len(self.lengths):
                raise ValueError(
                    f"{name}: has {len(table)} segments, lengths has {len(self.lengths)}"
                )

    @classmethod
    def to_rows(
        cls,
        source_starts: Sequence[int] | Tensor,
        lengths: Sequence[int] | Tensor,
        width: int,
        offset: int = 0,
    ) -> Segments:
        """Into rows of `width`, each from column `offset` on; columns before that stay as they are.

        Raises ValueError: a sample is longer than the row.
        """
        counts, room = _table(lengths), width - offset
        if offset < 0 or room < 0:
            raise ValueError(f"offset: want 0 to the width {width}, got {offset}")
        _require_fit(counts, room)
        starts = torch.arange(len(counts)) * width + offset
        return cls(_table(source_starts), starts, counts, torch.full_like(counts, room))

    @classmethod
    def to_packed(
        cls, source_starts: Sequence[int] | Tensor, lengths: Sequence[int] | Tensor
    ) -> Segments:
        """One behind the other, without a gap."""
        counts = _table(lengths)
        return cls(_table(source_starts), starts_of(counts), counts, counts)

    @classmethod
    def from_rows(
        cls,
        lengths: Sequence[int] | Tensor,
        width: int,
        offsets: Sequence[int] | Tensor | None = None,
    ) -> Segments:
        """Out of rows of `width`, row i from column offsets[i] on; one behind the other.

        Raises ValueError: a sample reaches beyond its row.
        """
        counts = _table(lengths)
        columns = torch.zeros_like(counts) if offsets is None else _table(offsets)
        if columns.shape != counts.shape:
            raise ValueError(f"offsets: {len(columns)} for {len(counts)} lengths")
        if (columns < 0).any():
            raise ValueError("offsets: want at least 0")
        _require_fit(counts, width - columns)
        rows = torch.arange(len(counts)) * width + columns
        return cls(rows, starts_of(counts), counts, counts)

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class Field:
    """What one tensor gets. With neither source nor each: positions 0, 1, 2, ... in the segment.

    Attributes:
        target: contiguous, any shape; int64, int32, int16, uint8, bool or a float of 16 to 64 bits
            (positions: an integer)
        source: contiguous, of the target's dtype and device; not in memory that a pass writes
        each: [n], likewise: the value of every element of a segment
        fill: behind a segment, to the end of its room
    """

    segments: Segments
    target: Tensor
    source: Tensor | None = None
    each: Tensor | None = None
    fill: float | int | bool = 0


def move(fields: Sequence[Field]) -> None:
    """One pass over all fields, which may share a target where their rooms do not overlap (which
    is not looked at: what overlaps is of either).

    On CUDA it is one launch on torch's current stream, without a synchronization. No gradient
    flows through it.

    Raises:
        ValueError: an argument does not fit; names the field and the argument
        RuntimeError: tensors are on a GPU and the CUDA part was not built, or the launch failed
    """
    if not fields:
        return
    device = fields[0].target.device
    # What the addresses point to has to outlive the call.
    fills = [_fill_value(i, field) for i, field in enumerate(fields)]
    described = [
        _describe(i, field, fill) for i, (field, fill) in enumerate(zip(fields, fills, strict=True))
    ]
    if device.type == "cpu":
        _packing.move(described, torch.get_num_threads())
    else:
        _move_on_cuda(described, device)


def _move_on_cuda(fields: list[_packing.Field], device: torch.device) -> None:
    work = _cuda_part().Pass(fields)
    with torch.cuda.device(device):
        # Pinned, so that the upload is queued; torch keeps the memory until it was read.
        table = torch.empty(work.table_elements, dtype=torch.int64, pin_memory=True)
        work.write_table(_array(table))
        uploaded = table.to(device, non_blocking=True)
        work.launch(_array(uploaded), torch.cuda.current_stream().cuda_stream)


def _cuda_part() -> ModuleType:
    try:
        from megatron_rlhfuse import _packing_cuda
    except ImportError as error:
        raise RuntimeError(
            f"packing on a GPU needs megatron_rlhfuse._packing_cuda ({error}): with nvcc on PATH "
            "or in $CUDA_HOME/bin, run RLHFUSE_CUDA=1 python setup.py build_ext --inplace"
        ) from error
    return _packing_cuda


def _describe(index: int, field: Field, fill: Tensor) -> _packing.Field:
    for name in ("target", "source", "each"):
        tensor = getattr(field, name)
        if tensor is None:
            continue
        if tensor.device.type not in ("cpu", "cuda"):
            raise ValueError(f"fields[{index}].{name}: want cpu or cuda, is on {tensor.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"fields[{index}].{name}: want it contiguous")
    segments = field.segments
    try:
        return _packing.Field(
            _packing.Segments(
                _array(segments.source_starts),
                _array(segments.target_starts),
                _array(segments.lengths),
                _array(segments.rooms),
            ),
            _array(field.target),
            _array(fill),
            None if field.source is None else _array(field.source),
            None if field.each is None else _array(field.each),
        )
    except ValueError as error:
        raise ValueError(f"fields[{index}]: {error}") from error


def _array(tensor: Tensor) -> _packing.Array:
    device = _HOST if tensor.device.type == "cpu" else tensor.device.index
    dtype = str(tensor.dtype).removeprefix("torch.")
    return _packing.Array(tensor.data_ptr(), dtype, tensor.numel(), device)


def _fill_value(index: int, field: Field) -> Tensor:
    """The fill as one element of the target's dtype, on the host."""
    dtype = field.target.dtype
    try:
        value = torch.tensor([field.fill], dtype=dtype)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise ValueError(f"fields[{index}].fill: {field.fill} as {dtype}: {error}") from error
    if not dtype.is_floating_point and value.item() != field.fill:
        raise ValueError(f"fields[{index}].fill: {field.fill} is no value of {dtype}")
    return value


def _table(values: Sequence[int] | Tensor) -> Tensor:
    table = torch.as_tensor(values)
    if len(table) and (table.dtype.is_floating_point or table.dim() != 1):
        raise ValueError(f"want whole numbers [n], got {table.dtype} {list(table.shape)}")
    return table.to(torch.int64).contiguous()


def starts_of(lengths: Tensor) -> Tensor:
    """Where each of the given lengths begins when they lie one behind the other."""
    return lengths.cumsum(0) - lengths


def _require_fit(lengths: Tensor, rooms: Tensor | int) -> None:
    too_long = (lengths > rooms).nonzero()
    if len(too_long):
        first = int(too_long[0])
        room = int(torch.as_tensor(rooms).expand_as(lengths)[first])
        raise ValueError(f"lengths[{first}]: {int(lengths[first])} is longer than its room, {room}")
