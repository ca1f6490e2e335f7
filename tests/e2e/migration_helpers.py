"""Pairs of real engines between which samples migrate."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlhfuse.rollout.engine import Extraction, GenerationEngine
from megatron_rlhfuse.rollout.lifetime import living_members
from megatron_rlhfuse.rollout.messages import Progress
from megatron_rlhfuse.rollout.samples import (
    GenerationRequest,
    Sample,
    SamplingOptions,
    sample_seed,
)

from .conftest import TinyModel, engine_options

PACE_S = 0.02
"""A response lasts a second or more, and an engine is observed every 12 tokens."""

MIN_TOKENS, MAX_TOKENS = 30, 72
ENDINGS = {
    "max_new_tokens": MAX_TOKENS,
    "min_new_tokens": MIN_TOKENS,
    "stop_token_ids": tuple(range(0, 256, 32)),
}
"""Samples that were just begun are all unfinished; later some end by themselves, some are cut."""

BEGUN = 8
"""Response tokens of a sample that was begun, at least."""

PROMPTS, PER_PROMPT, PROMPT_TOKENS = 4, 3, 70


@dataclass
class Pair:
    """Two engines with the same weights."""

    source: GenerationEngine
    destination: GenerationEngine
    requests: list[GenerationRequest]
    whole: list[Sample]
    """What becomes of the requests where nothing migrates."""

    @property
    def ids(self) -> list[int]:
        return [request.sample_id for request in self.requests]

    def settle(self) -> None:
        """Lets both engines give up their samples, and forget what they have computed and given."""
        for engine in (self.source, self.destination):
            engine.abort([sample_id for sample_id, _, _ in engine.lengths()])
            engine.poll(0.0)
            engine.forget_exports()
            engine.free_cache()


@contextlib.contextmanager
def running_pair(
    model: TinyModel, folder: Path, sampling: SamplingOptions, **changes: Any
) -> Iterator[Pair]:
    """Starts a pair; `changes` go to the engines' options."""
    engines = [
        GenerationEngine(
            instance,
            engine_options(
                model,
                folder / f"engine{instance}.log",
                **{"migrates": True, "pace_s": PACE_S} | changes,
            ),
            sampling,
        )
        for instance in (0, 1)
    ]
    try:
        for engine in engines:
            engine.start()
        for engine in engines:
            engine.update_weights(model.weights(1).items(), 1)
        requests = requests_of_groups()
        yield Pair(engines[0], engines[1], requests, engines[0].generate(requests))
    finally:
        for engine in engines:
            engine.close()


def entry_point(site: Path) -> Path:
    """A folder for PYTHONPATH by which workers find the plugin, installed or not."""
    info = site / "rlhfuse_entry_point-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rlhfuse-entry-point\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nrlhfuse = megatron_rlhfuse.rollout.plugin:register\n"
    )
    return site


def requests_of_groups() -> list[GenerationRequest]:
    """Several samples of each prompt, of several blocks of the KV cache."""
    return [
        GenerationRequest(
            sample_id,
            tuple((number * 31 + token * 7) % 251 for token in range(PROMPT_TOKENS - number)),
            sample_seed(3, 1, sample_id),
        )
        for sample_id in range(PROMPTS * PER_PROMPT)
        for number in [sample_id // PER_PROMPT]
    ]


def is_begun(seen: Progress) -> bool:
    """Whether a sample has a few tokens."""
    return any(length >= BEGUN for _, length in seen.unfinished)


def poll_until(
    engine: GenerationEngine, condition: Callable[[Progress], bool] = is_begun
) -> list[Sample]:
    """Waits for a state of samples submitted just now; returns those that have finished."""
    submitted = time.time()
    samples: list[Sample] = []
    while engine.unfinished:
        samples += engine.poll(0.02)
        seen = engine.observations
        if seen is not None and seen.time > submitted and condition(seen):
            return samples
    raise AssertionError("all samples ended before that")


def finish(*engines: GenerationEngine) -> list[Sample]:
    """What the engines still have to make."""
    samples: list[Sample] = []
    for engine in engines:
        while engine.unfinished:
            samples += engine.poll(1.0)
    return samples


@dataclass
class Migrated:
    samples: list[Sample]
    extraction: Extraction
    resumed: int
    """Samples that the destination went on with, and what it computed again for that."""
    recomputed_tokens: int


def migrate(pair: Pair, ids: Iterable[int], transfer: str) -> Migrated:
    """Generates the pair's requests, of which some migrate in the middle, by "kv" or "tokens"."""
    pair.settle()
    source, destination = pair.source, pair.destination
    resumed, recomputed = destination.resumed, destination.recomputed_tokens
    source.submit(pair.requests)
    samples = poll_until(source)
    leaving = set(ids)
    extraction = source.extract(leaving, leaving if transfer == "kv" else ())
    destination.submit(extraction.samples)
    samples += finish(source, destination)
    return Migrated(
        samples,
        extraction,
        destination.resumed - resumed,
        destination.recomputed_tokens - recomputed,
    )


def assert_same(samples: Iterable[Sample], whole: list[Sample]) -> None:
    """Each sample is there once and is what it is without a migration."""
    made = sorted(samples, key=lambda sample: sample.sample_id)
    assert [s.sample_id for s in made] == [s.sample_id for s in whole]
    assert [s.response for s in made] == [s.response for s in whole]
    assert [s.stop_reason for s in made] == [s.stop_reason for s in whole]
    assert [s.prompt for s in made] == [s.prompt for s in whole]
    assert {s.weight_version for s in made} == {1}
    for sample, reference in zip(made, whole, strict=True):
        # Not to the last bit: in another batch a kernel may add up in another order.
        for found, wanted in zip(sample.log_probs, reference.log_probs, strict=True):
            assert abs(found - wanted) < 1e-6


def memory_files(engine: GenerationEngine) -> int:
    """Files of keys and values that the processes of an engine hold open."""
    return sum(
        link.startswith("/memfd:rlhfuse-kv")
        for pid in living_members(engine.pid)
        for link in _open_files(pid)
    )


def _open_files(pid: int) -> Iterator[str]:
    for descriptor in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile
            yield os.readlink(f"/proc/{pid}/fd/{descriptor}")


def eventually(condition: Callable[[], bool]) -> bool:
    """Whether something comes true that an engine does without telling."""
    deadline = time.monotonic() + 20.0
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False
