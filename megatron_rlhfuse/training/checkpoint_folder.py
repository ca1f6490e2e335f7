"""The folder that `--save` and `--load` name: a checkpoint per iteration, and which is the latest.

Knows files only: no Megatron, no collective.

Invariants
- the tracker is written last, by rename: a kill at any moment leaves the previous checkpoint, or
  the new one, and never half of one, as the latest;
- what is removed is never the latest.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megatron_rlhfuse.observe.jsonl import write_atomically

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"

INTEGRITY = "integrity.json"
"""Written last of a checkpoint's files; Megatron's name for it."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another job, or cannot be written; the message names
    the folder. `is_own`: other ranks may not know of it."""

    def __init__(self, message: str, is_own: bool = False) -> None:
        super().__init__(message)
        self.is_own = is_own


def folder_of(root: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return root / f"iter_{iteration:07d}"


def has_checkpoint(root: str | Path) -> bool:
    """Whether a job has saved there, ever."""
    return (Path(root) / TRACKER).is_file()


def latest_checkpoint(root: str | Path) -> Path:
    """The newest complete checkpoint under `--load`. Raises CheckpointError without one."""
    tracker = Path(root) / TRACKER
    if not tracker.is_file():
        raise CheckpointError(
            f"--load {root} holds no checkpoint ({TRACKER} is missing): leave the flag out to "
            "start from --actor-model"
        )
    text = tracker.read_text(errors="replace").strip()
    number = int(text) if text.isdecimal() and text.isascii() else None
    if number is None or not folder_of(Path(root), number).is_dir():
        others = _others(root, number)
        raise CheckpointError(
            f"{tracker} says {text[:40]!r}, which names no checkpoint in {root}{others}"
        )
    return folder_of(Path(root), number)


def make_latest(root: Path, iteration: int) -> None:
    """Says that the checkpoint of an iteration is complete."""
    write_atomically(root / TRACKER, f"{iteration}\n", durable=True)


def remove_partial(root: Path, iteration: int) -> None:
    """Removes what a save has left that did not end well; nothing that is the latest."""
    folder = folder_of(root, iteration)
    if not has_checkpoint(root) or latest_checkpoint(root) != folder:
        shutil.rmtree(folder, ignore_errors=True)


def remove_previous(root: Path, previous: int | None, interval: int) -> None:
    """Removes the checkpoint that was the latest before, unless of a multiple of `interval`.

    One that cannot be removed stays, with a warning: the job has saved, and can go on.
    """
    if previous is None or previous % interval == 0:
        return
    try:
        shutil.rmtree(folder_of(root, previous))
    except OSError as fault:
        logger.warning("the checkpoint before the latest one stays: %s", fault)


def latest_iteration(root: str | Path) -> int | None:
    """The number of the newest complete checkpoint; None without one that can be told."""
    try:
        return number_of(latest_checkpoint(root))
    except CheckpointError:
        return None


def number_of(folder: Path) -> int:
    """The iteration of a checkpoint's folder."""
    return int(folder.name.removeprefix("iter_"))


def describe(root: Path) -> str:
    """Room and latest checkpoint after a save that failed, for the end of an error message."""
    free = shutil.disk_usage(next(each for each in (root, *root.parents) if each.exists())).free
    latest = (
        f"the latest checkpoint is still {latest_checkpoint(root).name}"
        if has_checkpoint(root)
        else "there is no earlier checkpoint"
    )
    return f"{free / 1e6:,.0f} MB are free there; {latest}"


def another_checkpoint(folder: Path) -> str:
    """How to go on from another one than this, for the end of an error message; empty where there
    is none."""
    return _others(folder.parent, number_of(folder))


def _others(root: str | Path, without: int | None) -> str:
    found = [number for number in _complete(Path(root)) if number != without]
    if not found:
        return ""
    # A later one may be of a line that was given up.
    earlier = [number for number in found if without is None or number < without]
    return f"; to go on from another one write its number into {TRACKER}: {max(earlier or found)}"


def _complete(root: Path) -> list[int]:
    """Iterations of checkpoints with the file that is written last."""
    folders = (each for each in root.glob("iter_*") if (each / INTEGRITY).is_file())
    names = (each.name.removeprefix("iter_") for each in folders)
    return [int(name) for name in names if name.isdecimal()]
