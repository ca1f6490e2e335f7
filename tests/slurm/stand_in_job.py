"""Jobs of train.sbatch whose trainer is the stand-in: they start in seconds."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from tests.slurm.cluster import SCRIPTS, STAND_IN, Cluster, read


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

    def end(self) -> tuple[str, str]:
        """Waits for the end of the job; its state and its exit status (STATUS:SIGNAL)."""
        job = self.cluster.end_of(self.number, self.output_path)
        return job["JobState"], job["ExitCode"]

    def iterations(self) -> list[int]:
        """Those that were made, in order."""
        return [int(number) for number in re.findall(r"stand-in: iteration (\d+)", self.output)]
