"""One version of the actor's weights in anonymous shared memory, ready for any engine to read.

The trainer streams (Hugging Face name, full tensor) pairs; they are written into a row of sealed
memory files (memory_file).

Host-memory cost: one full copy of the model in the stream's dtype for as long as the version is
kept, two while the next version is being written. It is kept on purpose: an engine that is killed
is started again with the same weights, without the collective export that would involve every
other rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from megatron_rlhfuse.rollout.memory_file import NamedTensor, path_of, write_tensors

BUCKET_BYTES = 256 << 20
"""Bounds what is held besides the memory files while a stream is written; larger buckets gain no
speed, much smaller ones would cost a file descriptor each."""


class WeightBuckets:
    """The sealed buckets of one weight version; close them when the next version is in use."""

    def __init__(
        self,
        tensors: Iterable[NamedTensor],
        version: int,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Write a stream of weights.

        Args:
            tensors: (Hugging Face name, full tensor on any device) pairs, floating point.
            version: number that samples made with these weights will carry.
            bucket_bytes: largest bucket; a larger single tensor gets a bucket of its own.

        Raises:
            ValueError: the stream is empty, repeats a name, or holds a tensor of another type.
        """
        self.version = version
        self.bytes = 0
        self._files: list[int] = []
        self._names: set[str] = set()
        try:
            for bucket in _group(self._checked(tensors), bucket_bytes):
                self._files.append(write_tensors(bucket, "weights"))
                self.bytes += sum(tensor.nbytes for _, tensor in bucket)
            if not self._files:
                raise ValueError(f"weight version {version} has no tensors")
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of each bucket for other processes of this user, as long as this one lives."""
        return tuple(path_of(fd) for fd in self._files)

    def require_names(self, expected: Iterable[str]) -> None:
        """Refuse weights that are not exactly the engine's.

        Raises:
            ValueError: names the tensors that are missing and those that do not belong.
        """
        wanted = set(expected)
        complaints = [
            f"{what} {', '.join(sorted(names))}"
            for what, names in (
                ("missing", wanted - self._names),
                ("unexpected", self._names - wanted),
            )
            if names
        ]
        if complaints:
            raise ValueError(
                f"weight version {self.version} does not fit the engine's model: "
                f"{'; '.join(complaints)}. It must hold every tensor under its Hugging "
                "Face name; a tied lm_head.weight is left out."
            )

    def close(self) -> None:
        """Free the memory; idempotent."""
        while self._files:
            os.close(self._files.pop())

    def _checked(self, tensors: Iterable[NamedTensor]) -> Iterator[NamedTensor]:
        for name, tensor in tensors:
            if name in self._names:
                raise ValueError(f"weight version {self.version} holds {name} twice")
            if not tensor.is_floating_point():
                raise ValueError(f"weight {name} is {tensor.dtype}; it must be floating point")
            self._names.add(name)
            # Device memory is the trainer's: hold the stream's tensors on the host.
            yield name, tensor.detach().to("cpu")


def _group(tensors: Iterable[NamedTensor], bucket_bytes: int) -> Iterator[list[NamedTensor]]:
    """Cut a stream into runs of at most `bucket_bytes`, or of one tensor."""
    bucket: list[NamedTensor] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
