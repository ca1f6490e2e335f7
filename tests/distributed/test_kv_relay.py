"""Files of keys and values on their way from the leader of one instance to that of another."""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.rollout.kv_relay import GlooRelay
from megatron_rlhfuse.rollout.memory_file import path_of, write_bytes
from megatron_rlhfuse.rollout.nixl_relay import NixlRelay
from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample

needs_nixl = pytest.mark.skipif(
    importlib.util.find_spec("nixl") is None, reason="the package nixl is not installed"
)

BLOCK = 2
"""Ranks of an instance; the leaders of two instances need three ranks."""

WORKERS = 2
"""Files of a sample."""

WHOLE, HALF_GONE, GONE, WITHOUT, LARGE = range(5)
"""Samples: the files of some are gone, as after the death of an engine; one has none."""

SIZES = {WHOLE: 3, HALF_GONE: 100, GONE: 7, WITHOUT: 1, LARGE: 5 << 20}
LOST = "/proc/self/fd/99999"

LIMIT_S = 2.0
"""Of a read whose source does not answer."""

ROUNDS = 2
"""Iterations; the files of one are forgotten before the next."""


def image(sample_id: int, worker: int, leader: int) -> bytes:
    """What stands in a file; it tells whose it is."""
    return bytes([sample_id, worker, leader]) * SIZES[sample_id]


def make_samples(leader: int) -> Iterator[PartialSample]:
    for sample_id in SIZES:
        files = [path_of(write_bytes(image(sample_id, w, leader), "kv")) for w in range(WORKERS)]
        if sample_id == HALF_GONE:
            files[1] = LOST
        elif sample_id == GONE:
            files = [LOST] * WORKERS
        elif sample_id == WITHOUT:
            files = []
        request = GenerationRequest(sample_id, (1, 2), 7)
        yield PartialSample(request, (5,), (-0.5,), b"\1", 2 * bool(files), tuple(files), 1, 0.0)


def make_relay(kind: str, group: dist.ProcessGroup, block: int) -> GlooRelay:
    return NixlRelay(group, block, 30) if kind == "nixl" else GlooRelay(group, block)


def check_relay(kind: str) -> list[dict[str, Any]] | None:
    """Each leader sends its samples to the other, and then takes those of the other."""
    group = dist.new_group(backend="gloo")
    if dist.get_rank() % BLOCK:
        return None
    relay = make_relay(kind, group, BLOCK)
    return [exchange(relay, dist.get_rank() // BLOCK) for _ in range(ROUNDS)]


def exchange(relay: GlooRelay, instance: int) -> dict[str, Any]:
    other = 1 - instance
    already = relay.bytes
    samples = list(make_samples(instance))
    for each in samples:
        if each.kv_files:  # as Member does
            relay.send(each, other)
    received = [relay.receive(each, other) if each.kv_files else each for each in samples]
    arrived = {
        each.sample_id: [Path(path).read_bytes() for path in each.kv_files] for each in received
    }
    wanted = {
        each.sample_id: [image(each.sample_id, w, other) for w in range(len(each.kv_files))]
        for each in received
    }
    paths = [path for each in received for path in each.kv_files]
    result = {
        "files": {each.sample_id: len(each.kv_files) for each in received},
        "tokens": {each.sample_id: each.kv_tokens for each in received},
        "bytes are right": arrived == wanted,
        "rest is as it was": [replace(each, kv_files=(), kv_tokens=0) for each in samples]
        == [replace(each, kv_files=(), kv_tokens=0) for each in received],
        "on this node": all(path.startswith(f"/proc/{os.getpid()}/fd/") for path in paths),
        "sent": relay.bytes - already,
    }
    # As in a job: all have what they read before anyone forgets.
    relay.send(replace(samples[WHOLE], kv_files=(LOST,)), other)
    relay.receive(replace(samples[WHOLE], kv_files=(LOST,)), other)
    relay.forget()
    result["gone"] = not any(os.path.exists(path) for path in paths)
    relay.forget()  # idempotent
    return result


@pytest.fixture(scope="module", params=["gloo", pytest.param("nixl", marks=needs_nixl)])
def results(request: pytest.FixtureRequest, run_ranks: Any) -> list[dict[str, Any]]:
    """Of both leaders, in every round."""
    first, idle, second = run_ranks(check_relay, 1 + BLOCK, request.param)
    assert idle is None
    return [*first, *second]


def test_files_arrive_whole_in_both_directions(results: list[dict[str, Any]]) -> None:
    for result in results:
        for sample_id in (WHOLE, LARGE):
            assert result["files"][str(sample_id)] == WORKERS
            assert result["tokens"][str(sample_id)] == 2
        assert result["bytes are right"]
        assert result["rest is as it was"]
        assert result["on this node"]
        sizes = [SIZES[WHOLE] * WORKERS, SIZES[LARGE] * WORKERS, SIZES[HALF_GONE]]
        assert result["sent"] == sum(3 * size for size in sizes)


@pytest.mark.parametrize("sample_id", [HALF_GONE, GONE, WITHOUT])
def test_a_sample_whose_files_are_gone_goes_on_without_any(
    results: list[dict[str, Any]], sample_id: int
) -> None:
    for result in results:
        assert result["files"][str(sample_id)] == 0
        assert result["tokens"][str(sample_id)] == 0


def test_what_was_received_is_freed_when_it_is_forgotten(results: list[dict[str, Any]]) -> None:
    assert all(result["gone"] for result in results)


class LosesItsSource(NixlRelay):
    """Something happens to the source between its last offer and the read of it."""

    source_pid = 0
    signal = 0
    reads_before = 0

    def _read(self, image: Tensor, source: int, address: int, ticket: bytes) -> None:
        if self.reads_before == 0:
            os.kill(self.source_pid, self.signal)
            time.sleep(0.2)
        self.reads_before -= 1
        super()._read(image, source, address, ticket)


def lose_source(rank: int, folder: str, number: int, reads_before: int) -> None:
    """Rank 0 offers samples to rank 1, and has died or hangs when that reads the last one."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=rank, world_size=2)
    group = dist.new_group(backend="gloo")
    pid = torch.tensor([os.getpid()])
    dist.broadcast(pid, 0, group)
    path = path_of(write_bytes(b"keys and values", "kv"))
    request = GenerationRequest(0, (1, 2), 7)
    sample = PartialSample(request, (5,), (-0.5,), None, 2, (path,), 1, 0.0)
    if rank == 0:
        offering = NixlRelay(group, 1, LIMIT_S)
        for _ in range(1 + reads_before):
            offering.send(sample, 1)
        dist.recv(pid, 1, group)  # has it gone on?
        offering.forget()
        offering.send(sample, 1)
        dist.recv(pid, 1, group)
        return
    relay = LosesItsSource(group, 1, LIMIT_S)
    relay.source_pid, relay.signal, relay.reads_before = int(pid), number, reads_before
    logging.basicConfig(filename=f"{folder}/log")
    for _ in range(reads_before):
        assert relay.receive(sample, 0).kv_files
    began = time.monotonic()
    received = relay.receive(sample, 0)
    result: dict[str, Any] = {
        "files": received.kv_files,
        "tokens": received.kv_tokens,
        "seconds": time.monotonic() - began,
    }
    relay.forget()
    if number == signal.SIGSTOP:
        os.kill(relay.source_pid, signal.SIGCONT)
        time.sleep(0.5)  # the read that was given up ends
        relay.forget()
        dist.send(pid, 0, group)
        (again,) = relay.receive(sample, 0).kv_files
        result["afterwards"] = Path(again).read_text()
        relay.forget()
        dist.send(pid, 0, group)
    Path(folder, "result.json").write_text(json.dumps(result))


@needs_nixl
@pytest.mark.parametrize(
    ("number", "reads_before"),
    [(signal.SIGKILL, 0), (signal.SIGKILL, 1), (signal.SIGSTOP, 0), (signal.SIGSTOP, 1)],
)
def test_a_source_that_dies_or_hangs_costs_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, reads_before: int
) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")  # otherwise the kernel reads of one that only hangs
    context = multiprocessing.get_context("spawn")
    source, destination = (
        context.Process(target=lose_source, args=(rank, str(tmp_path), number, reads_before))
        for rank in (0, 1)
    )
    source.start()
    destination.start()
    try:
        destination.join(60)
        assert destination.exitcode == 0
    finally:
        for process in (source, destination):
            process.kill()
            process.join()
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["files"] == [] and result["tokens"] == 0
    assert result["seconds"] < LIMIT_S + 5
    assert result.get("afterwards") == ("keys and values" if number == signal.SIGSTOP else None)
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "instance 0 do not arrive, tokens are computed again" in line


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl", "nixl._bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"--rlhfuse-migration-relay nixl .* nixl-cu13 .*install"):
        NixlRelay(None, 1, LIMIT_S)  # type: ignore[arg-type]
