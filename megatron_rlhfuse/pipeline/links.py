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

ROUND_TRIPS = 9
"""Through the pipeline, to measure a transfer; the median is taken."""


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
    edges: between the pipeline's stages
    timeout: of a single transfer, outside a step
    """

    sources: Mapping[str, Channel | None]
    targets: Mapping[str, Channel | None]
    edges: int
    timeout: timedelta


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
    links = Links(ends["sources"], ends["targets"], layout.pp - 1, timeout)
    _connect(links)
    return links


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


def _connect(links: Links) -> None:
    """Goes over every edge once, both ways. COLLECTIVE over the pipeline.

    NCCL makes a pair's connection in its first message, and even a receive that is only posted
    then holds the host up until the peer comes: in the middle of a schedule, a deadlock. So edges
    are gone through in ascending order, and at each both ends do the same channel at a time.
    """
    message = torch.zeros(1, device=platform.device())
    for source, target, leads in (
        (links.sources["F"], links.targets["B"], False),
        (links.sources["B"], links.targets["F"], True),
    ):
        if source is None or target is None:
            continue
        if leads:
            target.group.send([message], target.position, 0).wait()
        source.group.recv([message], source.position, 0).wait()
        if not leads:
            target.group.send([message], target.position, 0).wait()
        platform.synchronize()


def measure_transfer(links: Links, elements: int, dtype: torch.dtype) -> float:
    """Seconds that a message takes to the next stage, the mean of all edges; 0 but on stage 0.

    COLLECTIVE over the pipeline. A message goes through all stages and back, each time as the
    executor would do it: made anew, its receive posted beforehand.
    """
    rounds = range(ROUND_TRIPS)
    shapes = [torch.Size([elements])] * ROUND_TRIPS
    transfers = Transfers(links, shapes, dtype, False)
    comes, goes = links.sources["F"] is not None, links.targets["F"] is not None
    seconds = []
    if comes:
        transfers.post("F", 0)
    for trip in rounds:
        began = time.perf_counter()
        if goes:
            transfers.post("B", trip)
        if comes:
            transfers.wait("F", trip, links.timeout)
            if trip + 1 < ROUND_TRIPS:
                transfers.post("F", trip + 1)
        if goes:
            transfers.send("F", trip, torch.zeros(elements, dtype=dtype, device=platform.device()))
            transfers.wait("B", trip, links.timeout)
            transfers.release("F", links.timeout)
        if comes:
            transfers.send("B", trip, torch.zeros(elements, dtype=dtype, device=platform.device()))
            transfers.release("B", links.timeout)
        platform.synchronize()
        seconds.append((time.perf_counter() - began) / (2 * links.edges or 1))
    return statistics.median(seconds) if goes and not comes else 0.0
