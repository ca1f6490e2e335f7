"""Point-to-point transfers of one model's pipeline, for the executor.

A channel between two stages has one direction, one sequence and a group of its own, of these two
ranks. In a larger group, or one for both directions, NCCL may put a receive that waits for one peer
before a send to another; two pipelines in opposite directions would then wait for each other.

Shapes are known beforehand: a hop exchanges nothing but the tensor.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.groups import Layout

ROUND_TRIPS = 5
"""Of the measurement of a transfer; the median is taken."""


@dataclass(frozen=True)
class Channel:
    """One direction between this rank and a neighbour.

    peer: global rank of the neighbour
    position: its rank in `group`
    """

    group: dist.ProcessGroup
    peer: int
    position: int


@dataclass(frozen=True)
class Links:
    """The channels of this rank in a pipeline, by kind of message: F activations, B gradients.

    sources: where messages come from; targets: where they go; None at the pipeline's ends
    """

    sources: Mapping[str, Channel | None]
    targets: Mapping[str, Channel | None]


def build_links(layout: Layout, name: str, timeout: timedelta) -> Links:
    """The links of one model on this rank, connected. COLLECTIVE over all ranks of the job.

    timeout: of the groups; where the host does not wait for transfers, NCCL's own watchdog ends
        the process after it
    """
    rank = dist.get_rank()
    ends: dict[str, dict[str, Channel | None]] = {
        "sources": {"F": None, "B": None},
        "targets": {"F": None, "B": None},
    }
    for replica in layout.ranks:
        for part in range(layout.tp):
            for earlier, later in pairwise(stage[part] for stage in replica):
                for kind, (sender, receiver) in (
                    ("F", (earlier, later)),
                    ("B", (later, earlier)),
                ):
                    group = dist.new_group(
                        [sender, receiver],
                        timeout=timeout,
                        backend=platform.backend(),
                        group_desc=f"{name}.{kind}",
                        sort_ranks=False,
                    )
                    if rank == sender:
                        ends["targets"][kind] = Channel(group, receiver, 1)
                    elif rank == receiver:
                        ends["sources"][kind] = Channel(group, sender, 0)
    links = Links(ends["sources"], ends["targets"])
    # NCCL makes a pair's connection in its first message, and even a receive that is only posted
    # then holds the host up until the peer comes: in the middle of a schedule, a deadlock.
    measure_transfer(links, 1, torch.float32)
    return links


def measure_transfer(links: Links, elements: int, dtype: torch.dtype) -> float:
    """Seconds that a message takes to the next stage's rank; 0 on the last stage.

    COLLECTIVE over the pipeline. Goes over every edge of it, both ways.
    """
    message = torch.zeros(elements, dtype=dtype, device=platform.device())
    seconds = 0.0
    # Edges in ascending order on every rank: the pipeline is gone through from its first stage.
    edges = (
        (links.sources["F"], links.targets["B"], False),
        (links.sources["B"], links.targets["F"], True),
    )
    for source, target, leads in edges:
        if source is None or target is None:
            continue
        trips = []
        for _ in range(ROUND_TRIPS):
            began = time.perf_counter()
            if leads:
                target.group.send([message], target.position, 0).wait()
            source.group.recv([message], source.position, 0).wait()
            if not leads:
                target.group.send([message], target.position, 0).wait()
            platform.synchronize()
            trips.append((time.perf_counter() - began) / 2)
        if leads:  # the other end's clock also waits for this one to begin
            seconds = statistics.median(trips)
    return seconds


@dataclass
class Transfers:
    """The messages of one model in one step.

    shapes: of the message of every micro-batch, [micro-batches]
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
        channel = self.links.sources[kind]
        assert channel is not None
        work = channel.group.recv([buffer.detach()], channel.position, micro_batch)
        self._coming[kind, micro_batch] = (buffer, work)

    def wait(self, kind: str, micro_batch: int, timeout: timedelta) -> Tensor:
        """The message, once it is here (on a GPU: for what is queued from now on)."""
        buffer, work = self._coming.pop((kind, micro_batch))
        platform.wait_for(work, timeout)
        return buffer

    def send(self, kind: str, micro_batch: int, tensor: Tensor) -> None:
        """Begins to send; holds the tensor until `release`."""
        message = tensor.detach().contiguous()
        channel = self.links.targets[kind]
        assert channel is not None
        work = channel.group.send([message], channel.position, micro_batch)
        self._going[kind].append((message, work))

    def release(self, kind: str, timeout: timedelta) -> None:
        """Waits for the oldest send of a kind, and lets its tensor go."""
        _, work = self._going[kind].popleft()
        platform.wait_for(work, timeout)
