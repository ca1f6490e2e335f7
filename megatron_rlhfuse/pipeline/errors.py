"""What can go wrong in a fused step, each named with its place."""

from __future__ import annotations


class PipelineError(RuntimeError):
    """A rank stands still, or a peer has gone.

    Attributes:
        rank: the rank that reports
        position: of the instruction in its program
        instruction: as text, such as `WAIT a0F3`
        peer: global rank at the other end, None for none
    """

    def __init__(
        self, rank: int, position: int, instruction: str, peer: int | None, reason: str
    ) -> None:
        other = "" if peer is None else f", rank {peer} at the other end"
        super().__init__(f"rank {rank}, instruction {position} ({instruction}{other}): {reason}")
        self.rank = rank
        self.position = position
        self.instruction = instruction
        self.peer = peer


class PlanMismatchError(ValueError):
    """A plan that was made for other models, or for another layout of them."""
