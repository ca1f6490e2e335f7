"""One version of the actor's weights in anonymous shared memory, ready for any engine to read.

The trainer streams (Hugging Face name, full tensor) pairs; they are written into a row of sealed
memory files in the safetensors layout. The files have no name in /dev/shm and vanish with the
last process that holds them; a process of the same user opens them as /proc/<pid>/fd/<n>.

Host-memory cost: one full copy of the model in the stream's dtype for as long as the version is
kept, two while the next version is being written. It is kept on purpose: an engine that is killed
is started again with the same weights, without the collective export that would involve every
other rank.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator

import torch

BUCKET_BYTES = 256 << 20
"""Bounds what is held besides the memory files while a stream is written; larger buckets gain no
speed, much smaller ones would cost a file descriptor each."""

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

# Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}

NamedTensor = tuple[str, torch.Tensor]


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
                self._files.append(_write(bucket))
                self.bytes += sum(tensor.nbytes for _, tensor in bucket)
            if not self._files:
                raise ValueError(f"weight version {version} has no tensors")
        except BaseException:
            self.close()
            raise

    @property
    def paths(self) -> tuple[str, ...]:
        """Path of each bucket for other processes of this user, as long as this one lives."""
        return tuple(f"/proc/{os.getpid()}/fd/{fd}" for fd in self._files)

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
            if tensor.dtype not in _DTYPES:
                raise ValueError(f"weight {name} is {tensor.dtype}; it must be one of {[*_DTYPES]}")
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


def _write(bucket: list[NamedTensor]) -> int:
    """Write one safetensors image into a new memory file; returns its descriptor.

    The library's own writer goes through a temporary file and a rename, which a nameless file
    does not allow, and through a second copy of the bytes.
    """
    # The format aligns tensors by order: wider types first, no gaps.
    bucket = sorted(bucket, key=lambda item: -item[1].element_size())
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, tensor in bucket:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    file = os.memfd_create("rlhfuse-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(len(text).to_bytes(8, "little"))
            stream.write(text)
            for _, tensor in bucket:
                flat = tensor.contiguous().reshape(-1)
                stream.write(flat.view(torch.uint8).numpy().data)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file
