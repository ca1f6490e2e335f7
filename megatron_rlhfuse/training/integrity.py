"""SHA-256 of a checkpoint's files: written when it is saved, compared before it is loaded.

The file is Megatron's `integrity.json` (`--verify-integrity` of a Megatron job reads it), but each
rank reads a share of the checkpoint: on Megatron's way rank 0 reads all of it while others wait.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.training.checkpoint_folder import CheckpointError, another_checkpoint

_ALGORITHM = "sha256"
_BYTES = 32


def write_manifest(folder: Path) -> None:
    """Notes the sums of all files of a checkpoint, which all ranks have written. COLLECTIVE."""
    from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME

    names = sorted(each.name for each in folder.iterdir() if each.name != INTEGRITY_FNAME)
    sums = torch.zeros(len(names), _BYTES, dtype=torch.uint8)
    for number in _share(len(names)):
        sums[number] = _sum_of(folder / names[number])
    sums = _combine(sums)
    if dist.get_rank() == 0:
        files = {name: bytes(row.tolist()).hex() for name, row in zip(names, sums, strict=True)}
        text = json.dumps({"algorithm": _ALGORITHM, "files": files})
        (folder / INTEGRITY_FNAME).write_text(text, encoding="utf-8")


def check_manifest(folder: Path) -> None:
    """Compares a checkpoint with its sums. COLLECTIVE.

    Raises CheckpointError, on all ranks, that names the files which are not as they were written.
    A checkpoint without sums passes: it was written without them.
    """
    from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME

    manifest = folder / INTEGRITY_FNAME
    if not manifest.is_file():
        return
    try:
        content = json.loads(manifest.read_bytes())
        files = {str(name): bytes.fromhex(value) for name, value in content["files"].items()}
        if content["algorithm"] != _ALGORITHM or any(len(v) != _BYTES for v in files.values()):
            raise ValueError(f"no list of {_ALGORITHM} sums")
    except (ValueError, KeyError, TypeError, AttributeError) as fault:
        raise CheckpointError(
            f"{manifest} is damaged: {fault}{another_checkpoint(folder)}"
        ) from fault
    names = sorted(files)
    wrong = torch.zeros(len(names), dtype=torch.uint8)
    for number in _share(len(names)):
        path = folder / names[number]
        found = bytes(_sum_of(path).tolist()) if path.is_file() else b""
        wrong[number] = found != files[names[number]]
    damaged = [name for name, flag in zip(names, _combine(wrong).tolist(), strict=True) if flag]
    if damaged:
        raise CheckpointError(
            f"{folder} is damaged: {', '.join(damaged)} is not what was written (SHA-256 differs); "
            f"restore it from a copy{another_checkpoint(folder)}"
        )


def _share(count: int) -> range:
    """The files that this rank reads."""
    return range(dist.get_rank(), count, dist.get_world_size())


def _combine(table: Tensor) -> Tensor:
    """Rows that one rank has filled, zeros elsewhere: the whole table. COLLECTIVE."""
    table = table.to(platform.device())
    dist.all_reduce(table, op=dist.ReduceOp.MAX)
    return table.cpu()


def _sum_of(path: Path) -> Tensor:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, _ALGORITHM).digest()
    return torch.frombuffer(bytearray(digest), dtype=torch.uint8)
