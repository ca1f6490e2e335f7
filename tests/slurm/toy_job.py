"""The training job of these tests: toy models on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e.jobs import SMALL, Job
from tests.slurm.cluster import SCRIPTS, Cluster

ITERATIONS = 5
"""Enough that a job which is disturbed after its first checkpoint has some left."""

_FLAGS: dict[str, Any] = {"train-iters": ITERATIONS, "rollout-max-new-tokens": 24}


def undisturbed(run: Path) -> Job:
    """The job under a plain torchrun."""
    return Job(run, save_hf=run / "models", **_FLAGS)


def flags(run: Path) -> list[str]:
    """The same job's flags for train.sbatch, with a checkpoint in every iteration."""
    given = {
        **SMALL,
        **_FLAGS,
        "rlhfuse-run-dir": run,
        "save": run / "checkpoints",
        "save-interval": 1,
        "save-hf": run / "models",
    }
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def submit(cluster: Cluster, run: Path) -> int:
    """Starts the job with a rank on each of two nodes; returns its number."""
    return cluster.submit(
        *("--nodes=2", "--cpus-per-task=1", f"--output={run}/job.out"),
        SCRIPTS / "train.sbatch",
        *flags(run),
        PROCESSES_PER_NODE="1",
    )


def has_checkpoint(run: Path) -> bool:
    return (run / "checkpoints" / "latest_checkpointed_iteration.txt").exists()
