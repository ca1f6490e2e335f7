"""A Slurm cluster on this machine for these tests: jobs are submitted, watched and looked after."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts" / "slurm"
START = ROOT / "tests" / "slurm" / "start.sh"
STAND_IN = ROOT / "tests" / "slurm" / "stand_in"

CANNOT_HAVE_SLURM = 3
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")

# What a user's environment may hold and a test must not depend on.
_SETTINGS = (
    *("REPOSITORY", "RUN_DIR", "PROCESSES_PER_NODE", "NETWORK_INTERFACE", "MAX_RESTARTS"),
    *("MAX_REQUEUES", "DOCTOR", "RENDEZVOUS_PORT", "SRUN_OPTIONS", "SEARCH_SECONDS"),
    "OMP_NUM_THREADS",
)

Fields = dict[str, str]


def clean_environment(**changes: str) -> dict[str, str]:
    """This process's environment without Slurm's variables and without settings of the scripts."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_", "SRUN_", "MAKE")) and name not in _SETTINGS
    }
    return kept | {"VENV": sys.prefix} | changes


class Cluster:
    """The cluster in a folder, which start.sh has started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._configuration = str(folder / "slurm.conf")

    def environment(self, **changes: str) -> dict[str, str]:
        return clean_environment(SLURM_CONF=self._configuration, **changes)

    def run(
        self, *words: object, cwd: Path = ROOT, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command as a user of this cluster would; its status is the caller's to look at."""
        return subprocess.run(
            [str(word) for word in words],
            cwd=cwd,
            env=self.environment(**environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def command(self, *words: object, **environment: str) -> str:
        """The same for a command that is to succeed; returns what it printed."""
        done = self.run(*words, **environment)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def submit(self, *words: object, **environment: str) -> int:
        """Calls sbatch; returns the job's number."""
        return int(self.command("sbatch", "--parsable", *words, **environment))

    def job(self, number: int) -> Fields:
        """What Slurm knows about a job: JobState, Restarts, ExitCode, ..."""
        shown = self.command("scontrol", "--oneliner", "show", "job", number)
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait_for(self, what: str, condition: Callable[[], bool], timeout_s: float = 240) -> None:
        """Returns once the condition holds."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, f"no {what} within {timeout_s} s:\n" + self.command(
                "squeue", "--all"
            )
            time.sleep(0.1)

    def end_of(self, number: int, output: Path, timeout_s: float = 300) -> Fields:
        """Waits until a job has ended for good; returns what Slurm knows about it."""

        def has_ended() -> bool:
            return self.job(number)["JobState"] in ENDED

        try:
            self.wait_for(f"end of job {number}", has_ended, timeout_s)
        except AssertionError as late:
            raise AssertionError(f"{late}\n{read(output)}") from None
        return self.job(number)

    def queued(self) -> list[str]:
        """Jobs that wait or run, by number; not those that Slurm is still clearing away."""
        states = "--states=PENDING,RUNNING,CONFIGURING"
        return self.command("squeue", "--noheader", "--format=%A", states).split()

    def processes(self, number: int, node: int | None = None) -> list[psutil.Process]:
        """What a job runs in its steps, on one node or on all."""
        wanted = {"SLURM_CONF": self._configuration, "SLURM_JOB_ID": str(number)}
        if node is not None:
            wanted["SLURM_NODEID"] = str(node)
        found = []
        for process in psutil.process_iter():
            try:
                environment = process.environ()
            except psutil.Error:
                continue
            if "SLURM_PROCID" in environment and wanted.items() <= environment.items():
                found.append(process)
        return found


def read(output: Path) -> str:
    """What a job has printed so far."""
    return output.read_text() if output.exists() else ""
