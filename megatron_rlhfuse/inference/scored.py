"""A sample with everything that training needs to know of it. PURE.

It travels between ranks as safetensors bytes: the store that carries it listens on a port, so
nothing that is unpickled may pass through it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load, save
from torch import Tensor

from megatron_rlhfuse.rollout.samples import Sample


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
        """The sample and its scores as one safetensors file."""
        raw = bytearray(self.sample.to_bytes())
        tensors = {
            "sample": torch.frombuffer(raw, dtype=torch.uint8),
            "log_probs": self.log_probs,
            "score": torch.tensor([self.score], dtype=torch.float64),
        }
        if self.reference_log_probs is not None:
            tensors["reference_log_probs"] = self.reference_log_probs
        if self.values is not None:
            tensors["values"] = self.values
        return save(tensors)

    @classmethod
    def from_bytes(cls, data: bytes) -> ScoredSample:
        """The inverse of `to_bytes`. Raises safetensors' error on anything else."""
        tensors = load(data)
        return cls(
            sample=Sample.from_bytes(tensors["sample"].numpy().tobytes()),
            log_probs=tensors["log_probs"],
            reference_log_probs=tensors.get("reference_log_probs"),
            values=tensors.get("values"),
            score=float(tensors["score"].item()),
        )
