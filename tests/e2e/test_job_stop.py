"""A job that is told to end, three times in three ways, and goes on each time it is started."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.jobs import Job, run_paced
from tests.e2e.runs import assert_equal_weights, metrics, same_everywhere

ITERATIONS = 9
FLAGS = {
    "rollout_pace": 0.02,
    "train_iters": ITERATIONS,
    "save_retain_interval": ITERATIONS,
    "save_interval": ITERATIONS,
    "rlhfuse_auto_resume": True,
    "exit_signal_handler": True,
    "lr": 1e-4,
}


def touch_stop(job: Job, run: Path) -> None:
    (run / "stop").touch()


def signal_a_rank(job: Job, run: Path) -> None:
    job.ranks()[1].send_signal(signal.SIGUSR1)


def terminate_the_launcher(job: Job, run: Path) -> None:
    job.process.send_signal(signal.SIGTERM)


# How, the exit status of torchrun, and what the job says of it.
WAYS: list[tuple[Callable[[Job, Path], None], bool, str]] = [
    (touch_stop, True, "a file named stop"),
    (signal_a_rank, True, "a signal"),
    (terminate_the_launcher, False, "a signal"),  # torchrun itself was told to end, and says so
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    flags = {"train_iters": ITERATIONS, "lr": 1e-4, "rollout_max_new_tokens": 48}
    return run_paced(run, **flags, ppo_kl_target=None, rollout_pace=0)


def test_a_job_that_is_told_to_end_saves_and_goes_on_where_it_was(
    undisturbed: Path, tmp_path: Path
) -> None:
    save = tmp_path / "checkpoints"
    done = 0
    for tell, ends_well, reason in WAYS:
        job = Job(tmp_path, torchrun=["--shutdown-timeout", "120"], save=save, **FLAGS)
        job.wait_for(f"iteration {done + 1}/{ITERATIONS}")
        tell(job, tmp_path)
        assert (job.wait() == 0) == ends_well, job.output
        job.assert_nothing_left()
        stopped = json.loads((tmp_path / "stopped.json").read_text())
        assert done < stopped["iteration"] < stopped["of"] == ITERATIONS
        assert stopped["reason"] == reason
        done = stopped["iteration"]
        assert f"stopped by {reason} after iteration {done} of {ITERATIONS}" in job.output
        assert [each.name for each in save.glob("iter_*")] == [f"iter_{done:07d}"]
        assert not (tmp_path / "stop").exists()

    # Left by a job that could not heed it any more.
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (time.time() - 60, time.time() - 60))
    job = Job(tmp_path, save=save, save_hf=tmp_path / "models", **FLAGS)
    assert job.wait() == 0, job.output
    assert f"resumed after iteration {done}" in job.output
    assert not (tmp_path / "stopped.json").exists()
    assert_equal_weights(tmp_path, undisturbed)
    assert same_everywhere(tmp_path) == same_everywhere(undisturbed)
    assert [record["iteration"] for record in metrics(tmp_path)] == [*range(1, ITERATIONS + 1)]
