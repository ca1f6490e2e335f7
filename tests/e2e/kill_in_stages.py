"""pretrain_rlhf.py, except that rank 1 is killed (-9) in every stage of an iteration.

In each it dies once, after the job's first checkpoint, and leaves a file of the stage's name in the
folder RLHFUSE_TEST_KILLED; started again, it goes on. RLHFUSE_TEST_SAVE is the job's --save.
"""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlhfuse.training.checkpoint_folder import has_checkpoint

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_rlhf.py"
RANK = "1"
STAGES = ("generation", "migration", "inference", "training", "saving")


def kill(stage: str) -> None:
    """The end of this process, unless it came in an earlier life, or is another rank's."""
    if os.environ["RANK"] != RANK or not has_checkpoint(os.environ["RLHFUSE_TEST_SAVE"]):
        return
    try:
        (Path(os.environ["RLHFUSE_TEST_KILLED"]) / stage).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before(stage: str, owner: Any, name: str) -> None:
    """Has a call of `owner.name` begin with the end."""
    original: Callable[..., Any] = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        kill(stage)
        return original(*args, **kwargs)

    setattr(owner, name, called)


def kill_after(stage: str, owner: Any, name: str) -> None:
    """Has a call of `owner.name` end with the end."""
    original: Callable[..., Any] = getattr(owner, name)

    def called(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        kill(stage)
        return result

    setattr(owner, name, called)


def arm() -> None:
    from megatron_rlhfuse.inference.instance import InferenceInstance
    from megatron_rlhfuse.inference.queue import SampleQueue
    from megatron_rlhfuse.pipeline.stage import Stage
    from megatron_rlhfuse.rollout.board import MigrationBoard
    from megatron_rlhfuse.rollout.member import Member
    from megatron_rlhfuse.training import checkpoint

    kill_after("generation", SampleQueue, "push_finished")
    # As the source of a migration, or as its destination: whichever this rank becomes first.
    kill_after("migration", MigrationBoard, "send")
    kill_before("migration", Member, "_take")
    kill_before("inference", InferenceInstance, "_score")
    kill_before("training", Stage, "backward")
    kill_before("saving", checkpoint, "write_manifest")


# torchrun's ranks run this; so may processes that they spawn, which must do nothing.
if __name__ == "__main__":
    import sys

    sys.argv[0] = str(PROGRAM)
    from megatron_rlhfuse import platform

    platform.prepare()  # before Megatron is imported by what follows
    arm()
    runpy.run_path(str(PROGRAM), run_name="__main__")
