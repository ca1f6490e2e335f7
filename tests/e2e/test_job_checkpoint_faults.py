"""A job whose disk is full when it saves, and whose latest checkpoint is then damaged."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.jobs import Job, end
from tests.e2e.runs import assert_equal_weights, same_everywhere

FLAGS = {"train_iters": 3, "rollout_max_new_tokens": 24}
ROOM = "40m"
"""For two checkpoints of the toy models, and half of a third."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The mount point of a disk of ROOM."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def error_of(job: Job) -> str:
    """The one line in which a job says why it ends."""
    (line,) = (each for each in job.output.splitlines() if ": error: " in each)
    assert line.startswith("pretrain_rlhf.py: error: ")
    return line


def test_neither_costs_more_than_the_iterations_since(tmp_path: Path, small_disk: Path) -> None:
    expected = tmp_path / "undisturbed"
    end(Job(expected, save_hf=expected / "models", **FLAGS))
    run, save = tmp_path / "run", small_disk / "checkpoints"

    def start() -> Job:
        saving = {"save": save, "save_interval": 1, "rlhfuse_auto_resume": True}
        return Job(run, save_hf=run / "models", **FLAGS, **saving)

    job = start()
    assert job.wait() != 0
    job.assert_nothing_left()
    error = error_of(job)
    assert f"the checkpoint of iteration 3 cannot be written to {save}" in error
    assert error.endswith("the latest checkpoint is still iter_0000002")
    assert sorted(each.name for each in save.glob("iter_*")) == ["iter_0000001", "iter_0000002"]

    (data,) = (save / "iter_0000002").glob("__1_0.distcp")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    job = start()
    assert job.wait() != 0
    error = error_of(job)
    assert "iter_0000002 is damaged: __1_0.distcp is not what was written" in error
    assert error.endswith("write its number into latest_checkpointed_iteration.txt: 1")
    # For scripts: torchrun's status does not tell it from what a new start may mend.
    assert error.endswith((run / "refused.txt").read_text().strip())

    (save / "latest_checkpointed_iteration.txt").write_text("1\n")  # as the error says
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    job = start()
    end(job)
    assert "resumed after iteration 1" in job.output
    assert not (run / "refused.txt").exists()
    assert_equal_weights(run, expected)
    assert same_everywhere(run) == same_everywhere(expected)
