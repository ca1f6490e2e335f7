"""What torch says of this machine.

Asked in a process of its own: a torch that is broken, or a driver that hangs, becomes a line of
the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_rlhfuse.doctor import child

TIMEOUT_S = 180.0
"""Torch's libraries come over a network file system on many clusters."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch drives; memory in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int
    free_memory: int


@dataclass(frozen=True)
class TorchFacts:
    """What a build of torch is made for, and what it finds.

    Attributes:
        cuda: the CUDA release of the build; None for a build without
        architectures: GPUs that the build has code for: "sm_90"
        nccl: the version of NCCL that is linked; None without it
        has_nccl: `torch.distributed.is_nccl_available()`
        gpus: that torch drives
        fault: why it drives none, in torch's words; empty where it does or has no CUDA
    """

    cuda: str | None
    architectures: tuple[str, ...]
    nccl: str | None
    has_nccl: bool
    gpus: tuple[Gpu, ...]
    fault: str


def from_json(data: dict[str, Any]) -> TorchFacts:
    """The inverse of `dataclasses.asdict` and JSON."""
    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in data["gpus"])
    return TorchFacts(**{**data, "architectures": tuple(data["architectures"]), "gpus": gpus})


def ask() -> tuple[TorchFacts | None, str]:
    """The facts, or None and the last line of what went wrong."""
    outcome = child.run("facts", TIMEOUT_S)
    if outcome.error:
        return None, outcome.error
    return from_json(outcome.found), ""
