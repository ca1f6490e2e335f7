"""The ranks' part of test_checkpoint.py, once more: what can go wrong with a checkpoint."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tests.distributed.job_helpers import changed
from tests.distributed.model_helpers import make_hf_model

Results = dict[str, Any]


def refusals(trainer: Any, root: Path) -> dict[str, str]:
    """What is said of checkpoints that do not fit, by what is wrong."""
    from megatron_rlhfuse.assembly import build_trained_models
    from megatron_rlhfuse.models.hf_config import read_shape
    from megatron_rlhfuse.training.checkpoint import save_checkpoint
    from megatron_rlhfuse.training.checkpoint_folder import TRACKER

    models = trainer.models.by_name()
    if dist.get_rank() == 0:
        make_hf_model("qwen3", "language", root / "other-actor")
        (root / "empty").mkdir()
        for name, text in (("dangling", "7\n"), ("garbled", "two\n")):
            (root / name).mkdir()
            (root / name / TRACKER).write_text(text)
        (root / "torn" / "iter_0000002").mkdir(parents=True)
        (root / "torn" / TRACKER).write_text("2\n")
        shutil.copytree(root / "checkpoints", root / "truncated")
        for name in ("flipped", "lost", "no sums", "older"):
            shutil.copytree(root / "checkpoints", root / name)
        for data in (root / "truncated" / "iter_0000004").glob("*.distcp"):
            os.truncate(data, 100)
        _flip_a_byte(root / "flipped" / "iter_0000004" / "__1_0.distcp")
        (root / "lost" / "iter_0000004" / "__0_0.distcp").unlink()
        (root / "no sums" / "iter_0000004" / "integrity.json").write_text('{"files": {"a": 1}}')
        (root / "older" / "iter_0000004" / "integrity.json").unlink()
    save_checkpoint(
        changed(trainer.args, save=f"{root}/without-critic"), 1, {"actor": models["actor"]}, {}
    )
    dist.barrier()
    other = build_trained_models(
        changed(
            trainer.args,
            actor_model=f"{root}/other-actor",
            actor_shape=read_shape(root / "other-actor", "language"),
        )
    )
    alone = changed(trainer.args, lr_decay_iters=9)
    return {
        "no folder": _refusal(trainer.args, models, root / "nowhere"),
        "no tracker": _refusal(trainer.args, models, root / "empty"),
        "dangling tracker": _refusal(trainer.args, models, root / "dangling"),
        "garbled tracker": _refusal(trainer.args, models, root / "garbled"),
        "truncated": _refusal(trainer.args, models, root / "truncated"),
        "flipped byte": _refusal(trainer.args, models, root / "flipped"),
        "lost file": _refusal(trainer.args, models, root / "lost"),
        "sums unreadable": _refusal(trainer.args, models, root / "no sums"),
        "without sums": _refusal(trainer.args, models, root / "older"),
        "no critic": _refusal(trainer.args, models, root / "without-critic"),
        "torn": _refusal(trainer.args, models, root / "torn"),
        "another model": _refusal(trainer.args, other.by_name(), root / "checkpoints"),
        "another schedule": _refusal(
            alone, build_trained_models(alone).by_name(), root / "checkpoints"
        ),
    }


def _flip_a_byte(path: Path) -> None:
    """In the middle of the file: among the numbers of a tensor, which nothing else would notice."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def disagreement(trainer: Any) -> dict[str, str]:
    """What is loaded where rank 1 sees another --load and another checkpoint than rank 0."""
    from megatron_rlhfuse.training import checkpoint

    args = changed(trainer.args, load=trainer.args.save if dist.get_rank() == 0 else None)
    checkpoint.agree_on_load(args)
    latest = checkpoint.latest_checkpoint
    if dist.get_rank() == 1:
        checkpoint.latest_checkpoint = lambda root: Path(root) / "iter_0000002"
    try:
        progress = checkpoint.load_checkpoint(args, trainer.models.by_name())
    finally:
        checkpoint.latest_checkpoint = latest
    return {"load": Path(args.load).name, "iteration": progress["iteration"]}


def _refusal(args: Any, models: Any, folder: Path) -> str:
    from megatron_rlhfuse.training.checkpoint import load_checkpoint
    from megatron_rlhfuse.training.checkpoint_folder import CheckpointError

    try:
        load_checkpoint(changed(args, load=str(folder)), models)
    except CheckpointError as error:
        return str(error)
    return "accepted"


def crash_before_the_tracker(trainer: Any) -> str:
    """Saves iteration 6 up to the last moment; returns which checkpoint is the latest then."""
    from megatron_rlhfuse.training import checkpoint

    class CrashError(Exception):
        pass

    write_manifest = checkpoint.write_manifest

    def write_and_crash(folder: Path) -> None:
        write_manifest(folder)
        raise CrashError

    args, models = trainer.args, trainer.models.by_name()
    checkpoint.write_manifest = write_and_crash
    try:
        checkpoint.save_checkpoint(args, 6, models, {"iteration": 6})
    except CrashError:
        return checkpoint.latest_checkpoint(args.save).name
    finally:
        checkpoint.write_manifest = write_manifest
    return "no crash"


def full_disk(trainer: Any) -> Results:
    """A save during which one rank finds no room, what is left of it, and the next one."""
    from megatron_rlhfuse import last_words
    from megatron_rlhfuse import trainer as trainer_module
    from megatron_rlhfuse.training.checkpoint_folder import latest_checkpoint

    said: list[str] = []
    last_words.complain = said.append
    trainer_module._TIDYING_S = 0.0  # the ranks of this test go on
    fsync = os.fsync

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == 1:
        os.fsync = no_room
    try:
        trainer._save(8)
        status = None
    except SystemExit as end:
        status = end.code
    finally:
        os.fsync = fsync
    dist.barrier()
    root = trainer.args.save
    left = sorted(each.name for each in Path(root).glob("iter_*8"))
    latest = latest_checkpoint(root).name
    dist.barrier()
    trainer._save(8)
    return {
        "said": said,
        "status": status,
        "left": left,
        "latest": latest,
        "then": latest_checkpoint(root).name,
    }
