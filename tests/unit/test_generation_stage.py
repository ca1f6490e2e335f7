"""A rank's part of generation with a stand-in engine: what is submitted, and in which order."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlhfuse.data import Prompt
from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.rollout import stage as stage_module
from megatron_rlhfuse.rollout.prompt_rounds import DrawnPrompt, PromptBatch
from megatron_rlhfuse.rollout.samples import GenerationRequest, Sample

PROMPTS, COPIES = 4, 2


def observed(prefill_tokens: int, prefill_seconds: float) -> SimpleNamespace:
    return SimpleNamespace(
        running=0,
        step_seconds=0.0,
        step_sequences=0.0,
        prefill_tokens=prefill_tokens,
        prefill_seconds=prefill_seconds,
    )


class Engine:
    """Finishes everything at once. As the real one it counts prefill since it was started, and
    forgets what it has observed when it gets new requests."""

    def __init__(self, instance: int, *unused: object) -> None:
        self.instance = instance
        self.options = SimpleNamespace(enable_sleep=False)
        self.built = SimpleNamespace(kv_tokens=1000)
        self.submitted: list[GenerationRequest] = []
        self.prefill = (0, 0.0)
        self.observations: Any = None

    @property
    def unfinished(self) -> int:
        return len(self.submitted)

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        self.order = [request.sample_id for request in requests]
        self.submitted = list(requests)
        self.observations = None
        self.prefill = (self.prefill[0] + 10 * len(requests), self.prefill[1] + 0.5)

    def lengths(self) -> list[tuple[int, int, int]]:
        return [(request.sample_id, 1, 0) for request in self.submitted]

    def poll(self, timeout_s: float) -> list[Sample]:
        self.observations = observed(*self.prefill)
        made = [
            Sample(r.sample_id, r.prompt, (3,), (-1.0,), "stop", 1, self.instance, 0.0, 1.0)
            for r in self.submitted
        ]
        self.submitted = []
        return made

    def abort(self, sample_ids: Sequence[int]) -> None:
        self.submitted = [r for r in self.submitted if r.sample_id not in set(sample_ids)]


@pytest.fixture
def queue() -> SampleQueue:
    wait = timedelta(seconds=30)
    store = dist.TCPStore("127.0.0.1", 0, None, True, wait, wait_for_workers=False)
    return SampleQueue(store, 30.0, 1)


@pytest.fixture
def stage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[stage_module.GenerationStage, Engine, argparse.Namespace]:
    args = argparse.Namespace(
        world_size=1,
        rank=0,
        rollout_instances=1,
        seed=5,
        fuses_rollout=True,
        rollout_dispatch="longest-first",
        rlhfuse_stage_timeout=30.0,
    )
    monkeypatch.setattr(stage_module, "GenerationEngine", Engine)
    for name in ("engine_options", "sampling_options"):
        monkeypatch.setattr(stage_module, name, lambda *unused: None)
    made = stage_module.GenerationStage(args, Tracer(tmp_path, 0, enabled=False))
    engine: Any = made._engine
    return made, engine, args


def batch(trained: int = PROMPTS) -> PromptBatch:
    drawn = (DrawnPrompt(Prompt(i, (1,), "", {}), 1, i) for i in range(PROMPTS))
    return PromptBatch(tuple(drawn), COPIES, trained)


def samples_of(*prompts: int) -> list[int]:
    return [prompt * COPIES + copy for prompt in prompts for copy in range(COPIES)]


def test_reports_tell_the_prefill_of_their_iteration(stage: Any, queue: SampleQueue) -> None:
    made, engine, _ = stage
    seen = []
    for iteration in (1, 2):
        made.generate(queue, iteration, batch(), [1.0] * PROMPTS)
        (report,) = queue.board(iteration).reports([0])
        seen.append((report.prefill_tokens, report.prefill_seconds))
    assert engine.prefill == (2 * 80, 1.0)
    assert seen == [(80, 0.5), (80, 0.5)]


@pytest.mark.parametrize("fused", [False, True])
def test_the_longest_are_admitted_first(stage: Any, queue: SampleQueue, fused: bool) -> None:
    made, engine, args = stage
    args.fuses_rollout = fused
    made.generate(queue, 1, batch(), [3.0, 9.0, 1.0, 5.0])
    assert engine.order == samples_of(1, 3, 0, 2)


def test_where_the_longest_are_left_out_they_are_admitted_last(
    stage: Any, queue: SampleQueue
) -> None:
    made, engine, args = stage
    made.generate(queue, 1, batch(trained=3), [3.0, 9.0, 1.0, 5.0])
    assert engine.order == samples_of(2, 0, 3, 1)
    args.rollout_dispatch = "round-robin"
    made.generate(queue, 2, batch(trained=3), [3.0, 9.0, 1.0, 5.0])
    assert engine.order == samples_of(0, 1, 2, 3)
