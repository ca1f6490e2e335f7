"""Activation memory of a stage: what autograd keeps between a forward and its backward."""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType

import torch
from torch import Tensor


class ActivationMeter:
    """Counts the bytes that autograd has saved, while in use as a context manager.

    Each storage counts once, however many tensors share it; parameters and what is saved without
    a backward to come do not count. Works the same on CPU and GPU; costs a Python call per saved
    tensor, so it is for profiling.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.held = 0
        """Bytes saved at the moment."""
        self.peak = 0
        """Most bytes ever saved at once."""
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._counts: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)

    def __enter__(self) -> ActivationMeter:
        self._hooks.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        if tensor.is_leaf and tensor.untyped_storage().data_ptr() in self._parameters:
            # As itself: Megatron's linear layers keep `main_grad` and more on the parameter.
            return tensor
        return _Saved(self, tensor)

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        return saved.tensor if isinstance(saved, _Saved) else saved

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key in self._parameters or not storage.nbytes():
            return
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] == 1:
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)

    def _let_go(self, storage: torch.UntypedStorage) -> None:
        key = storage.data_ptr()
        if key not in self._counts:
            return
        self._counts[key] -= 1
        if not self._counts[key]:
            del self._counts[key]
            self.held -= storage.nbytes()


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
