"""What the parent does about a child that dies, raises or falls silent, with a stand-in child.

Real engines die in test_engine_faults; here every moment of death is tried, in a fraction of a
second each.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_rlhfuse.rollout import child
from megatron_rlhfuse.rollout.engine import EngineError, EngineHang, EngineOptions, GenerationEngine
from megatron_rlhfuse.rollout.lifetime import living_members
from megatron_rlhfuse.rollout.samples import GenerationRequest, SamplingOptions

WEIGHTS = {"a": torch.ones(3), "b": torch.zeros(2, 2)}
REQUESTS = [GenerationRequest(number, (1, 2), 1000 + number) for number in range(10)]

MakeStub = Callable[..., GenerationEngine]


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeStub]:
    """Makes a started GenerationEngine on the stand-in: stub(plan, **options)."""
    made: list[GenerationEngine] = []
    monkeypatch.setattr(child, "PROGRAM", "stub_engine")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("STUB_STARTS", str(tmp_path / "starts"))

    def make(plan: str, **changes: Any) -> GenerationEngine:
        monkeypatch.setenv("STUB_PLAN", plan)
        values: dict[str, Any] = {
            "model": "none",
            "tensor_parallel_size": 1,
            "dtype": "float32",
            "max_model_len": 1 << 30,
            "max_num_seqs": 8,
            "kv_cache_bytes": 1,
            "gpu_memory_utilization": 0.5,
            "enforce_eager": True,
            "block_size": None,
            "seed": 0,
            "device": "cpu",
            "visible_devices": None,
            "log_file": str(tmp_path / "logs" / "engine7.log"),
            "start_timeout_s": 60.0,
            "step_timeout_s": 60.0,
            "enable_sleep": False,
        }
        engine = GenerationEngine(7, EngineOptions(**(values | changes)), SamplingOptions())
        made.append(engine)
        engine.start()
        return engine

    yield make
    for engine in made:
        engine.close()


def commands(engine: GenerationEngine) -> list[str]:
    """What all children together were told."""
    return Path(engine.options.log_file).read_text().split()


def test_death_at_any_moment_loses_and_doubles_nothing(
    stub: MakeStub, caplog: pytest.LogCaptureFixture
) -> None:
    engine = stub("start,update,submit,ok")
    with caplog.at_level(logging.WARNING):
        engine.update_weights(WEIGHTS.items(), 5)
        samples = engine.generate(REQUESTS)
    assert [sample.sample_id for sample in samples] == list(range(10))
    assert [sample.response for sample in samples] == [(1000 + number,) for number in range(10)]
    assert {sample.weight_version for sample in samples} == {5}
    assert engine.restarts == 3
    assert caplog.text.count("generation instance 7 (pid ") == 3
    assert "(3 of 3)" in caplog.text


def test_death_between_two_iterations_goes_unnoticed_by_the_next(stub: MakeStub) -> None:
    engine = stub("ok")
    engine.update_weights(WEIGHTS.items(), 1)
    engine.generate(REQUESTS)
    for disturbed_call in (
        lambda: engine.update_weights(WEIGHTS.items(), 2),
        lambda: engine.generate(REQUESTS),
    ):
        os.kill(engine.pid, signal.SIGKILL)
        time.sleep(0.2)
        disturbed_call()
        assert {sample.weight_version for sample in engine.generate(REQUESTS)} == {2}
    assert engine.restarts == 2


def test_a_crash_loop_is_reported(stub: MakeStub) -> None:
    engine = stub("start")
    message = r"instance 7 \(pid \d+\) ended by signal 9, after 3 restarts\nlast lines of .*engine7"
    with pytest.raises(EngineError, match=message):
        engine.wait_until_ready()
    with pytest.raises(EngineError, match="instance 7 does not run"):
        engine.poll(0.0)


def test_an_exception_in_the_child_is_raised_at_once(stub: MakeStub) -> None:
    engine = stub("raise")
    engine.update_weights(WEIGHTS.items(), 1)
    pid = engine.pid
    with pytest.raises(EngineError, match=r"instance 7 failed\nValueError: no such token"):
        engine.generate(REQUESTS)
    assert engine.restarts == 0
    assert living_members(pid) == []


def test_a_start_that_takes_too_long_is_a_hang(stub: MakeStub) -> None:
    engine = stub("silent", start_timeout_s=2.0)
    pid = engine.pid
    with pytest.raises(EngineHang, match=rf"\(pid {pid}\) hangs: .* although it is starting"):
        engine.wait_until_ready()
    assert living_members(pid) == []


def test_a_child_that_reads_nothing_is_a_hang(stub: MakeStub) -> None:
    engine = stub("deaf", step_timeout_s=2.0)
    with pytest.raises(EngineHang, match="although it is loading weight version 1"):
        engine.update_weights(WEIGHTS.items(), 1)

    # More than the socket holds: sending must not block for good either.
    engine = stub("ok", step_timeout_s=2.0)
    engine.update_weights(WEIGHTS.items(), 1)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineHang, match="although messages wait to be read"):
        engine.submit([GenerationRequest(0, tuple(range(1 << 20)), 0)])


def test_a_busy_parent_does_not_take_its_own_silence_for_a_hang(stub: MakeStub) -> None:
    engine = stub("ok", step_timeout_s=2.0)
    engine.update_weights(WEIGHTS.items(), 1)
    engine.submit(REQUESTS)
    time.sleep(2.5)
    assert len(engine.poll(0.0)) == len(REQUESTS)
    time.sleep(2.5)  # nothing is due
    assert engine.poll(0.0) == []


def test_samples_that_were_aborted_too_late_are_dropped(stub: MakeStub) -> None:
    engine = stub("ok")
    engine.update_weights(WEIGHTS.items(), 1)
    engine.submit(REQUESTS)
    time.sleep(0.2)  # all are on their way by now
    engine.abort(range(9))
    engine.submit(REQUESTS[:1])
    samples = []
    while engine.unfinished:
        samples += engine.poll(1.0)
    assert sorted(sample.sample_id for sample in samples) == [0, 9]


def test_refused_weights_never_reach_the_child(stub: MakeStub) -> None:
    engine = stub("ok")
    with pytest.raises(RuntimeError, match="instance 7 has no weights"):
        engine.submit(REQUESTS)
    with pytest.raises(ValueError, match="missing b"):
        engine.update_weights([("a", torch.ones(3))], 1)
    with pytest.raises(ValueError, match="a twice"):
        engine.update_weights([*WEIGHTS.items(), ("a", torch.ones(3))], 1)
    assert commands(engine) == []


def test_a_sleeping_engine_is_woken_by_weights(stub: MakeStub) -> None:
    engine = stub("ok", device="cuda", enable_sleep=True)
    engine.update_weights(WEIGHTS.items(), 1)
    engine.generate(REQUESTS)
    engine.sleep()
    for call in (
        lambda: engine.submit(REQUESTS),
        lambda: engine.update_weights(WEIGHTS.items(), 2),
    ):
        with pytest.raises(RuntimeError, match="instance 7 is asleep"):
            call()
    engine.wake()
    engine.update_weights(WEIGHTS.items(), 2)
    engine.generate(REQUESTS)
    first = ["UpdateWeights", "Submit", "Sleep", "UpdateWeights", "Submit"]
    assert commands(engine) == first
    # Without new weights the kept ones come back.
    engine.sleep()
    engine.wake()
    assert {sample.weight_version for sample in engine.generate(REQUESTS)} == {2}
    assert commands(engine) == [*first, "Sleep", "UpdateWeights", "Submit"]


def test_closing_is_orderly_and_idempotent(stub: MakeStub) -> None:
    engine = stub("ok")
    engine.update_weights(WEIGHTS.items(), 1)
    pid = engine.pid
    engine.close()
    engine.close()
    assert living_members(pid) == []
    assert commands(engine) == ["UpdateWeights", "Stop"]
