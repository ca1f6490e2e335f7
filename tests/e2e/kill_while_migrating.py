"""pretrain_rlhf.py, except that an engine is killed while samples migrate, once in the job.

RLHFUSE_TEST_KILL says which: `source`, after a migration was published and before its samples have
left it; `destination`, just after it was handed the samples that it takes over. The file
RLHFUSE_TEST_KILLED is made by the rank that comes there first: others go on as ever.
"""

from __future__ import annotations

import os
import runpy
import signal
from collections.abc import Sequence
from pathlib import Path

from megatron_rlhfuse.migration.state import Move
from megatron_rlhfuse.rollout.member import Member

PROGRAM = Path(__file__).resolve().parents[2] / "pretrain_rlhf.py"

give, take = Member._give, Member._take


def kill_engine(member: Member) -> None:
    try:
        Path(os.environ["RLHFUSE_TEST_KILLED"]).touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(member._engine.pid, signal.SIGKILL)


def kill_and_give(self: Member, moves: Sequence[Move]) -> None:
    kill_engine(self)
    give(self, moves)


def take_and_kill(self: Member) -> None:
    before = self.counts.taken
    take(self)
    if self.counts.taken > before:
        kill_engine(self)


if __name__ == "__main__":
    if os.environ["RLHFUSE_TEST_KILL"] == "source":
        Member._give = kill_and_give  # type: ignore[method-assign]
    else:
        Member._take = take_and_kill  # type: ignore[method-assign]
    runpy.run_path(str(PROGRAM), run_name="__main__")
