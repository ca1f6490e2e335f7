"""Runs a program: this rank's instructions, in order, and nothing else.

It decides nothing. What runs when is the plan's business, and that it cannot deadlock was proved
when the plan was lowered.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.clock import Clock
from megatron_rlhfuse.pipeline.errors import PipelineError
from megatron_rlhfuse.pipeline.links import Transfers
from megatron_rlhfuse.pipeline.stage import Stage
from megatron_rlhfuse.schedule.program import Instruction, Op, Program

POLL_SECONDS = 2e-4
"""Between two looks at the GPU at the end of a step."""


def execute(
    program: Program,
    stages: Sequence[Stage],
    transfers: Sequence[Transfers],
    timeout: timedelta,
    clock: Clock | None = None,
) -> None:
    """Runs the program of this rank's device, once. Every rank of the group runs its own.

    Args:
        stages, transfers: of every model, by number; stages have begun their step
        timeout: of a single wait for a peer
        clock: takes down when each forward and backward ran; None costs nothing

    Raises PipelineError for a peer that does not answer within the time-out, or has gone. What a
    forward or backward raises stays what it is, with a note on where. After an error the channels
    hold messages of a step that is lost: they are of no use any more.
    """
    received: list[Tensor | None] = [None] * len(stages)
    watch = _DeviceWatch() if platform.has_cuda() else None
    for position, instruction in enumerate(program):
        op, m, _, kind, micro_batch, _, _ = instruction
        try:
            if op is Op.FORWARD or op is Op.BACKWARD:
                if clock is not None:
                    clock.start()
                run = stages[m].forward if op is Op.FORWARD else stages[m].backward
                run(micro_batch, received[m])
                received[m] = None
                if clock is not None:
                    clock.stop(instruction)
            elif op is Op.POST:
                transfers[m].post(kind, micro_batch)
            elif op is Op.WAIT:
                received[m] = transfers[m].wait(kind, micro_batch, timeout)
            elif op is Op.SEND:
                stage = stages[m]
                message = stage.output(micro_batch) if kind == "F" else stage.gradient(micro_batch)
                transfers[m].send(kind, micro_batch, message)
            elif op is Op.FREE:
                stages[m].free_output(micro_batch)
            else:
                transfers[m].release(kind, timeout)
        except Exception as error:
            if not _blames_peer(op, error):
                error.add_note(_place(position, instruction, stages[m]))
                raise
            text = " ".join(str(error).split())
            # Gloo's words, and no others: a group's own time-out may be another one.
            timed_out = "timed out waiting" in text.lower()
            reason = _silence(op, timeout) if timed_out else f"the connection failed: {text}"
            raise _failure(position, instruction, stages[m], transfers[m], reason) from error
        if watch is not None:
            watch.mark(position, instruction)
    if watch is not None:
        stuck = watch.first_unfinished(timeout)
        if stuck is not None:
            position, instruction = stuck
            m = instruction.model
            reason = _silence(instruction.op, timeout)
            raise _failure(position, instruction, stages[m], transfers[m], reason)


class _DeviceWatch:
    """Where the GPU stands in a program: there a wait holds up the stream, not the host.

    Instructions leave an event behind; events keep no tensor alive, as NCCL's works would.
    """

    def __init__(self) -> None:
        self._marks: list[tuple[int, Instruction, Any]] = []

    def mark(self, position: int, instruction: Instruction) -> None:
        if instruction.op in (Op.WAIT, Op.FORWARD, Op.BACKWARD, Op.RELEASE):
            event = torch.cuda.Event()
            event.record()
            self._marks.append((position, instruction, event))

    def first_unfinished(self, timeout: timedelta) -> tuple[int, Instruction] | None:
        """Waits for the GPU; the first instruction that it does not get over within `timeout`."""
        for position, instruction, event in self._marks:
            began = time.monotonic()
            while not event.query():
                if time.monotonic() - began > timeout.total_seconds():
                    return position, instruction
                time.sleep(POLL_SECONDS)
        return None


def _blames_peer(op: Op, error: Exception) -> bool:
    if op in (Op.FORWARD, Op.BACKWARD, Op.FREE) or isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, RuntimeError)  # torch.distributed raises nothing else


def _place(position: int, instruction: Instruction, stage: Stage) -> str:
    return (
        f"in instruction {position} of the fused pipeline on rank {dist.get_rank()}: "
        f"{_describe(instruction, stage)}"
    )


def _describe(instruction: Instruction, stage: Stage) -> str:
    return (
        f"{instruction.op.name} {instruction.token}: {stage.name}, stage {stage.number}, "
        f"micro-batch {instruction.micro_batch}"
    )


def _silence(op: Op, timeout: timedelta) -> str:
    """What a time-out of an instruction means."""
    seconds = f"{timeout.total_seconds():g} s"
    if op in (Op.FORWARD, Op.BACKWARD):
        return f"the GPU did not get over it in {seconds}"
    if op in (Op.SEND, Op.RELEASE):
        return f"it took nothing for {seconds}"
    return f"nothing came from it for {seconds}"


def _failure(
    position: int, instruction: Instruction, stage: Stage, transfers: Transfers, reason: str
) -> PipelineError:
    links, kind = transfers.links, instruction.kind
    channel = None
    if instruction.op not in (Op.FORWARD, Op.BACKWARD):
        sends = instruction.op in (Op.SEND, Op.RELEASE)
        channel = links.targets[kind] if sends else links.sources[kind]
    peer = channel.peer if channel is not None else None
    return PipelineError(dist.get_rank(), position, _describe(instruction, stage), peer, reason)
