"""How a rollout's tail is migrated, as the user decides."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from megatron_rlhfuse.migration.rates import Rates

POLICIES = ("busiest", "inference")
TRANSFERS = ("auto", "kv", "tokens")


def share(text: str) -> float:
    """A threshold on a command line, where it is not auto."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"want auto or a number from 0 to 1, got {text[:40]}")
    return value


@dataclass(frozen=True)
class MigrationOptions:
    """Raises ValueError naming the field."""

    threshold: float
    """Share of the global batch, 0 to 1: with so few unfinished the tail may migrate; 0 never."""
    max_tokens: int
    """Longest response."""
    policy: str = "busiest"
    """Who takes the tail: "busiest", those with most of it; "inference", the designated ones."""
    inference_instances: tuple[int, ...] = ()
    """Those designated; where more are needed, the busiest of the others."""
    transfer: str = "auto"
    """"kv", "tokens" or, per sample, the cheaper."""
    kv_between_nodes: bool = True
    """Whether KV caches can leave a node; where not, samples go between nodes as tokens."""
    batch_capacity: int | None = None
    """Most samples a destination is filled up to; None is the batch that decoding is flat up to."""
    rebalance: bool = False
    """Migrate again, as often as it pays."""
    max_num_seqs: int | None = None
    """Most sequences an instance decodes at once; None has no limit."""

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold is {self.threshold}; it must be from 0 to 1")
        for name, known in (("policy", POLICIES), ("transfer", TRANSFERS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(known)}"
                )
        if self.policy == "inference" and not self.inference_instances:
            raise ValueError("inference_instances must be given with policy 'inference'")
        for name in ("max_tokens", "batch_capacity", "max_num_seqs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def capacity(self, rates: Rates) -> int:
        """Samples that a destination is filled up to."""
        flat = self.batch_capacity if self.batch_capacity is not None else rates.saturation_batch()
        return min(flat, self.max_num_seqs) if self.max_num_seqs is not None else flat
