"""Samples that go on in another engine become what they would have become in the first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from megatron_rlhfuse.rollout.samples import SamplingOptions

from .conftest import EOS, TinyModel
from .migration_helpers import (
    BEGUN,
    ENDINGS,
    MAX_TOKENS,
    MIN_TOKENS,
    Pair,
    assert_same,
    entry_point,
    finish,
    is_begun,
    migrate,
    poll_until,
    running_pair,
)

SMALL_CACHE = 28 * 32 * 1024
"""Bytes: 28 blocks. Some of the pair's samples lose theirs before the end, and wait for others."""


@dataclass(frozen=True)
class Case:
    sampling: SamplingOptions
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "greedy": Case(SamplingOptions(temperature=0.0, **ENDINGS)),
    "all options": Case(
        SamplingOptions(
            temperature=0.9,
            top_p=0.9,
            top_k=50,
            repetition_penalty=1.2,
            presence_penalty=0.8,
            frequency_penalty=0.6,
            **ENDINGS,
        ),
        {"kv_cache_bytes": SMALL_CACHE, "pace_s": 0.03},
    ),
    "two workers": Case(
        SamplingOptions(temperature=0.8, **ENDINGS), {"tensor_parallel_size": 2, "pace_s": 0.04}
    ),
}


@pytest.fixture(scope="module", params=CASES)
def pair(
    request: pytest.FixtureRequest,
    tiny_model: TinyModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Pair]:
    case, folder = CASES[request.param], tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(entry_point(folder / "site")))
        with running_pair(tiny_model, folder, case.sampling, **case.options) as made:
            yield made


def test_the_cases_end_in_every_way(pair: Pair) -> None:
    stops = {*ENDINGS["stop_token_ids"], EOS}
    assert {sample.stop_reason for sample in pair.whole} == {"stop", "length"}
    assert len({sample.response for sample in pair.whole}) > 1
    for sample in pair.whole:
        assert MIN_TOKENS <= len(sample.response) <= MAX_TOKENS
        assert not stops.intersection(sample.response[: MIN_TOKENS - 1])


@pytest.mark.parametrize("transfer", ["kv", "tokens"])
def test_migrated_samples_are_the_same(pair: Pair, transfer: str) -> None:
    moved = pair.ids[::2]
    migrated = migrate(pair, moved, transfer)
    assert_same(migrated.samples, pair.whole)
    assert {s.sample_id for s in migrated.samples if s.instance == 1} == set(moved)

    left = migrated.extraction.samples
    assert sorted(sample.sample_id for sample in left) == moved
    workers = pair.source.options.tensor_parallel_size
    for sample in left:
        assert BEGUN <= len(sample.response) < MAX_TOKENS
        assert len(sample.kv_files) == (workers if transfer == "kv" else 0)
        # What was there before is handed on, to the last bit.
        reference = pair.whole[sample.sample_id]
        assert sample.log_probs == reference.log_probs[: len(sample.response)]

    assert migrated.resumed == len(moved)
    if transfer == "kv":
        assert migrated.recomputed_tokens == len(moved)
        held = sum(sample.kv_tokens for sample in left)
        assert migrated.extraction.kv_bytes >= held * pair.source.built.kv_bytes_per_token
    else:
        # Prompts are computed once for all their samples, responses for each.
        assert migrated.recomputed_tokens > sum(len(sample.response) for sample in left)
        assert migrated.extraction.kv_bytes == 0


@pytest.mark.parametrize("transfers", [("kv", "kv"), ("tokens", "kv")])
def test_samples_may_migrate_there_and_back(pair: Pair, transfers: tuple[str, str]) -> None:
    pair.settle()
    there, back = transfers
    pair.source.submit(pair.requests)
    samples = poll_until(pair.source)
    first = pair.source.extract(pair.ids, pair.ids if there == "kv" else ())
    pair.destination.submit(first.samples)
    samples += poll_until(pair.destination)
    second = pair.destination.extract(pair.ids[::2], pair.ids[::2] if back == "kv" else ())
    assert second.samples
    before = {sample.sample_id: sample for sample in first.samples}
    for sample in second.samples:
        assert len(sample.response) > len(before[sample.sample_id].response)
        assert sample.started == before[sample.sample_id].started
    pair.source.submit(second.samples)
    samples += finish(pair.source, pair.destination)
    assert_same(samples, pair.whole)


@pytest.mark.parametrize("transfer", ["kv", "tokens"])
@pytest.mark.parametrize("pair", ["all options"], indirect=True)
def test_samples_that_lost_their_blocks_migrate_without(pair: Pair, transfer: str) -> None:
    pair.settle()
    pair.source.submit(pair.requests)
    samples = poll_until(pair.source, lambda seen: is_begun(seen) and seen.waiting > 0)
    left = pair.source.extract(pair.ids, pair.ids if transfer == "kv" else ()).samples
    if transfer == "kv":
        assert any(sample.response and not sample.kv_files for sample in left)
        assert any(sample.kv_files for sample in left)
    pair.destination.submit(left)
    assert_same(samples + finish(pair.source, pair.destination), pair.whole)
