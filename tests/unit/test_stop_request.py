"""Who may tell a job to end, what all ranks make of it, and what it leaves."""

from __future__ import annotations

import argparse
import errno
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch.distributed as dist

from megatron_rlhfuse import stop_request
from megatron_rlhfuse.stop_request import StopRequest

TAKEN = (signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def one_rank(tmp_path: Path) -> Iterator[None]:
    """A process group of this process, and its signal handlers put back."""
    handlers = {number: signal.getsignal(number) for number in TAKEN}
    stop_request._signalled = False
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    stop_request._signalled = False


def listener(folder: Path, **changed: Any) -> StopRequest:
    arguments = {
        "rlhfuse_run_dir": str(folder),
        "rank": 0,
        "train_iters": 8,
        "exit_duration_in_mins": None,
        "exit_interval": None,
    }
    request = StopRequest(argparse.Namespace(**(arguments | changed)))
    request.clear()
    return request


def test_nobody_asks(tmp_path: Path) -> None:
    request = listener(tmp_path)
    assert not request.agree(1) and request.after is None
    request.settle()
    assert list(tmp_path.iterdir()) == []


def test_the_last_iteration_is_no_stop(tmp_path: Path) -> None:
    request = listener(tmp_path)
    (tmp_path / "stop").touch()
    assert request.agree(8) and request.after is None
    request.settle()
    assert list(tmp_path.iterdir()) == []


def test_a_file(tmp_path: Path) -> None:
    request = listener(tmp_path)
    (tmp_path / "stop").touch()
    assert request.agree(3)
    request.settle()
    assert json.loads((tmp_path / "stopped.json").read_text()) == {
        "iteration": 3,
        "of": 8,
        "reason": "a file named stop",
    }
    assert not (tmp_path / "stop").exists()


@pytest.mark.parametrize("number", TAKEN)
def test_a_signal_that_came_before_anything_was_built(
    tmp_path: Path, number: signal.Signals
) -> None:
    stop_request.hear(number)
    os.kill(os.getpid(), number)
    request = listener(tmp_path)
    assert request.agree(3) and (request.after, request.reason) == (3, "a signal")


def test_an_interval(tmp_path: Path) -> None:
    request = listener(tmp_path, exit_interval=3)
    assert [request.agree(iteration) for iteration in (1, 2)] == [False, False]
    assert request.agree(3) and request.reason == "--exit-interval"


def test_a_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(stop_request.time, "monotonic", lambda: now)
    request = listener(tmp_path, exit_duration_in_mins=2)
    now += 119
    assert not request.agree(1)
    now += 2
    assert request.agree(2) and request.reason == "--exit-duration-in-mins"


def test_what_one_rank_was_asked_all_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = listener(tmp_path, rank=1)

    def of_all(asked: Any, op: Any) -> None:
        assert int(asked) == 0
        asked.fill_(3)  # another rank had a signal

    monkeypatch.setattr(stop_request.dist, "all_reduce", of_all)
    assert request.agree(5) and (request.after, request.reason) == (5, "a signal")
    request.settle()  # rank 0's
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("age_s", "heeds"), [(-1, True), (1, False)])
def test_a_file_from_before_the_launch_is_an_old_one(
    tmp_path: Path, age_s: int, heeds: bool
) -> None:
    """age_s: of the file, at the moment when this process's parent was started."""
    for name in ("stopped.json", "refused.txt", "stop"):
        (tmp_path / name).touch()
    written = psutil.Process(os.getppid()).create_time() - age_s
    os.utime(tmp_path / "stop", (written, written))
    request = listener(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == (["stop"] if heeds else [])
    assert request.agree(1) == heeds


def test_a_folder_that_cannot_be_looked_at_asks_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = listener(tmp_path)

    def stale(path: Path) -> bool:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(Path, "exists", stale)
    assert not request.agree(1)
