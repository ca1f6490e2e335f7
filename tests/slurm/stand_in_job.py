"""Jobs of train.sbatch whose trainer is the stand-in: they start in seconds."""

from __future__ import annotations

import re
import shlex
import stat
import sys
from pathlib import Path

from tests.slurm.cluster import SCRIPTS, STAND_IN, Cluster, read


def venv_with_doctor(folder: Path, commands: str) -> Path:
    """A virtual environment in which `rlhfuse doctor` is these shell commands."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f'#!/bin/sh\n[ "$3" != doctor ] || {{ {commands}; }}\nexec {sys.prefix}/bin/python "$@"\n'
    )
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    return python.parents[1]


class StandInJob:
    """One job; `trainer` is what its trainer is told besides."""

    def __init__(
        self,
        cluster: Cluster,
        folder: Path,
        options: str,
        trainer: str,
        venv: Path | str = sys.prefix,
        **settings: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.cluster = cluster
        self.run = folder / "run"
        self.save = folder / "checkpoints"
        self.output_path = folder / "job.out"
        self.number = cluster.submit(
            *shlex.split(options),
            f"--output={self.output_path}",
            SCRIPTS / "train.sbatch",
            f"--save={self.save}",
            *shlex.split(trainer),
            REPOSITORY=str(STAND_IN),
            VENV=str(venv),
            RUN_DIR=str(self.run),
            **({"PROCESSES_PER_NODE": "1"} | settings),
        )

    @property
    def output(self) -> str:
        return read(self.output_path)

    @property
    def restarts(self) -> int:
        return int(self.cluster.job(self.number)["Restarts"])

    def wait_until_it_says(self, text: str) -> None:
        self.cluster.wait_for(f"{text!r} of the job", lambda: text in self.output)

    def ask_to_stop(self) -> None:
        """As Slurm does before a time limit."""
        self.cluster.command("scancel", "--signal=USR1", "--batch", self.number)

    def end(self) -> tuple[str, str]:
        """Waits for the end of the job; its state and its exit status (STATUS:SIGNAL)."""
        job = self.cluster.end_of(self.number, self.output_path)
        return job["JobState"], job["ExitCode"]

    def iterations(self) -> list[int]:
        """Those that were made, in order."""
        return [int(number) for number in re.findall(r"stand-in: iteration (\d+)", self.output)]
