"""Keys and values from the memory of one node to that of another, over a Gloo process group.

Leaders of instances send to each other. A message is the sizes of a sample's files and then what
each file takes to get there, here its bytes; a file that cannot be read any more has size 0, and
the sample goes on from its tokens.
"""

from __future__ import annotations

import mmap
import os
from contextlib import suppress
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.pipeline.broadcast import require_sizes
from megatron_rlhfuse.rollout.memory_file import (
    KEYS_AND_VALUES,
    open_memory_file,
    path_of,
    write_bytes,
)
from megatron_rlhfuse.rollout.samples import PartialSample


class GlooRelay:
    """One per rank that leads an instance.

    Another way for the bytes replaces `_offer`, `_fetch` and, for what it holds, `forget`.
    """

    def __init__(self, group: dist.ProcessGroup, ranks_per_instance: int) -> None:
        """group: of all ranks of the job, on the host."""
        self._group, self._block = group, ranks_per_instance
        self._sending: list[tuple[dist.Work | None, Tensor]] = []
        self._files: list[int] = []
        self.bytes = 0
        """Sent since the job began."""

    def send(self, sample: PartialSample, destination: int) -> None:
        """Begins to send the files of a sample; returns at once."""
        images = [_map(path) for path in sample.kv_files]
        self._begin(torch.tensor([len(image) for image in images]), destination)
        for image in images:
            if len(image):
                self._offer(image, destination)
                self.bytes += len(image)

    def receive(self, sample: PartialSample, source: int) -> PartialSample:
        """Waits for the files of a sample: the sample with files of this node, or without any.

        Raises ValueError where a size cannot be that of a file.
        """
        sizes = torch.zeros(len(sample.kv_files), dtype=torch.int64)
        self._wait_for(sizes, source)
        require_sizes(sizes.tolist(), f"files of keys and values from instance {source}")
        paths = []
        for size in sizes.tolist():
            image = self._fetch(size, source) if size else None
            if image is not None:
                self._files.append(write_bytes(image.numpy().data, KEYS_AND_VALUES))
                paths.append(path_of(self._files[-1]))
        if len(paths) < len(sample.kv_files):
            return replace(sample, kv_files=(), kv_tokens=0)
        return replace(sample, kv_files=tuple(paths))

    def forget(self) -> None:
        """Frees what was received, once engines have read it; waits for what is being sent."""
        for work, _ in self._sending:
            if work is not None:
                work.wait()
        self._sending = []
        while self._files:
            os.close(self._files.pop())

    def _offer(self, image: Tensor, destination: int) -> None:
        """Begins to bring a file there. image: [bytes] uint8, not empty."""
        self._begin(image, destination)

    def _fetch(self, size: int, source: int) -> Tensor | None:
        """The next file: [size] uint8, or None where it does not arrive."""
        image = torch.empty(size, dtype=torch.uint8)
        self._wait_for(image, source)
        return image

    def _begin(self, tensor: Tensor, destination: int) -> None:
        # The tensor must live until it is sent.
        work = dist.isend(tensor, destination * self._block, self._group)
        self._sending.append((work, tensor))

    def _wait_for(self, tensor: Tensor, source: int) -> None:
        dist.recv(tensor, source * self._block, self._group)


def _map(path: str) -> Tensor:
    """A memory file: [bytes] uint8, empty where it cannot be read. It outlives its engine."""
    # An error: its engine has died, and the size says so.
    with suppress(OSError, ValueError), open(open_memory_file(path, KEYS_AND_VALUES), "rb") as file:
        if os.fstat(file.fileno()).st_size:
            # Nobody writes, but torch and network cards want memory that could be written.
            image = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            return torch.frombuffer(image, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8)
