"""Point-to-point transfers of one model's pipeline, for the executor.

Opposite directions must not block each other, so a model has two channels: its pipeline's own
group carries activations to the next stage, a second group gradients to the previous one. A
channel between two stages then has one direction and one sequence, which is what NCCL goes by.

Shapes are known beforehand: a hop exchanges nothing but the tensor.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.groups import Layout

ROUND_TRIPS = 5
"""Of the measurement of a transfer; the median is taken."""


@dataclass(frozen=True)
class Links:
    """The neighbours of this rank in a pipeline, and the channels to them.

    previous, next: global ranks, None at the ends
    """

    activations: dist.ProcessGroup
    gradients: dist.ProcessGroup
    previous: int | None
    next: int | None

    def source(self, kind: str) -> int | None:
        """Who sends messages of a kind, F or B, to this rank."""
        return self.previous if kind == "F" else self.next

    def target(self, kind: str) -> int | None:
        """Who gets messages of a kind from this rank."""
        return self.next if kind == "F" else self.previous

    def group(self, kind: str) -> dist.ProcessGroup:
        return self.activations if kind == "F" else self.gradients


def build_links(
    layout: Layout, pipeline_group: dist.ProcessGroup, name: str, timeout: timedelta | None
) -> Links:
    """The links of one model on this rank, connected. COLLECTIVE over all ranks of the job.

    pipeline_group: Megatron's, of this rank; it becomes the channel of activations
    """
    rank = dist.get_rank()
    found: Links | None = None
    for replica in layout.ranks:
        for part in range(layout.tp):
            pipeline = [stage[part] for stage in replica]
            gradients = dist.new_group(
                pipeline,
                timeout=timeout,
                backend=platform.backend(),
                group_desc=f"{name}.gradients",
                sort_ranks=False,
            )
            if rank in pipeline:
                stage = pipeline.index(rank)
                found = Links(
                    pipeline_group,
                    gradients,
                    pipeline[stage - 1] if stage else None,
                    pipeline[stage + 1] if stage + 1 < len(pipeline) else None,
                )
    assert found is not None, f"rank {rank} has no part of {name}"
    # NCCL makes a pair's connection in its first message, and even a receive that is only posted
    # then holds the host up until the peer comes: in the middle of a schedule, a deadlock.
    measure_transfer(found, 1, torch.float32)
    return found


def measure_transfer(links: Links, elements: int, dtype: torch.dtype) -> float:
    """Seconds that a message takes to the next stage's rank; 0 on the last stage.

    COLLECTIVE over the pipeline. Goes over every edge of it, both ways.
    """
    message = torch.zeros(elements, dtype=dtype, device=platform.device())
    seconds = 0.0
    # Edges in ascending order on every rank: the pipeline is gone through from its first stage.
    for peer, leads in ((links.previous, False), (links.next, True)):
        if peer is None:
            continue
        trips = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            if leads:
                dist.send(message, peer, group=links.activations)
                dist.recv(message, peer, group=links.gradients)
            else:
                dist.recv(message, peer, group=links.activations)
                dist.send(message, peer, group=links.gradients)
            platform.synchronize()
            trips.append((time.perf_counter() - began) / 2)
        if leads:  # the other end's clock also waits for this one to begin
            seconds = statistics.median(trips)
    return seconds


@dataclass
class Transfers:
    """The messages of one model in one step.

    shape: of the message of every micro-batch, [micro-batches]
    differentiable: received activations take a gradient
    """

    links: Links
    shapes: list[torch.Size]
    dtype: torch.dtype
    differentiable: bool
    _coming: dict[tuple[str, int], tuple[Tensor, Any]] = field(default_factory=dict)
    _going: dict[str, deque[tuple[Tensor, Any]]] = field(
        default_factory=lambda: {"F": deque(), "B": deque()}
    )

    def post(self, kind: str, micro_batch: int) -> None:
        """Begins to receive a message."""
        buffer = torch.empty(
            self.shapes[micro_batch],
            dtype=self.dtype,
            device=platform.device(),
            requires_grad=self.differentiable and kind == "F",
        )
        work = dist.irecv(
            buffer.detach(),
            src=self.links.source(kind),
            group=self.links.group(kind),
            tag=micro_batch,
        )
        self._coming[kind, micro_batch] = (buffer, work)

    def wait(self, kind: str, micro_batch: int, timeout: timedelta) -> Tensor:
        """The message, once it is here (on a GPU: for what is queued from now on)."""
        buffer, work = self._coming.pop((kind, micro_batch))
        _wait(work, timeout)
        return buffer

    def send(self, kind: str, micro_batch: int, tensor: Tensor) -> None:
        """Begins to send; holds the tensor until `release`."""
        message = tensor.detach().contiguous()
        work = dist.isend(
            message, dst=self.links.target(kind), group=self.links.group(kind), tag=micro_batch
        )
        self._going[kind].append((message, work))

    def release(self, kind: str, timeout: timedelta) -> None:
        """Waits for the oldest send of a kind, and lets its tensor go."""
        _, work = self._going[kind].popleft()
        _wait(work, timeout)


def _wait(work: Any, timeout: timedelta) -> None:
    # NCCL's wait only orders streams; a hang of the GPU shows at the step's end.
    work.wait(timeout)
