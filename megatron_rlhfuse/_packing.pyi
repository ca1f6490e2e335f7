"""Packing on the host, and what describes a pass (csrc/packing/module.cpp)."""

from collections.abc import Sequence

class Array:
    """A contiguous tensor; device -1 is the host. Keep the tensor alive as long as this is used."""

    def __init__(self, address: int, dtype: str, elements: int, device: int) -> None: ...

class Segments:
    def __init__(
        self, source_starts: Array, target_starts: Array, lengths: Array, rooms: Array
    ) -> None: ...

class Field:
    def __init__(
        self,
        segments: Segments,
        target: Array,
        fill: Array,
        source: Array | None,
        each: Array | None,
    ) -> None: ...

def move(fields: Sequence[Field], threads: int) -> None: ...
