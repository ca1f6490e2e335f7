"""Whole jobs under torchrun for these tests: started, watched, killed, looked after."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "build" / "toy"

SMALL = {
    "actor-model": TOY / "actor",
    "reward-model": TOY / "reward",
    "prompt-data": TOY / "prompts.jsonl",
    "pipeline-model-parallel-size": 2,
    "rollout-instances": 2,
    "rollout-max-prompt-tokens": 64,
    "rollout-max-new-tokens": 48,
    "rollout-batch-size": 16,
    "global-batch-size": 8,
    "micro-batch-size": 2,
    "train-iters": 2,
    "lr": 1e-3,
    "seed": 7,
    "rlhfuse-fusion": "none",
}

PACED: dict[str, Any] = {
    "train_iters": 4,
    "rollout_max_new_tokens": 96,
    "rollout_pace": 0.02,
    "lr": 1e-4,  # responses stay as long as they are at first
    "ppo_kl_target": 0.1,
}
"""Engines paced as on a GPU, where a step of few sequences takes as long as one of many: else the
toy model's tail would be over before it pays to migrate it."""

INTER: dict[str, Any] = {"rlhfuse_fusion": "inter", "rlhfuse_migration_threshold": 0.5}
KV: dict[str, Any] = {"rlhfuse_migration_transfer": "kv"}


class Job:
    """One run of pretrain_rlhf.py on two ranks; `flags` replace or add to SMALL by name.

    A flag set to True is given without a value, one set to None is left out. `environment` is set
    besides this process's own. With two `nodes` each rank is started by a torchrun of its own, as
    on two machines. `program` is run in place of pretrain_rlhf.py, with the same flags.
    """

    def __init__(
        self,
        run_folder: Path,
        environment: Mapping[str, str] | None = None,
        nodes: int = 1,
        elastic: bool = False,
        program: Path | str = "pretrain_rlhf.py",
        torchrun: Sequence[str] = (),
        **flags: object,
    ) -> None:
        assert TOY.is_dir(), "no toy models in build/toy: run `make toy`"
        run_folder.mkdir(parents=True, exist_ok=True)
        self.output_path = run_folder / "output.txt"
        given = {**SMALL, "rlhfuse-run-dir": run_folder}
        given |= {name.replace("_", "-"): value for name, value in flags.items()}
        self._program = str(program)
        words = [self._program]
        for name, value in given.items():
            if value is not None:
                words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
        self._output = self.output_path.open("w")
        self._agents = [
            subprocess.Popen(
                [sys.executable, "-m", "torch.distributed.run", *torchrun, *node, *words],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
                stdout=self._output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a signal to its group spares the tests
            )
            for node in _nodes(nodes, elastic)
        ]
        self.process = self._agents[0]
        self._seen: dict[int, psutil.Process] = {}
        self._shared_memory: set[Path] = set()

    @property
    def output(self) -> str:
        """What the job has printed so far."""
        return self.output_path.read_text()

    def wait_for(self, text: str, timeout_s: float = 180) -> None:
        """Returns once the job has printed `text`."""
        deadline = time.monotonic() + timeout_s
        while text not in self.output:
            assert self.process.poll() is None, f"the job ended early:\n{self.output}"
            assert time.monotonic() < deadline, f"no {text!r} within {timeout_s} s:\n{self.output}"
            time.sleep(0.05)
        self.descendants()

    def wait(self, timeout_s: float = 300) -> int:
        """The exit status of torchrun; of two the first that is not 0."""
        try:
            statuses = [agent.wait(timeout_s) for agent in self._agents]
            return next((status for status in statuses if status), 0)
        except subprocess.TimeoutExpired:
            self.kill_everything()
            raise AssertionError(f"still running after {timeout_s} s:\n{self.output}") from None

    def descendants(self) -> list[psutil.Process]:
        """All processes the job ever had, as far as they were seen."""
        for agent in self._agents:
            if agent.poll() is None:
                for child in psutil.Process(agent.pid).children(recursive=True):
                    self._seen.setdefault(child.pid, child)
                    self._shared_memory |= shared_memory(child.pid)
        return list(self._seen.values())

    def ranks(self) -> list[psutil.Process]:
        """The processes of the ranks, by rank."""
        agents = [psutil.Process(agent.pid) for agent in self._agents]
        ranks = [p for agent in agents for p in agent.children() if self._program in p.cmdline()]
        return sorted(ranks, key=lambda p: int(p.environ()["RANK"]))

    def engine(self, rank: int) -> psutil.Process:
        """The engine process that a rank leads."""
        children = self.ranks()[rank].children()
        engines = [p for p in children if "engine_process" in " ".join(p.cmdline())]
        assert len(engines) == 1, f"engines of rank {rank}: {engines}"
        return engines[0]

    def assert_nothing_left(self, within_s: float = 10) -> None:
        """No process of the job lives, and no file that one of them used lies in /dev/shm."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            alive = [p for p in self.descendants() if p.is_running() and p.status() != "zombie"]
            files = {path for path in self._shared_memory if path.exists()}
            if not alive and not files:
                return
            time.sleep(0.1)
        assert not alive, f"left running: {[(p.pid, p.cmdline()) for p in alive]}"
        assert not files, f"left in /dev/shm: {files}"

    def kill_everything(self) -> None:
        """Ends every process of the job, whatever state it is in."""
        for process in self.descendants():
            if process.is_running():
                process.send_signal(signal.SIGKILL)
        for agent in self._agents:
            agent.kill()
        self._output.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _nodes(count: int, elastic: bool) -> list[list[str]]:
    """torchrun's flags on every node; `elastic`: they meet anew after a rank has died."""
    if count == 1:
        return [["--nproc-per-node", "2"]]
    if elastic:
        port = _free_port()
        shared = ["--nnodes", str(count), "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
        shared += ["--rdzv-id", f"job-{port}", "--local-addr", "127.0.0.1"]
        shared += ["--rdzv-endpoint", f"127.0.0.1:{port}"]
        return [[*shared, "--rdzv-conf", f"is_host={node == 0}"] for node in range(count)]
    port = _free_port()
    shared = ["--nnodes", str(count), "--nproc-per-node", "1"]
    shared += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return [[*shared, "--node-rank", str(node)] for node in range(count)]


def shared_memory(pid: int) -> set[Path]:
    """Files in /dev/shm that a process has mapped: other programs have files there, too."""
    try:
        maps = Path(f"/proc/{pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    paths = (line.split(maxsplit=5)[-1] for line in maps.splitlines() if "/dev/shm/" in line)
    return {Path(path.removesuffix(" (deleted)")) for path in paths}


def start_paced(run: Path, **given: Any) -> Job:
    """A job with the flags PACED, and others, that leaves its models in the folder `models`."""
    return Job(run, save_hf=run / "models", **(PACED | given))


def end(job: Job) -> None:
    """Waits for a job that is to succeed."""
    assert job.wait() == 0, job.output
    job.assert_nothing_left()


def run_paced(run: Path, **given: Any) -> Path:
    """Runs such a job to its end, and returns its folder."""
    end(start_paced(run, **given))
    return run


def copy_checkpoint(run: Path, iteration: int, to: Path) -> Path:
    """Leaves in the folder `to` what a job had saved that ended after an iteration of `run`.

    Returns the folder to --load.
    """
    checkpoints, name = to / "checkpoints", f"iter_{iteration:07d}"
    shutil.copytree(run / "checkpoints" / name, checkpoints / name)
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(f"{iteration}\n")
    shutil.copy(run / "metrics.jsonl", to)
    return checkpoints
