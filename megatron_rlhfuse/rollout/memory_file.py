"""Tensors in anonymous shared memory: written once, sealed, read by processes of the same user.

A memory file has no name in /dev/shm and vanishes with the last process that holds it, however
that ends; other processes open it as /proc/<pid>/fd/<n>. The image is a safetensors file.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence

import torch

NamedTensor = tuple[str, torch.Tensor]

KEYS_AND_VALUES = "kv"
"""The label of files that hold those of a sample."""

_PREFIX = "rlhfuse-"
"""Of the names of all memory files of this project."""

_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL

# Names of the safetensors format.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.uint8: "U8",
}


def path_of(descriptor: int) -> str:
    """Path of an open file for other processes of this user, as long as this one holds it."""
    return f"/proc/{os.getpid()}/fd/{descriptor}"


def is_sealed(descriptor: int) -> bool:
    """Whether an open file is a memory file that nobody can change any more.

    Raises OSError for any other kind of file.
    """
    return fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS == _SEALS


def open_memory_file(path: str, label: str) -> int:
    """Opens a memory file that this project has written with a label; returns its descriptor.

    A path that came in a message may lead to anything by now: it is looked at before it is opened,
    since some files do something when they are, and what was opened is looked at again.

    Raises:
        OSError: there is nothing any more, or something that cannot be sealed.
        ValueError: it is another file.
    """
    wanted = f"/memfd:{_PREFIX}{label} (deleted)"
    if os.readlink(path) != wanted:
        raise ValueError(f"{path} is no memory file of {label}")
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not is_sealed(descriptor) or os.readlink(path_of(descriptor)) != wanted:
            raise ValueError(f"{path} is no sealed memory file of {label}")
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_tensors(tensors: Sequence[NamedTensor], label: str) -> int:
    """Writes a safetensors image into a new memory file, seals it and returns its descriptor.

    The library's own writer goes through a temporary file and a rename, which a nameless file
    does not allow, and through a second copy of the bytes.

    Args:
        tensors: of any shape, on the host; of the types in `_DTYPES`
        label: shown by the system beside the file, as in /proc/<pid>/maps
    """
    # The format aligns tensors by order: wider types first, no gaps.
    tensors = sorted(tensors, key=lambda item: -item[1].element_size())
    header: dict[str, dict[str, object]] = {}
    offset = 0
    for name, tensor in tensors:
        end = offset + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def parts() -> list[memoryview | bytes]:
        images = [tensor.contiguous().reshape(-1).view(torch.uint8) for _, tensor in tensors]
        return [len(text).to_bytes(8, "little"), text, *(image.numpy().data for image in images)]

    return _write(parts(), label)


def write_bytes(data: memoryview | bytes, label: str) -> int:
    """Writes bytes into a new memory file, seals it and returns its descriptor."""
    return _write([data], label)


def _write(parts: Sequence[memoryview | bytes], label: str) -> int:
    file = os.memfd_create(f"{_PREFIX}{label}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(file, "wb", closefd=False) as stream:
            for part in parts:
                stream.write(part)
        fcntl.fcntl(file, fcntl.F_ADD_SEALS, _SEALS)
    except BaseException:
        os.close(file)
        raise
    return file
