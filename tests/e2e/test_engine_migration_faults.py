"""Engines killed, and files lost, while samples migrate: each arrives once, and is the same."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from safetensors import safe_open

from megatron_rlhfuse.rollout import supervisor
from megatron_rlhfuse.rollout.engine import GenerationEngine
from megatron_rlhfuse.rollout.lifetime import living_members
from megatron_rlhfuse.rollout.memory_file import path_of, write_bytes, write_tensors
from megatron_rlhfuse.rollout.samples import PartialSample, Sample, SamplingOptions

from .conftest import TinyModel
from .migration_helpers import (
    ENDINGS,
    PER_PROMPT,
    PROMPTS,
    Pair,
    assert_same,
    eventually,
    finish,
    memory_files,
    poll_until,
    running_pair,
)

PLACES = PROMPTS * PER_PROMPT
"""As many as the pair's requests."""


@pytest.fixture(scope="module")
def mortal_pair(tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Engines to be killed; they are started again as often as that takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(supervisor, "MAX_RESTARTS", 100)
        sampling = SamplingOptions(temperature=0.8, **ENDINGS)
        folder = tmp_path_factory.mktemp("pair")
        with running_pair(tiny_model, folder, sampling, max_num_seqs=PLACES) as made:
            yield made


@pytest.fixture
def pair(mortal_pair: Pair) -> Pair:
    mortal_pair.settle()
    return mortal_pair


def kill(engine: GenerationEngine) -> None:
    """Kills an engine's process and waits until its files are gone."""
    pid = engine.pid
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: living_members(pid) == [])


def kill_during(engine: GenerationEngine, call: Callable[[], object]) -> None:
    """Kills an engine that was told something and has not done it."""
    os.kill(engine.pid, signal.SIGSTOP)
    killer = threading.Timer(0.5, os.kill, (engine.pid, signal.SIGKILL))
    killer.start()
    call()
    killer.join()


def begin(pair: Pair) -> list[Sample]:
    """Submits the pair's requests to the source; nothing has ended when it returns."""
    pair.source.submit(pair.requests)
    samples = poll_until(pair.source)
    assert samples == []
    return samples


def extract_all(pair: Pair) -> list[PartialSample]:
    """All of the pair's samples, begun by the source, with their keys and values."""
    begin(pair)
    samples = pair.source.extract(pair.ids, pair.ids).samples
    assert [len(sample.kv_files) for sample in samples] == [1] * len(pair.ids)
    return samples


def go_on(pair: Pair, samples: Sequence[PartialSample]) -> int:
    """Finishes samples in the destination, and checks them; returns the tokens computed again."""
    before = pair.destination.resumed, pair.destination.recomputed_tokens
    pair.destination.submit(samples)
    assert_same(finish(pair.source, pair.destination), pair.whole)
    assert pair.destination.resumed - before[0] == len(samples)
    return pair.destination.recomputed_tokens - before[1]


@pytest.mark.parametrize("moment", ["before", "during"])
def test_killed_before_it_gave_samples_away_they_begin_anew(pair: Pair, moment: str) -> None:
    begin(pair)
    moved = pair.ids[::2]
    left: list[PartialSample] = []

    def extract() -> None:
        left.extend(pair.source.extract(moved, moved).samples)

    if moment == "before":
        kill(pair.source)
        extract()
    else:
        kill_during(pair.source, extract)
    assert sorted(sample.sample_id for sample in left) == moved
    assert all(sample.response == () and not sample.kv_files for sample in left)
    pair.destination.submit(left)
    samples = finish(pair.source, pair.destination)
    assert_same(samples, pair.whole)
    assert {s.sample_id for s in samples if s.instance == 1} == set(moved)


def test_killed_after_it_gave_samples_away_they_go_on_from_their_tokens(pair: Pair) -> None:
    left = extract_all(pair)
    kill(pair.source)
    assert go_on(pair, left) > sum(len(sample.response) for sample in left)


def test_killed_once_its_files_were_opened_they_are_still_read(pair: Pair) -> None:
    left, destination = extract_all(pair), pair.destination
    # The destination is full, so that it has opened the files and not read them.
    others = [replace(each, sample_id=100 + each.sample_id) for each in pair.requests]
    destination.submit(others)
    destination.submit(left)
    assert eventually(lambda: memory_files(destination) == len(left))
    os.kill(destination.pid, signal.SIGSTOP)
    kill(pair.source)
    destination.abort(request.sample_id for request in others)
    os.kill(destination.pid, signal.SIGCONT)
    before = destination.recomputed_tokens
    samples = [sample for sample in finish(destination) if sample.sample_id < 100]
    assert_same(samples, pair.whole)
    assert destination.recomputed_tokens - before == len(left)


@pytest.mark.parametrize("moment", ["before", "during"])
def test_a_new_destination_is_given_the_same_samples_and_files(pair: Pair, moment: str) -> None:
    left = extract_all(pair)
    before = pair.destination.recomputed_tokens
    if moment == "before":
        kill(pair.destination)
        pair.destination.submit(left)
    else:
        kill_during(pair.destination, partial(pair.destination.submit, left))
    assert_same(finish(pair.destination), pair.whole)
    assert pair.destination.recomputed_tokens - before == len(left)


def test_both_may_die_after_the_samples_went_on(pair: Pair) -> None:
    left = extract_all(pair)
    pair.destination.submit(left)
    samples = poll_until(pair.destination)
    kill(pair.source)
    kill(pair.destination)
    assert_same(samples + finish(pair.destination), pair.whole)


def test_a_dead_engine_with_nothing_to_give_gives_nothing(pair: Pair) -> None:
    kill(pair.source)
    assert pair.source.extract([99], [99]).samples == []


def with_file(sample: PartialSample, path: str) -> PartialSample:
    return replace(sample, kv_files=(path,))


@pytest.fixture
def kept_files() -> Iterator[list[int]]:
    """Descriptors that are closed at the end."""
    descriptors: list[int] = []
    yield descriptors
    for descriptor in descriptors:
        os.close(descriptor)


@pytest.mark.parametrize("fault", ["missing", "empty", "half", "header only"])
def test_unusable_files_are_left_out(pair: Pair, fault: str, kept_files: list[int]) -> None:
    left = extract_all(pair)
    with open(left[0].kv_files[0], "rb") as file:
        image = file.read()
    if fault == "missing":
        path = f"{left[0].kv_files[0]}999"
    else:
        size = {"empty": 0, "half": len(image) // 2, "header only": 100}[fault]
        kept_files.append(write_bytes(image[:size], "kv"))
        path = path_of(kept_files[0])
    # Two samples of one prompt; the others go on from their files.
    assert left[0].request.prompt == left[1].request.prompt
    samples = [with_file(left[0], path), with_file(left[1], path), *left[2:]]
    recomputed = go_on(pair, samples)
    assert recomputed > len(left)
    log = Path(pair.destination.options.log_file).read_text()
    assert f"sample {left[1].sample_id}: its keys and values cannot be read" in log


def test_a_file_of_too_few_blocks_is_not_used(pair: Pair, kept_files: list[int]) -> None:
    left = extract_all(pair)
    with safe_open(left[0].kv_files[0], framework="pt") as file:
        layers = [(name, file.get_tensor(name)) for name in file.keys()]  # noqa: SIM118
    # An image that can be opened, and holds too few blocks.
    blocks = -(-left[0].kv_tokens // pair.source.options.block_size)
    axis = list(layers[0][1].shape).index(blocks)
    short = [(name, layer.narrow(axis, 0, 1).contiguous()) for name, layer in layers]
    kept_files.append(write_tensors(short, "kv"))
    pair.destination.submit([with_file(left[0], path_of(kept_files[0])), *left[1:]])
    samples = sorted(finish(pair.destination), key=lambda sample: sample.sample_id)
    assert_same(samples, pair.whole)
