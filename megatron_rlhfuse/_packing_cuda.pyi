"""Packing on a GPU (csrc/packing/cuda/module.cpp); there only where nvcc was found."""

from collections.abc import Sequence

from megatron_rlhfuse._packing import Array, Field

def devices() -> int:
    """That the driver shows; 0 without a driver."""

def architectures() -> list[str]:
    """What the kernel was compiled for: "sm_90". Newer GPUs run the newest one's PTX."""

class Pass:
    """Fields of one CUDA device, whose tensors have to outlive the pass."""

    def __init__(self, fields: Sequence[Field]) -> None: ...
    @property
    def table_elements(self) -> int: ...
    def write_table(self, buffer: Array) -> None:
        """Into int64 [table_elements] on the host."""

    def launch(self, table: Array, stream: int) -> None:
        """Args: table: what was written, on the device; stream: a cudaStream_t"""
