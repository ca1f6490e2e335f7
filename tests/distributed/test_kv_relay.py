"""Files of keys and values on their way from the leader of one instance to that of another."""

from __future__ import annotations

import importlib.util
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.rollout import nixl_relay
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


def mapped() -> int:
    """Memory files that this process has mapped: a relay does so with those that it sends."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return len({line.split()[4] for line in lines if "memfd:rlhfuse-kv" in line})


def make_relay(kind: str, group: dist.ProcessGroup, block: int) -> GlooRelay:
    return NixlRelay(group, block, 30) if kind == "nixl" else GlooRelay(group, block)


def check_relay(kind: str) -> list[dict[str, Any]] | None:
    """Each leader sends samples to the other and takes those of the other, twice."""
    group = dist.new_group(backend="gloo")
    results = None
    if dist.get_rank() % BLOCK == 0:
        relay = make_relay(kind, group, BLOCK)
        results = [exchange(relay, dist.get_rank() // BLOCK) for _ in range(ROUNDS)]
    dist.barrier()  # as in a job: nobody ends before all have forgotten
    return results


def exchange(relay: GlooRelay, instance: int) -> dict[str, Any]:
    other = 1 - instance
    already = relay.bytes
    samples = list(make_samples(instance))
    received = []
    for some in (samples[:2], samples[2:]):  # the second time there are answers on the way
        for each in some:
            if each.kv_files:  # as Member does
                relay.send(each, other)
        received += [relay.receive(each, other) if each.kv_files else each for each in some]
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
        "mapped": mapped(),
    }
    relay.forget()  # the other may still be reading
    result["mapped afterwards"] = mapped()
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


def test_what_was_sent_is_freed_when_it_is_forgotten(results: list[dict[str, Any]]) -> None:
    for result in results:
        assert result["mapped"] == 2 * WORKERS + 1  # the whole samples, and a half
        assert result["mapped afterwards"] == 0


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


class AnswersWhenAsked:
    """NIXL without a thread: what reads from this rank waits for `getNotifs`."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("nixl._bindings"), name)

    def nixlAgent(self, name: str, config: Any) -> Any:  # noqa: N802
        config.useProgThread = False
        return self.__getattr__("nixlAgent")(name, config)


LATE = bytes(range(256)) * 4096


def two_files(*files: bytes) -> PartialSample:
    paths = tuple(path_of(write_bytes(file, "kv")) for file in files)
    return PartialSample(GenerationRequest(0, (1, 2), 7), (5,), (-0.5,), b"\1", 2, paths, 1, 0.0)


def check_late_read() -> dict[str, Any]:
    """Rank 0 forgets a file that rank 1 has given up, and only then lets it be read."""
    group, rank = dist.new_group(backend="gloo"), dist.get_rank()
    word = torch.zeros(1)
    sample = two_files(LATE, b"never asked for")
    if rank == 1:
        relay = NixlRelay(group, 1, LIMIT_S / 4)
        files = relay.receive(sample, 0).kv_files
        *_, image, request = relay._unfinished[0]
        relay.forget()
        dist.recv(word, 0)  # it has forgotten
        has_ended = relay._has_ended(0)
        dist.send(word, 0)
        while not relay._has_ended(0):
            time.sleep(0.01)
        status = relay._agent.getXferStatus(request)
        dist.send(word, 0)
        return {
            "files": files,
            "ended before": has_ended,
            "success": status == relay._nixl.NIXL_SUCCESS,
            "bytes are right": image.numpy().tobytes() == LATE,
        }
    nixl_relay._import_nixl = AnswersWhenAsked
    relay = NixlRelay(group, 1, LIMIT_S)
    relay.send(sample, 1)
    offered = mapped()
    relay.forget()
    held = mapped()
    dist.send(word, 1)
    dist.recv(word, 1)
    has_ended = dist.irecv(word, 1)
    assert has_ended is not None
    waiter = threading.Thread(target=has_ended.wait)
    waiter.start()
    while waiter.is_alive():
        relay._agent.getNotifs({}, relay._backends)
    relay.forget()
    return {"offered": offered, "held": held, "held to the end": mapped()}


@needs_nixl
def test_a_file_that_was_given_up_can_be_read_after_its_source_forgets(run_ranks: Any) -> None:
    # Over shared memory the kernel reads, and no source can be late.
    source, destination = run_ranks(check_late_read, 2, env={"UCX_TLS": "tcp"})
    assert destination == {
        "files": [],
        "ended before": False,
        "success": True,
        "bytes are right": True,
    }
    # One of the two files was asked for.
    assert source == {"offered": 2, "held": 1, "held to the end": 1}


class Refuses:
    """NIXL's agent, with one function that raises."""

    def __init__(self, agent: Any, name: str) -> None:
        self._agent, self._name = agent, name

    def __getattr__(self, name: str) -> Any:
        return self._refuse if name == self._name else getattr(self._agent, name)

    def _refuse(self, *_: Any) -> None:
        raise RuntimeError(f"{self._name} is refused")


SOURCE, DESTINATION = range(2)

REFUSALS = {
    # who, what: files that arrive, files that the source keeps, images that the destination keeps
    (SOURCE, "registerMem"): (0, 0, 0),
    (SOURCE, "getLocalPartialMD"): (0, 0, 0),
    (SOURCE, "deregisterMem"): (2, 2, 0),
    (DESTINATION, "registerMem"): (0, 0, 0),
    (DESTINATION, "createXferReq"): (0, 0, 0),
    (DESTINATION, "postXferReq"): (0, 1, 0),  # perhaps it was posted
    (DESTINATION, "releaseXferReq"): (2, 0, 2),
    (DESTINATION, "deregisterMem"): (2, 0, 2),
    (DESTINATION, "invalidateRemoteMD"): (2, 0, 0),
}


def check_refusals() -> list[dict[str, Any]]:
    """Rank 0 gives samples to rank 1; every refusal is followed by an iteration without one."""
    relay = NixlRelay(dist.new_group(backend="gloo"), 1, LIMIT_S)
    agent, rank = relay._agent, dist.get_rank()
    log: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: log.append(record.getMessage())  # type: ignore[method-assign]
    nixl_relay.logger.addHandler(handler)

    def iterate() -> dict[str, Any]:
        log.clear()
        before = mapped(), len(relay._kept)
        files = (b"keys", b"values")
        arrived = []
        if rank == SOURCE:
            relay.send(two_files(*files), DESTINATION)
        else:
            paths = relay.receive(two_files(*files), SOURCE).kv_files
            arrived = [Path(path).read_text() for path in paths]
        relay.forget()
        after = mapped(), len(relay._kept)
        return {
            "arrived": arrived,
            "mapped": after[0] - before[0],
            "kept": after[1] - before[1],
            "answers": sum(map(len, relay._answers.values())),
            "log": list(log),
        }

    results = []
    for who, name in REFUSALS:
        relay._agent = Refuses(agent, name) if who == rank else agent
        results.append(iterate())
        relay._agent = agent
        results[-1]["afterwards"] = iterate()
    dist.barrier()
    return results


@pytest.fixture(scope="module")
def refusals(run_ranks: Any) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Of source and destination."""
    return dict(zip(REFUSALS, zip(*run_ranks(check_refusals, 2), strict=True), strict=True))


@needs_nixl
@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_errors_of_nixl_are_logged_and_free_nothing_that_is_in_use(
    refusals: dict[tuple[int, str], list[dict[str, Any]]], refusal: tuple[int, str]
) -> None:
    who, name = refusal
    arrived, kept_by_source, kept_by_destination = REFUSALS[refusal]
    source, destination = refusals[refusal]
    assert destination["arrived"] == ["keys", "values"][:arrived]
    assert source["mapped"] == source["kept"] == kept_by_source
    assert destination["kept"] == kept_by_destination
    assert any(f"{name} is refused" in line for line in (source, destination)[who]["log"])
    for rank in (source, destination):
        assert rank["afterwards"]["kept"] == rank["afterwards"]["mapped"] == 0
        assert rank["afterwards"]["log"] == []
        assert rank["answers"] <= WORKERS  # those of this iteration
    assert destination["afterwards"]["arrived"] == ["keys", "values"]


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl", "nixl._bindings"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"--rlhfuse-migration-relay nixl .* nixl-cu13 .*install"):
        NixlRelay(None, 1, LIMIT_S)  # type: ignore[arg-type]
