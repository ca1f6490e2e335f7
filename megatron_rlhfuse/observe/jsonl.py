"""JSON-lines files that survive being killed while they are written.

Invariants:
- every line written is strict JSON: a number that is NaN or infinite is written as null;
- a last line torn by a kill is never returned by `read`, and is cut off by `repair`, which must
  run before anything is appended, so that a torn line never ends up inside the file;
- any other bad line is an error that names file and line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def encode(record: Mapping[str, Any]) -> str:
    """`record` as one line of strict JSON, newline included.

    Raises TypeError or ValueError for what JSON cannot hold.
    """
    return json.dumps(_strict(record), allow_nan=False) + "\n"


def read(path: Path) -> list[dict[str, Any]]:
    """The records of `path`, line n at position n - 1, without a torn last line.

    Raises ValueError naming file and line for a bad line, OSError for a file that cannot be read.
    """
    return _parse(path)[0]


def repair(path: Path) -> None:
    """Cuts a torn last line off `path`; ends a whole last line that lacks its newline."""
    intact_bytes = _parse(path)[1]
    with path.open("r+b") as file:
        file.truncate(intact_bytes)
        if intact_bytes:
            file.seek(intact_bytes - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")


def write_atomically(path: Path, text: str, durable: bool = False) -> None:
    """Writes `text` to `path` so that a kill leaves the old content or the new, never a mix.

    A link stays and its target is written; a pipe or a device is written to as it is. durable: it
    is on the disk when this returns, so that a machine that fails leaves no mix either.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _parse(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The records of `path`, and how many bytes of it are whole lines."""
    *lines, tail = path.read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not a line of JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{number}: expected a JSON object, got {line[:40]!r}")
        records.append(record)
    intact_bytes = sum(len(line) + 1 for line in lines)
    # A part of an object never parses: a tail that does has lost its newline and nothing else.
    try:
        record = json.loads(tail)
    except ValueError:
        return records, intact_bytes
    return [*records, record], intact_bytes + len(tail)
