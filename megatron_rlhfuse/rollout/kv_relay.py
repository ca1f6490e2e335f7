"""Keys and values from the memory of one node to that of another, over a Gloo process group.

Leaders of instances send to each other. A message is the sizes of a sample's files and then their
bytes; a file that cannot be read any more has size 0, and the sample goes on from its tokens.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.rollout.memory_file import path_of, write_bytes
from megatron_rlhfuse.rollout.samples import PartialSample


class GlooRelay:
    """One per rank that leads an instance."""

    def __init__(self, group: dist.ProcessGroup, ranks_per_instance: int) -> None:
        """group: of all ranks of the job, on the host."""
        self._group, self._block = group, ranks_per_instance
        self._sending: list[tuple[dist.Work | None, Tensor]] = []
        self._files: list[int] = []
        self.bytes = 0
        """Sent since the job began."""

    def send(self, sample: PartialSample, destination: int) -> None:
        """Begins to send the files of a sample; returns at once."""
        images = [_read(path) for path in sample.kv_files]
        self._begin(torch.tensor([len(image) for image in images]), destination)
        for image in images:
            if len(image):
                self._begin(image, destination)
                self.bytes += len(image)

    def receive(self, sample: PartialSample, source: int) -> PartialSample:
        """Waits for the files of a sample: the sample with files of this node, or without any."""
        sizes = torch.zeros(len(sample.kv_files), dtype=torch.int64)
        dist.recv(sizes, source * self._block, self._group)
        paths = []
        for size in sizes.tolist():
            if size:
                image = torch.empty(size, dtype=torch.uint8)
                dist.recv(image, source * self._block, self._group)
                self._files.append(write_bytes(image.numpy().data, "kv"))
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

    def _begin(self, tensor: Tensor, destination: int) -> None:
        # The tensor must live until it is sent.
        work = dist.isend(tensor, destination * self._block, self._group)
        self._sending.append((work, tensor))


def _read(path: str) -> Tensor:
    with suppress(OSError):  # its engine has died: the size says so
        with open(path, "rb") as file:
            data = bytearray(file.read())
        if data:
            return torch.frombuffer(data, dtype=torch.uint8)
    return torch.empty(0, dtype=torch.uint8)
