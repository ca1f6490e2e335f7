"""What a program's instructions ask of stages and channels, and whose fault an error is."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.errors import PipelineError
from megatron_rlhfuse.pipeline.executor import execute
from megatron_rlhfuse.pipeline.links import Channel, Links
from megatron_rlhfuse.schedule.program import Instruction, Op, Program

RANK = 5
GROUP: Any = None
LINKS = Links(
    sources={"F": Channel(GROUP, 4, 0), "B": Channel(GROUP, 6, 0)},
    targets={"F": Channel(GROUP, 6, 1), "B": Channel(GROUP, 4, 1)},
    edges=2,
    timeout=timedelta(seconds=9),
)
TIMEOUT = timedelta(seconds=0.05)

# The middle stage of a pipeline, one micro-batch.
PROGRAM: Program = [
    Instruction(Op.POST, 0, 0, "F", 0, 1, 0),
    Instruction(Op.POST, 0, 0, "B", 0, 1, 2),
    Instruction(Op.WAIT, 0, 0, "F", 0, 1, 0),
    Instruction(Op.FORWARD, 0, 0, "F", 0, 1),
    Instruction(Op.SEND, 0, 0, "F", 0, 1, 2),
    Instruction(Op.FREE, 0, 0, "F", 0, 1),
    Instruction(Op.WAIT, 0, 0, "B", 0, 1, 2),
    Instruction(Op.RELEASE, 0, 0, "F", 0, 1, 2),
    Instruction(Op.BACKWARD, 0, 0, "B", 0, 1),
    Instruction(Op.SEND, 0, 0, "B", 0, 1, 0),
    Instruction(Op.RELEASE, 0, 0, "B", 0, 1, 0),
]
PEERS = [4, 6, 4, None, 6, None, 6, 6, None, 4, 4]
COMPUTE = [3, 5, 8]
TRANSFERS = [i for i in range(len(PROGRAM)) if i not in COMPUTE]
ON_THE_GPU = [2, 3, 6, 7, 8, 10]
"""Positions that can hold up a GPU's stream."""


class Recorder:
    """Stands for a stage and its channels; writes calls down, and fails at one of them."""

    name, number, links = "actor", 1, LINKS

    def __init__(self, fails_at: int | None = None, error: Exception | None = None) -> None:
        self.calls: list[str] = []
        self._fails_at, self._error = fails_at, error

    def _do(self, call: str) -> str:
        if len(self.calls) == self._fails_at and self._error is not None:
            raise self._error
        self.calls.append(call)
        return call

    def post(self, kind: str, micro_batch: int) -> None:
        self._do(f"post {kind}")

    def wait(self, kind: str, micro_batch: int, timeout: timedelta) -> str:
        assert timeout == TIMEOUT
        return self._do(f"wait {kind}")

    def send(self, kind: str, micro_batch: int, tensor: str) -> None:
        self._do(f"send {tensor}")

    def release(self, kind: str, timeout: timedelta) -> None:
        assert timeout == TIMEOUT
        self._do(f"release {kind}")

    def forward(self, micro_batch: int, received: str) -> None:
        self._do(f"forward of {received}")

    def backward(self, micro_batch: int, received: str) -> None:
        self._do(f"backward of {received}")

    def output(self, micro_batch: int) -> str:
        return "output"

    def gradient(self, micro_batch: int) -> str:
        return "gradient"

    def free_output(self, micro_batch: int) -> None:
        self._do("free")


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_rank", lambda: RANK)


def run(recorder: Any) -> None:
    execute(PROGRAM, [recorder], [recorder], TIMEOUT)


def test_instructions_run_in_order_and_compute_gets_what_was_waited_for() -> None:
    recorder = Recorder()
    run(recorder)
    assert recorder.calls == [
        "post F",
        "post B",
        "wait F",
        "forward of wait F",
        "send output",
        "free",
        "wait B",
        "release F",
        "backward of wait B",
        "send gradient",
        "release B",
    ]


@pytest.mark.parametrize("position", COMPUTE)
@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError, StopIteration])
def test_an_error_of_the_model_stays_what_it_is(position: int, kind: type[Exception]) -> None:
    error = kind("Timed out waiting for something else")
    with pytest.raises(kind) as caught:
        run(Recorder(position, error))
    assert caught.value is error
    (note,) = error.__notes__
    assert f"instruction {position} of the fused pipeline on rank {RANK}" in note
    assert f"{PROGRAM[position].op.name} a0" in note and "actor, stage 1, micro-batch 0" in note


@pytest.mark.parametrize("position", TRANSFERS)
def test_an_error_of_a_channel_names_place_and_peer(position: int) -> None:
    error = RuntimeError("Connection closed\nby peer")
    with pytest.raises(PipelineError) as caught:
        run(Recorder(position, error))
    found = caught.value
    assert (found.rank, found.position, found.peer) == (RANK, position, PEERS[position])
    assert found.instruction.startswith(f"{PROGRAM[position].op.name} {PROGRAM[position].token}:")
    assert str(found).endswith("the connection failed: Connection closed by peer")
    assert found.__cause__ is error


def test_a_time_out_says_who_is_silent() -> None:
    error = RuntimeError("[buffer.cc:78] Timed out waiting 50ms for recv operation to complete")
    with pytest.raises(PipelineError, match=r"rank 4 at the other end.*nothing came from it"):
        run(Recorder(2, error))
    with pytest.raises(PipelineError, match=r"rank 6 at the other end.*it took nothing for 0\.05"):
        run(Recorder(7, error))


def test_a_pair_that_was_given_up_before_is_no_time_out() -> None:
    error = RuntimeError("Application timeout caused pair closure")
    with pytest.raises(PipelineError, match="the connection failed: Application timeout"):
        run(Recorder(0, error))


def test_too_little_memory_is_no_fault_of_the_peer() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError) as caught:
        run(Recorder(0, error))
    assert "POST a0F0" in caught.value.__notes__[0]


# ---------------------------------------------------------------- a GPU, where waits do not block


class Event:
    """Stands for torch.cuda.Event: from the `stuck`th one on none is reached."""

    made: list[Event]
    stuck: int | None
    looks_until_done = 3

    def __init__(self) -> None:
        self.recorded = False
        self.number = len(Event.made)
        self.looks = 0
        Event.made.append(self)

    def record(self) -> None:
        self.recorded = True

    def query(self) -> bool:
        assert self.recorded
        self.looks += 1
        done = self.looks >= self.looks_until_done
        return done and (Event.stuck is None or self.number < Event.stuck)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    Event.made, Event.stuck = [], None
    monkeypatch.setattr(platform, "has_cuda", lambda: True)
    monkeypatch.setattr(torch.cuda, "Event", Event)


def test_a_step_waits_for_the_gpu(gpu: None) -> None:
    run(Recorder())
    assert len(Event.made) == len(ON_THE_GPU)
    assert all(event.looks == Event.looks_until_done for event in Event.made)


@pytest.mark.parametrize("number", range(len(ON_THE_GPU)))
def test_a_gpu_that_stands_still_names_the_first_instruction_it_is_stuck_at(
    gpu: None, number: int
) -> None:
    Event.stuck = number
    recorder = Recorder()
    with pytest.raises(PipelineError) as caught:
        run(recorder)
    position = ON_THE_GPU[number]
    assert len(recorder.calls) == len(PROGRAM)  # the host had gone through all of it
    assert (caught.value.position, caught.value.peer) == (position, PEERS[position])
    said = {
        Op.WAIT: "nothing came from it for",
        Op.RELEASE: "it took nothing for",
        Op.FORWARD: "the GPU did not get over it in",
        Op.BACKWARD: "the GPU did not get over it in",
    }
    assert said[PROGRAM[position].op] in str(caught.value)


def test_without_a_gpu_no_event_is_made(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "has_cuda", lambda: False)
    run(Recorder())
    assert Event.made == []


class Work:
    """Stands for a transfer of torch.distributed."""

    def __init__(self) -> None:
        self.waits: list[tuple[Any, ...]] = []

    def wait(self, *timeout: timedelta) -> None:
        self.waits.append(timeout)


@pytest.mark.parametrize(("has_cuda", "waits"), [(True, [()]), (False, [(TIMEOUT,)])])
def test_a_wait_on_a_gpu_has_no_time_out(
    monkeypatch: pytest.MonkeyPatch, has_cuda: bool, waits: list[tuple[Any, ...]]
) -> None:
    # With one NCCL's work would hold the host up until the transfer is over.
    monkeypatch.setattr(platform, "has_cuda", lambda: has_cuda)
    work = Work()
    platform.wait_for(work, TIMEOUT)
    assert work.waits == waits
