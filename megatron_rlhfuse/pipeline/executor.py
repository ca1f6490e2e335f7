"""Runs a program: this rank's instructions, in order, and nothing else.

It decides nothing. What runs when is the plan's business, and that it cannot deadlock was proved
when the plan was lowered.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.pipeline.clock import Clock
from megatron_rlhfuse.pipeline.errors import PipelineError
from megatron_rlhfuse.pipeline.links import Transfers
from megatron_rlhfuse.pipeline.stage import Stage
from megatron_rlhfuse.schedule.program import Instruction, Op, Program


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

    Raises PipelineError for a peer that does not answer within the time-out, or has gone.
    """
    received: list[Tensor | None] = [None] * len(stages)
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
        except RuntimeError as error:
            if op in (Op.FORWARD, Op.BACKWARD, Op.FREE):
                error.add_note(_place(position, instruction, stages[m]))
                raise
            raise _failure(
                position, instruction, stages[m], transfers[m], timeout, error
            ) from error


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


def _failure(
    position: int,
    instruction: Instruction,
    stage: Stage,
    transfers: Transfers,
    timeout: timedelta,
    error: RuntimeError,
) -> PipelineError:
    links, kind = transfers.links, instruction.kind
    sends = instruction.op in (Op.SEND, Op.RELEASE)
    peer = links.target(kind) if sends else links.source(kind)
    text = " ".join(str(error).split())
    if "imed out" in text or "timeout" in text.lower():
        reason = f"nothing came from it for {timeout.total_seconds():g} s"
    else:
        reason = f"the connection failed: {text}"
    return PipelineError(dist.get_rank(), position, _describe(instruction, stage), peer, reason)
