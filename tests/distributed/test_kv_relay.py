"""Files of keys and values on their way from the leader of one instance to that of another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlhfuse.rollout.kv_relay import GlooRelay
from megatron_rlhfuse.rollout.memory_file import path_of, write_bytes
from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample

BLOCK = 2
"""Ranks of an instance; the leaders of two instances need three ranks."""

WORKERS = 2
"""Files of a sample."""

WHOLE, HALF_GONE, GONE, WITHOUT, LARGE = range(5)
"""Samples: the files of some are gone, as after the death of an engine; one has none."""

SIZES = {WHOLE: 3, HALF_GONE: 100, GONE: 7, WITHOUT: 1, LARGE: 5 << 20}
LOST = "/proc/self/fd/99999"


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


def check_relay() -> dict[str, Any] | None:
    """Each leader sends its samples to the other, and then takes those of the other."""
    group = dist.new_group(backend="gloo")
    if dist.get_rank() % BLOCK:
        return None
    instance = dist.get_rank() // BLOCK
    other = 1 - instance
    relay = GlooRelay(group, BLOCK)
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
        "sent": relay.bytes,
    }
    relay.forget()
    result["gone"] = not any(os.path.exists(path) for path in paths)
    relay.forget()  # idempotent
    return result


@pytest.fixture(scope="module")
def results(run_ranks: Any) -> list[dict[str, Any]]:
    """Of both leaders."""
    first, idle, second = run_ranks(check_relay, 1 + BLOCK)
    assert idle is None
    return [first, second]


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
