"""SHA-256 of a checkpoint's files: written when it is saved, compared before it is loaded.

The file is Megatron's `integrity.json` (`--verify-integrity` of a Megatron job reads it), but each
rank reads a share of the checkpoint: on Megatron's way rank 0 reads all of it while others wait.
Sums are of what can be read back after the save: they show what has changed since.

Which files there are is rank 0's word: on a shared file system others may see them later.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.observe.jsonl import write_atomically
from megatron_rlhfuse.pipeline.broadcast import broadcast_messages
from megatron_rlhfuse.training.checkpoint_folder import (
    INTEGRITY,
    CheckpointError,
    another_checkpoint,
)

_ALGORITHM = "sha256"
_BYTES = 32


def write_manifest(folder: Path) -> None:
    """Notes the sums of all files of a checkpoint, which all ranks have written. COLLECTIVE."""
    mine: list[bytes] | None = None
    if dist.get_rank() == 0:
        files = (each for each in folder.iterdir() if each.is_file() and each.name != INTEGRITY)
        mine = [each.name.encode() for each in sorted(files)]
    names = [name.decode() for name in broadcast_messages(mine, 0)]
    sums = torch.zeros(len(names), _BYTES, dtype=torch.uint8)
    for number in _written_here(names):
        sums[number] = torch.frombuffer(
            bytearray(_sum_of(folder / names[number])), dtype=sums.dtype
        )
    sums = _combine(sums)
    if dist.get_rank() == 0:
        table = {name: bytes(row.tolist()).hex() for name, row in zip(names, sums, strict=True)}
        text = json.dumps({"algorithm": _ALGORITHM, "files": table})
        write_atomically(folder / INTEGRITY, text, durable=True)


def read_manifest(folder: Path) -> bytes:
    """What `check_manifest` takes; empty of a checkpoint that was written without sums."""
    try:
        return (folder / INTEGRITY).read_bytes()
    except FileNotFoundError:
        return b""


def check_manifest(folder: Path, manifest: bytes) -> None:
    """Compares a checkpoint with its sums. COLLECTIVE.

    manifest: `read_manifest` of one rank. Raises CheckpointError, on all ranks, that names the
    files which are not as they were written.
    """
    if not manifest:
        return
    try:
        content = json.loads(manifest)
        files = {str(name): bytes.fromhex(value) for name, value in content["files"].items()}
        if content["algorithm"] != _ALGORITHM or any(len(v) != _BYTES for v in files.values()):
            raise ValueError(f"no list of {_ALGORITHM} sums")
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            f"{folder / INTEGRITY} is damaged: {fault}{another_checkpoint(folder)}"
        ) from fault
    names = sorted(files)
    wrong = torch.zeros(len(names), dtype=torch.uint8)
    for number in range(dist.get_rank(), len(names), dist.get_world_size()):
        wrong[number] = not _is_as_written(folder / names[number], files[names[number]])
    damaged = [name for name, flag in zip(names, _combine(wrong).tolist(), strict=True) if flag]
    if damaged:
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(damaged)} is not what was written (SHA-256 differs, "
            f"or it cannot be read); restore it from a copy{another_checkpoint(folder)}"
        )


def _written_here(names: Iterable[str]) -> list[int]:
    """The files that this rank has written: no other has to fetch them. The others are rank 0's."""
    rank = dist.get_rank()
    ranks = {f"__{each}_": each for each in range(dist.get_world_size())}
    writers = [ranks.get(name[: name.find("_", 2) + 1], 0) for name in names]
    return [number for number, writer in enumerate(writers) if writer == rank]


def _combine(table: Tensor) -> Tensor:
    """Rows that one rank has filled, zeros elsewhere: the whole table. COLLECTIVE."""
    table = table.to(platform.device())
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table.cpu()


def _is_as_written(path: Path, expected: bytes) -> bool:
    try:
        return _sum_of(path) == expected
    except OSError:
        return False


def _sum_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _ALGORITHM).digest()
