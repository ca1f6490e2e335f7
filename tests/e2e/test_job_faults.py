"""A job that loses a rank, is interrupted, or whose engine hangs: it ends, and leaves nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.jobs import Job

# Long enough that every fault below comes in the middle of it.
LONG_GENERATION = {"rollout_max_new_tokens": 400, "rollout_ignore_eos": True, "train_iters": 1}


def start_and_generate(run: Path, **flags: object) -> Job:
    job = Job(run, **(LONG_GENERATION | flags))
    job.wait_for("run folder")
    time.sleep(0.5)
    job.descendants()
    return job


def test_a_rank_that_dies_ends_the_job(tmp_path: Path) -> None:
    job = start_and_generate(tmp_path)
    job.ranks()[1].kill()
    start = time.monotonic()
    assert job.wait(timeout_s=60) != 0
    assert time.monotonic() - start < 30
    job.assert_nothing_left()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_job_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    job = start_and_generate(tmp_path)
    if number == signal.SIGINT:  # Ctrl-C goes to the whole foreground process group
        os.killpg(job.process.pid, number)
    else:
        job.process.send_signal(number)
    assert job.wait(timeout_s=60) != 0
    job.assert_nothing_left()


def test_an_engine_that_hangs_is_named(tmp_path: Path) -> None:
    job = start_and_generate(tmp_path, rollout_step_timeout=4)
    engine = job.engine(rank=1)
    engine.suspend()
    assert job.wait(timeout_s=90) != 0
    assert "instance 1" in job.output and str(engine.pid) in job.output
    job.assert_nothing_left()
