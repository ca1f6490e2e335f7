"""Runs functions of a test file on several ranks, under torchrun with Gloo.

    def check_something(folder: str) -> dict: ...      # runs on every rank

    def test_something(run_ranks, tmp_path):
        results = run_ranks(check_something, 4, str(tmp_path))   # one result per rank

Arguments and results travel as JSON. Before the function is called the rank has done
`platform.prepare()`, `compat.apply()` and `init_process_group`. A rank that fails makes the test
fail with the output of the ranks, the one that failed first before the others.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
_TAIL = 6000  # characters of a failed rank's output in the report

RunRanks = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def run_ranks() -> RunRanks:
    """See the head of this file: run_ranks(function, ranks, *args, timeout=120, env=None)."""
    return run_on_ranks


def run_on_ranks(
    function: Callable[..., Any],
    ranks: int,
    *args: Any,
    timeout: float = 120,
    env: dict[str, str] | None = None,
) -> list[Any]:
    """Calls `function(*args)` on `ranks` new processes; returns the result of each rank.

    Args:
        function: a top-level function of the calling test file
        args: anything that JSON can hold
        timeout: seconds until the processes are ended and the test fails
        env: environment variables besides this process's own
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        call = {"file": function.__code__.co_filename, "function": function.__name__}
        (Path(folder) / "call.json").write_text(json.dumps({**call, "args": args}))
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        # Port 0: the launcher itself listens on a free port, so no other job can take it.
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
        command += ["--local-addr", "127.0.0.1", "--log-dir", f"{folder}/logs", "--redirects", "3"]
        command += [__file__, folder]
        output = _launch(command, timeout, {"OMP_NUM_THREADS": "1", **(env or {})}, Path(folder))
        results = [Path(folder) / f"result-{rank}.json" for rank in range(ranks)]
        if output is not None or not all(path.exists() for path in results):
            pytest.fail(_report(function.__name__, Path(folder), output), pytrace=False)
        return [json.loads(path.read_text()) for path in results]


def _launch(command: list[str], timeout: float, env: dict[str, str], folder: Path) -> str | None:
    """Runs torchrun to its end; returns what went wrong, or None."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    with (folder / "torchrun.log").open("w") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": paths, **env},
        )
        try:
            status = process.wait(timeout)
            return f"exit status {status}" if status else None
        except subprocess.TimeoutExpired:
            return f"no end within {timeout} s"
        finally:
            _end(process, folder)


def _end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends torchrun and, should it fail to end them, the ranks it started."""
    if process.poll() is None:
        process.terminate()  # torchrun passes it on to its ranks
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
    if process.poll() is None:
        process.kill()
        process.wait()
    for path in folder.glob("pid-*"):
        pid = int(path.read_text())
        if _is_our_rank(pid):
            os.kill(pid, signal.SIGKILL)


def _is_our_rank(pid: int) -> bool:
    # The number may belong to another process by now: look at what it runs.
    with contextlib.suppress(OSError):
        return str(Path(__file__)) in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return False


def _report(name: str, folder: Path, reason: str | None) -> str:
    failures = {
        int(path.stem.removeprefix("failed-")): float(path.read_text())
        for path in folder.glob("failed-*")
    }
    logs = {int(path.parent.name): path for path in folder.glob("logs/*/attempt_0/*/stderr.log")}
    parts = [f"{name}: {reason or 'a rank ended without a result'}"]
    for rank in sorted(logs, key=lambda rank: (failures.get(rank, float("inf")), rank)):
        text = (logs[rank].with_name("stdout.log").read_text() + logs[rank].read_text()).strip()
        failed = "failed" if rank in failures else "was stopped, or ended without a result"
        parts.append(f"----- rank {rank} {failed} -----\n{text[-_TAIL:]}")
    parts.append(f"----- torchrun -----\n{(folder / 'torchrun.log').read_text()[-1500:]}")
    return "\n".join(parts)


def _main(folder: Path) -> None:
    """A rank: calls the function of call.json and leaves its result in the folder."""
    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    try:
        result = _call(folder)
    except BaseException:
        # The first to fail is the cause; the others die of closed connections.
        (folder / f"failed-{rank}").write_text(repr(time.time()))
        raise
    (folder / f"result-{rank}.json").write_text(json.dumps(result))


def _call(folder: Path) -> Any:
    from datetime import timedelta

    import torch.distributed as dist

    from megatron_rlhfuse import compat, platform

    platform.prepare()
    compat.apply()
    platform.set_up_rank(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend(), timeout=timedelta(seconds=60))
    call = json.loads((folder / "call.json").read_text())
    spec = importlib.util.spec_from_file_location("rank_functions", call["file"])
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        return getattr(module, call["function"])(*call["args"])
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
