"""A sample with everything that training needs to know of it. PURE.

It travels between ranks as safetensors bytes: the store that carries it listens on a port, so
nothing that is unpickled may pass through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.rollout.wire import ANYTHING, Limits, MalformedMessageError, one_error

_PER_TOKEN = ("log_probs", "reference_log_probs", "values")
_NAMES = {"sample", "score", *_PER_TOKEN}

_HEADER_BYTES = 4096
"""Of the safetensors format, for at most five tensors."""


@dataclass(frozen=True)
class ScoredSample:
    """One sample after inference. Tensors are [response] float32 on the CPU."""

    sample: Sample
    log_probs: Tensor
    """Of the response tokens under the actor that is about to be trained."""
    reference_log_probs: Tensor | None
    """The same under the reference model; None without a KL term."""
    values: Tensor | None
    """Of the critic before each response token; None without a critic."""
    score: float
    """Reward model plus reward function, before clipping and penalties."""

    def to_bytes(self) -> bytes:
        """The sample and its scores as one safetensors file.

        Raises:
            ValueError: a score is NaN or infinite: nothing can be learned from it.
        """
        raw = bytearray(self.sample.to_bytes())
        tensors = {
            "sample": torch.frombuffer(raw, dtype=torch.uint8),
            "score": torch.tensor([self.score], dtype=torch.float64),
        }
        for name in _PER_TOKEN:
            tensor = getattr(self, name)
            if tensor is not None:
                tensors[name] = tensor
        for name, tensor in tensors.items():
            if name != "sample" and not _is_finite(tensor):
                raise ValueError(
                    f"sample {self.sample.sample_id}: {name} holds NaN or infinity: has training "
                    "diverged? Lower --lr or --critic-lr, or look at the reward"
                )
        return save(tensors)

    @classmethod
    @one_error
    def from_bytes(cls, data: bytes, limits: Limits = ANYTHING) -> ScoredSample:
        """The inverse of `to_bytes`.

        Raises:
            MalformedMessageError: the bytes are nothing that a rank of a job within these limits
                can have made.
        """
        per_token = len(_PER_TOKEN) * 4 * limits.response_tokens
        most = limits.sample_bytes + per_token + _HEADER_BYTES
        if len(data) > most:
            raise MalformedMessageError(
                f"a scored sample of {len(data)} bytes; at most {most} are possible"
            )
        try:
            tensors = load(data)
        except Exception as error:  # the library's errors have no class in common
            raise MalformedMessageError(f"no safetensors file: {error!r:.200}") from error
        if not {"sample", "log_probs", "score"} <= tensors.keys() <= _NAMES:
            raise MalformedMessageError(f"a scored sample holds {sorted(tensors)!s:.200}")
        _check_shape(tensors["sample"], "sample", torch.uint8, tensors["sample"].numel())
        sample = Sample.from_bytes(tensors["sample"].numpy().tobytes(), limits)
        _check_shape(tensors["score"], "score", torch.float64, 1)
        for name in tensors.keys() & {*_PER_TOKEN}:
            _check_shape(tensors[name], name, torch.float32, len(sample.response))
        reference, values = tensors.get("reference_log_probs"), tensors.get("values")
        for tensor, name, wanted in (
            (reference, "reference_log_probs", limits.has_reference),
            (values, "values", limits.has_values),
        ):
            if wanted is not None and (tensor is not None) != wanted:
                raise MalformedMessageError(
                    f"sample {sample.sample_id}: {name} {'are missing' if wanted else 'came, too'}"
                )
        if not all(_is_finite(tensor) for name, tensor in tensors.items() if name != "sample"):
            raise MalformedMessageError(f"sample {sample.sample_id}: a score is not finite")
        return cls(
            sample=sample,
            log_probs=tensors["log_probs"],
            reference_log_probs=reference,
            values=values,
            score=float(tensors["score"].item()),
        )


def _check_shape(tensor: Tensor, name: str, dtype: torch.dtype, length: int) -> None:
    if tensor.dtype != dtype or tensor.shape != (length,):
        raise MalformedMessageError(
            f"{name} is {tensor.dtype} {list(tensor.shape)!s:.80}, not {dtype} [{length}]"
        )


def _is_finite(tensor: Tensor) -> bool:
    return bool(np.isfinite(tensor.detach().numpy()).all())
