"""Which samples leave an engine, in which state, and what becomes of the memory they took."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from megatron_rlhfuse.rollout.lifetime import living_members
from megatron_rlhfuse.rollout.samples import GenerationRequest, SamplingOptions, sample_seed

from .conftest import TinyModel
from .migration_helpers import (
    ENDINGS,
    MAX_TOKENS,
    PACE_S,
    Pair,
    assert_same,
    eventually,
    finish,
    memory_files,
    migrate,
    poll_until,
    running_pair,
)

PLACES = 8
"""Fewer than the pair's requests: some wait."""


@pytest.fixture(scope="module")
def pair(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running_pair(
        tiny_model,
        tmp_path_factory.mktemp("pair"),
        SamplingOptions(temperature=0.8, top_p=0.95, **ENDINGS),
        max_num_seqs=PLACES,
    ) as made:
        yield made


@pytest.mark.parametrize("transfer", ["kv", "tokens"])
def test_all_samples_may_leave_those_that_wait_too(pair: Pair, transfer: str) -> None:
    assert len(pair.requests) > PLACES
    migrated = migrate(pair, pair.ids, transfer)
    assert_same(migrated.samples, pair.whole)
    assert {sample.instance for sample in migrated.samples} == {1}

    left = migrated.extraction.samples
    assert sorted(sample.sample_id for sample in left) == pair.ids
    waited = [sample for sample in left if not sample.response]
    assert len(waited) == len(pair.ids) - PLACES
    assert all(not sample.kv_files and sample.generator is None for sample in waited)
    assert all(sample.request == pair.requests[sample.sample_id] for sample in left)
    assert migrated.resumed == PLACES
    if transfer == "kv":
        assert migrated.recomputed_tokens == PLACES


@pytest.mark.parametrize("transfer", ["kv", "tokens"])
def test_samples_that_were_begun_may_wait_in_the_next_engine_and_leave_that_too(
    pair: Pair, transfer: str
) -> None:
    pair.settle()
    source, destination = pair.source, pair.destination
    # The destination is full of samples of its own.
    others = [
        GenerationRequest(100 + n, (n + 1,) * 40, sample_seed(3, 2, n)) for n in range(PLACES)
    ]
    destination.submit(others)
    source.submit(pair.requests)
    samples = poll_until(source)
    first = source.extract(pair.ids, pair.ids if transfer == "kv" else ())
    destination.submit(first.samples)
    second = destination.extract(pair.ids, pair.ids if transfer == "kv" else ())
    # None of them ran there.
    by_id = {sample.sample_id: sample for sample in first.samples}
    assert [by_id[sample.sample_id].response for sample in second.samples] == [
        sample.response for sample in second.samples
    ]
    destination.abort(request.sample_id for request in others)
    source.submit(second.samples)
    samples += finish(source)
    assert_same(samples, pair.whole)


def test_what_is_not_there_does_not_leave(pair: Pair) -> None:
    pair.settle()
    source = pair.source
    source.submit(pair.requests)
    samples = poll_until(source)
    assert source.extract([99]).samples == []
    while not samples:
        samples += source.poll(0.05)
    finished = {sample.sample_id for sample in samples}
    left = source.extract({*finished, 99}, {*finished, 99})
    assert (left.samples, left.kv_bytes) == ([], 0)
    samples += finish(source)
    assert_same(samples, pair.whole)
    assert source.extract(pair.ids, pair.ids).samples == []


def test_what_ends_unseen_until_it_is_to_leave_stays(pair: Pair) -> None:
    pair.settle()
    pair.source.submit(pair.requests)
    time.sleep(50 * PACE_S)  # without listening; by now some have ended, or none, or all
    left = pair.source.extract(pair.ids, pair.ids)
    pair.destination.submit(left.samples)
    samples = finish(pair.source, pair.destination)
    assert_same(samples, pair.whole)
    assert {s.sample_id for s in samples if s.instance == 1} == {
        sample.sample_id for sample in left.samples
    }


def test_samples_that_left_can_be_submitted_again_at_once(pair: Pair) -> None:
    pair.settle()
    pair.source.submit(pair.requests)
    samples = poll_until(pair.source)
    pair.source.submit(pair.source.extract(pair.ids[:4], pair.ids[:4]).samples)
    samples += finish(pair.source)
    assert_same(samples, pair.whole)


def test_files_are_held_until_they_are_read_and_until_they_are_forgotten(pair: Pair) -> None:
    pair.settle()
    source, destination = pair.source, pair.destination
    assert eventually(lambda: memory_files(source) == memory_files(destination) == 0)
    source.submit(pair.requests)
    samples = poll_until(source)
    left = source.extract(pair.ids, pair.ids)
    running = [sample for sample in left.samples if sample.kv_files]
    assert len(running) == PLACES
    assert memory_files(source) == PLACES
    destination.submit(left.samples)
    assert eventually(lambda: memory_files(destination) == PLACES)
    # The source may forget as soon as the destination has opened them.
    source.forget_exports()
    assert eventually(lambda: memory_files(source) == 0)
    samples += finish(source, destination)
    assert eventually(lambda: memory_files(destination) == 0)
    assert_same(samples, pair.whole)


def test_the_files_of_samples_that_are_given_up_are_closed(pair: Pair) -> None:
    pair.settle()
    pair.source.submit(pair.requests)
    poll_until(pair.source)
    left = pair.source.extract(pair.ids, pair.ids)
    pair.destination.submit(left.samples)
    assert eventually(lambda: memory_files(pair.destination) == PLACES)
    pair.destination.abort(pair.ids)
    assert eventually(lambda: memory_files(pair.destination) == 0)


def test_a_freed_cache_gives_its_memory_back_and_can_be_used_again(pair: Pair) -> None:
    source = pair.source
    source.free_cache()
    longest = source.options.max_model_len - MAX_TOKENS
    prompts = [tuple((n * 53 + t * (n + 3)) % 251 for t in range(longest)) for n in range(64)]
    source.submit([GenerationRequest(n, prompt, n) for n, prompt in enumerate(prompts)])
    while source.unfinished:
        # Only the prompts are of interest.
        seen = source.observations
        if seen is not None and seen.running:
            source.abort([sample_id for sample_id, length in seen.unfinished if length])
        source.poll(0.05)
    used = len(prompts) * longest * source.built.kv_bytes_per_token
    before = resident_bytes(source.pid)
    source.free_cache()
    assert eventually(lambda: resident_bytes(source.pid) < before - used / 2)
    assert_same(source.generate(pair.requests), pair.whole)


def resident_bytes(engine: int) -> int:
    """Memory of an engine's processes that is in use."""
    total = 0
    for pid in living_members(engine):
        with open(f"/proc/{pid}/status") as status:
            total += sum(int(line.split()[1]) << 10 for line in status if "VmRSS" in line)
    return total
