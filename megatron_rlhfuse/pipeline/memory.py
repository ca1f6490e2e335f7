"""Activation memory of a stage: what autograd keeps between a forward and its backward."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor

from megatron_rlhfuse import platform


class ActivationMeter:
    """Counts the bytes that autograd has saved, while in use as a context manager.

    Each storage counts once, however many tensors share it; parameters and what is saved without
    a backward to come do not count. Costs a Python call per saved tensor, so it is for profiling.

    On a GPU it asks the allocator, at the ends of forwards, what has come since the meter was made.
    Hooks hand a backward its parameters as other tensors; Megatron's fused accumulation of
    gradients, a GPU's, marks those as done, and a DDP with overlap_grad_reduce would fail.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.peak = 0
        """Most bytes ever saved at once."""
        self._held = 0
        self._on_gpu = platform.has_cuda()
        self._before = torch.cuda.memory_allocated() if self._on_gpu else 0
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._counts: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    @property
    def held(self) -> int:
        """Bytes saved at the moment."""
        return torch.cuda.memory_allocated() - self._before if self._on_gpu else self._held

    def __enter__(self) -> ActivationMeter:
        if not self._on_gpu:
            self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._on_gpu:
            self.peak = max(self.peak, self.held)
        else:
            self._hooks.__exit__(kind, error, traceback)

    def _pack(self, tensor: Tensor) -> _Saved:
        return _Saved(self, tensor)

    def _unpack(self, saved: _Saved) -> Tensor:
        return saved.tensor

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._parameters or not storage.nbytes():
            return
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self._held += storage.nbytes()
            self.peak = max(self.peak, self._held)

    def _let_go(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key not in self._counts:
            return
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
            self._held -= storage.nbytes()


class _Saved:
    """A saved tensor; dies with the graph that saved it.

    It holds a detached alias: an operation that saves its own output would else keep itself alive.
    """

    __slots__ = ("_meter", "_storage", "tensor")

    def __init__(self, meter: ActivationMeter, tensor: Tensor) -> None:
        self.tensor = tensor.detach()
        self._storage = self.tensor.untyped_storage()
        self._meter = meter
        meter._hold(self._storage)

    def __del__(self) -> None:
        self._meter._let_go(self._storage)
