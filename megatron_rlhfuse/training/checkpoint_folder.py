"""The folder that `--save` and `--load` name: a checkpoint per iteration, and which is the latest.

Knows files only: no Megatron, no collective.

Invariants
- the tracker is written last, by rename: a kill at any moment leaves the previous checkpoint, or
  the new one, and never half of one, as the latest;
- what is removed is never the latest.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_rlhfuse.observe.jsonl import write_atomically

TRACKER = "latest_checkpointed_iteration.txt"

_WRITTEN_LAST = "metadata.json"
"""Of Megatron's own files."""


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, of another job, or cannot be written; the message names
    the folder."""


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
    path = folder_of(Path(root), int(text)) if text.isdecimal() and text.isascii() else None
    if path is None or not path.is_dir():
        raise CheckpointError(
            f"{tracker} says {text[:40]!r}, which names no checkpoint in {root}{_others(root)}"
        )
    return path


def make_latest(root: Path, iteration: int) -> None:
    """Says that the checkpoint of an iteration is complete."""
    write_atomically(root / TRACKER, f"{iteration}\n")


def remove_partial(root: Path, iteration: int) -> None:
    """Removes what a save has left that did not end well; nothing that is the latest."""
    folder = folder_of(root, iteration)
    if not has_checkpoint(root) or latest_checkpoint(root) != folder:
        shutil.rmtree(folder, ignore_errors=True)


def remove_old(root: Path, latest: int, interval: int) -> None:
    """Removes checkpoints from before the latest, but those of multiples of `interval`."""
    for number, folder in _folders(root):
        if number < latest and number % interval:
            shutil.rmtree(folder)


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
    return _others(folder.parent, folder)


def _others(root: str | Path, without: Path | None = None) -> str:
    numbers = [number for number, folder in _complete(Path(root)) if folder != without]
    if not numbers:
        return ""
    return f"; to go on from another one write its number into {TRACKER}: {max(numbers)}"


def _complete(root: Path) -> list[tuple[int, Path]]:
    """Iterations and folders of checkpoints that Megatron has finished."""
    return [each for each in _folders(root) if (each[1] / _WRITTEN_LAST).is_file()]


def _folders(root: Path) -> list[tuple[int, Path]]:
    named = ((each.name.removeprefix("iter_"), each) for each in root.glob("iter_*"))
    return [(int(name), each) for name, each in named if name.isdecimal() and each.is_dir()]
