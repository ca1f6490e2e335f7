"""A whole job on one machine listens on loopback only, and a stranger's messages change nothing."""

from __future__ import annotations

import ipaddress
import json
import pickle
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch.distributed as dist

from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample, Sample
from tests.e2e.jobs import INTER, KV, Job, run_paced, start_paced
from tests.e2e.runs import assert_equal_weights, metrics, same_everywhere

ITERATIONS = 2
UNKNOWN = 9999  # no sample of the job


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def flags() -> dict[str, object]:
    return {"train_iters": ITERATIONS, **INTER, **KV}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_paced(tmp_path_factory.mktemp("undisturbed"), **flags())


def sample(sample_id: int, token: int = 5) -> Sample:
    return Sample(sample_id, (1, 2), (token, 4), (-0.5, -1.5), "stop", 0, 0, 1.0, 2.0)


def partial(sample_id: int, *files: str) -> PartialSample:
    request = GenerationRequest(sample_id, (1, 2), 7)
    return PartialSample(request, (5,), (-0.1,), None, 2 * bool(files), files, 0, 1.25)


def garbage(trap: Path) -> list[bytes]:
    """Messages that no rank can have sent, to any queue."""
    return [
        b"\x00nonsense",
        b"\xff\xfe",
        b"{}",
        b"[" * 10_000,
        b" " * (7 << 20),
        pickle.dumps(Trap(trap)),
        sample(3).to_bytes().replace(b"-1.5", b"NaN"),
        sample(UNKNOWN).to_bytes(),
        sample(3, token=1_000_000).to_bytes(),
        partial(UNKNOWN).to_bytes(),
        partial(3, "/proc/1/fd/2").to_bytes().replace(b"/proc/1/fd/2", b"/etc/passwd/"),
    ]


class Stranger:
    """Somebody on the same machine who has found the port of the job's store."""

    def __init__(self, port: int, trap: Path) -> None:
        self._store = dist.TCPStore("127.0.0.1", port, None, False, timedelta(seconds=30))
        self._garbage = garbage(trap)

    def push(self) -> None:
        """Fills every queue of the job, of all its iterations."""
        for iteration in range(1, ITERATIONS + 1):
            for name in ("finished", "scored", "tail/samples/0", "tail/samples/1"):
                for message in self._garbage:
                    self._store.queue_push(f"{iteration}/{name}", message)
            self._store.append(f"{iteration}/ends", "nan,x,")  # type: ignore[attr-defined]
            self._store.append(f"{iteration}/lengths", "0,x y,")  # type: ignore[attr-defined]

    def overwrite_reports(self) -> None:
        for iteration in range(1, ITERATIONS + 1):
            for instance in range(2):
                self._store.set(f"{iteration}/tail/report/{instance}", json.dumps({"a": 1}))


def listeners(process: psutil.Process) -> Iterator[tuple[str, int]]:
    with suppress(psutil.NoSuchProcess):
        for each in process.net_connections("inet"):
            if each.status == "LISTEN" or (each.type.name == "SOCK_DGRAM" and not each.raddr):
                yield each.laddr.ip, each.laddr.port


def store_port(job: Job) -> int | None:
    """Of the sockets that rank 0 listens on, the one to which it is connected itself."""
    ranks = job.ranks()
    if not ranks:
        return None
    mine = {port for _, port in listeners(ranks[0])}
    with suppress(psutil.NoSuchProcess):
        for each in ranks[0].net_connections("tcp"):
            if each.raddr and each.raddr.port in mine:
                return int(each.raddr.port)
    return None


def test_a_stranger_changes_nothing_and_finds_no_port_but_on_loopback(
    undisturbed: Path, tmp_path: Path
) -> None:
    trap = tmp_path / "ran"
    job = start_paced(tmp_path, **flags())
    agent = psutil.Process(job.process.pid)
    stranger: Stranger | None = None
    seen: dict[str, set[tuple[str, int]]] = {"agent": set(), "rank": set(), "engine": set()}
    deadline = time.monotonic() + 400
    while job.process.poll() is None:
        assert time.monotonic() < deadline, job.output
        for process in job.descendants():
            with suppress(psutil.NoSuchProcess):
                words = " ".join(process.cmdline())
                kind = "rank" if "pretrain_rlhf.py" in words else "engine"
                seen[kind] |= set(listeners(process))
        seen["agent"] |= set(listeners(agent))
        if stranger is None:
            port = store_port(job)
            if port is not None:
                stranger = Stranger(port, trap)
                stranger.push()
        else:
            with suppress(dist.DistError):  # the job has just ended
                stranger.overwrite_reports()
        time.sleep(0.05)
    assert job.wait() == 0, job.output
    job.assert_nothing_left()

    assert seen["rank"] and seen["engine"]
    outside = {
        (kind, *each)
        for kind, found in seen.items()
        for each in found
        if not ipaddress.ip_address(each[0]).is_loopback
    }
    # torchrun's own store: docs/security.md says what to do about it.
    assert {kind for kind, _, _ in outside} == {"agent"}

    assert stranger is not None, "no port of a store was found"
    assert not trap.exists()
    assert_equal_weights(tmp_path, undisturbed)
    assert same_everywhere(tmp_path) == same_everywhere(undisturbed)
    assert len(metrics(tmp_path)) == ITERATIONS
    log = "".join(path.read_text() for path in sorted((tmp_path / "logs").glob("rank*.log")))
    for queue in ("1/finished", "2/finished", "1/scored", "2/scored", "1/ends"):
        assert f"dropped a message of {queue} that no rank can have sent" in log
    assert "sample_id must be a whole number below 16, got 9999" in log
