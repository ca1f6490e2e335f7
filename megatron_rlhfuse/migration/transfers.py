"""How moved samples travel, and how long that holds their instances up.

A source sends its samples one after another, beside the other sources. A destination goes on once
all that it takes has come and, of what comes as tokens, the prefill is done: pessimistic for KV
caches, beside which it could go on decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_rlhfuse.migration.options import MigrationOptions
from megatron_rlhfuse.migration.rates import Rates

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def choose_kv(tokens: Ints, same_node: Bools, options: MigrationOptions, rates: Rates) -> Bools:
    """Whether each sample travels with its KV cache; else as tokens. All [moves]."""
    possible = same_node | options.kv_between_nodes
    if options.transfer != "auto":
        return possible & (options.transfer == "kv")
    prefill = rates.transfer_latency_s + tokens / rates.prefill_tokens_per_s
    return possible & (rates.kv_seconds(tokens, same_node) <= prefill)


@dataclass(frozen=True)
class Transfers:
    """The moves of a migration as arrays, [moves]; instances are positions from 0.

    Attributes:
        tokens: of each sample, prompt included
        kv: whether its KV cache travels
    """

    source: Ints
    destination: Ints
    tokens: Ints
    same_node: Bools
    kv: Bools

    def leave(self, instances: int, rates: Rates) -> Floats:
        """Seconds until each instance has sent what it gives away, [instances]."""
        sent = np.where(
            self.kv, rates.kv_seconds(self.tokens, self.same_node), rates.transfer_latency_s
        )
        return np.bincount(self.source, sent, minlength=instances).astype(np.float64)

    def arrive(self, instances: int, rates: Rates) -> Floats:
        """Seconds until each instance can go on with all that it takes, [instances]."""
        slowest = np.zeros(instances)
        np.maximum.at(slowest, self.destination, self.leave(instances, rates)[self.source])
        prefill = np.where(self.kv, 0.0, self.tokens / rates.prefill_tokens_per_s)
        return slowest + np.bincount(self.destination, prefill, minlength=instances)
