"""The one door through which padded tensors enter the pure functions of this folder.

Invariant: whatever stands at a masked position, NaN and infinity included, reaches neither a
result nor a gradient. Multiplying by the mask does not give that (0 * nan is nan), and masking a
result does not give it for gradients; so inputs are overwritten with zeros before any arithmetic.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked(x: Tensor, mask: Tensor, name: str) -> Tensor:
    """Returns x with zeros where mask is 0; the gradient there is exactly zero.

    x, mask: [batch, response]; x is float32 (float64 passes through, for tests). `name` is the
    argument's name in the caller, for the error raised when shape or dtype do not fit.
    """
    if x.shape != mask.shape or mask.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} and mask has {tuple(mask.shape)}: "
            "both must be [batch, response]"
        )
    if x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {x.dtype}: cast it to float32 before it comes here")
    return x.masked_fill(mask == 0, 0.0)


def per_sample(x: Tensor, mask: Tensor, name: str) -> Tensor:
    """Returns x after checking that it holds one number per row of mask: [batch]."""
    if x.shape != mask.shape[:1]:
        raise ValueError(
            f"{name} has shape {tuple(x.shape)} but the batch holds {mask.shape[0]} samples: "
            f"it must be [{mask.shape[0]}]"
        )
    return x


def token_count(mask: Tensor) -> Tensor:
    """Returns the number of response tokens, a scalar; raises ValueError if there are none."""
    count = mask.sum()
    if count == 0:
        raise ValueError("mask holds no response token: the mean over it is undefined")
    return count
