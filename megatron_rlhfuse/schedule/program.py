"""What a rank executes: instructions, in the words of a plan.

A program is the list of instructions of a device; all ranks of the device run it, each with peers
of its own.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from megatron_rlhfuse.schedule.problem import LETTERS


class Op(IntEnum):
    """What an instruction does."""

    POST = 0
    """Begin to receive into a new buffer."""
    WAIT = 1
    """Until a posted receive is done."""
    FORWARD = 2
    BACKWARD = 3
    SEND = 4
    """Begin to send what the subtask before made."""
    FREE = 5
    """Drop a stage's output: its graph lives on for the backward, its data was handed over."""
    RELEASE = 6
    """Until a send is done; its tensor may go."""


class Instruction(NamedTuple):
    """One step of a device's program.

    `kind` is that of the subtask which makes the message: F for activations, B for gradients.
    `stage` is the stage of this device. `peer` is the device at the other end, -1 for compute.
    """

    op: Op
    model: int
    pipeline: int
    kind: str
    micro_batch: int
    stage: int
    peer: int = -1

    @property
    def token(self) -> str:
        return f"{LETTERS[self.model]}{self.pipeline}{self.kind}{self.micro_batch}"

    def __str__(self) -> str:
        place = f" device {self.peer}" if self.peer >= 0 else ""
        return f"{self.op.name} {self.token}{place}"


Program = list[Instruction]
"""The instructions of one device, in the order of execution."""


Message = tuple[int, ...]
"""Sender, receiver, model, pipeline, 1 for activations or 0 for gradients, micro-batch."""


def message_of(device: int, instruction: Instruction) -> Message:
    """What both ends of a transfer call it; its last entry counts along the channel."""
    op, model, pipeline, kind, micro_batch, _, peer = instruction
    ends = (device, peer) if op in (Op.SEND, Op.RELEASE) else (peer, device)
    return (*ends, model, pipeline, int(kind == "F"), micro_batch)
