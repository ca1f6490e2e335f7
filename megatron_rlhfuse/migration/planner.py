"""When to migrate a rollout's tail, and how: a pure state machine, fed with observations.

Invariants:
- no sample is lost or doubled: each stays, or moves once, from the instance that has it;
- destinations stay within the capacity of batch and KV cache, unless they were over it before;
- for the number of destinations, which is the smallest possible, policy "busiest" moves the fewest
  samples;
- nothing moves when the prediction says that it would not pay, transfers included;
- at most one migration per iteration, unless `rebalance` asks for more.

Source: RLHFuse (NSDI '25), section 4. Beyond it: the prediction, the choice between KV cache and
tokens per sample, and another look after a refusal, because fewer samples need fewer destinations.
"""

from __future__ import annotations

import numpy as np

from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.options import MigrationOptions
from megatron_rlhfuse.migration.placement import Tail, place
from megatron_rlhfuse.migration.predict import (
    generation_seconds,
    likely_remaining,
    stage_seconds,
)
from megatron_rlhfuse.migration.rates import Rates
from megatron_rlhfuse.migration.state import Migration, Move, RolloutState
from megatron_rlhfuse.migration.transfers import Transfers, choose_kv

__all__ = ["MigrationOptions", "MigrationPlanner", "plan_migration"]

ASK_AGAIN = 0.75
"""After a refusal, or a migration with `rebalance`: with so much of the tail left, ask again."""


class MigrationPlanner:
    """One iteration's decision; make a new one for every iteration."""

    def __init__(
        self, options: MigrationOptions, rates: Rates, lengths: LengthDistribution, total: int
    ) -> None:
        """Args: total: samples of the global batch."""
        self._options = options
        self._rates = rates
        self._lengths = lengths
        # The sum guards against 0.29 * 100 being less than 29.
        self._asks_at = int(options.threshold * total + 1e-9)

    @property
    def asks_at(self) -> int:
        """It decides at the next observation of at most so many unfinished samples; 0: never."""
        return self._asks_at

    def observe(self, state: RolloutState) -> Migration | None:
        """The migration to carry out now, if any."""
        unfinished = state.unfinished
        if not 0 < unfinished <= self._asks_at:
            return None
        migration = plan_migration(state, self._options, self._rates, self._lengths)
        over = migration is not None and not self._options.rebalance
        self._asks_at = 0 if over else int(ASK_AGAIN * unfinished)
        return migration


def plan_migration(
    state: RolloutState, options: MigrationOptions, rates: Rates, lengths: LengthDistribution
) -> Migration | None:
    """The decision alone, for a state past the threshold: None where nothing is to move."""
    tail = Tail.of(state)
    if not len(tail.sample_id):
        return None
    placement = place(tail, options, options.capacity(rates))
    if placement is None:
        return None
    moved, to = placement.moved, placement.to
    source = tail.instance[moved]
    tokens = tail.prompt[moved] + tail.response[moved]
    same_node = tail.nodes[source] == tail.nodes[to]
    kv = choose_kv(tokens, same_node, options, rates)
    transfers = Transfers(source, to, tokens, same_node, kv)

    instances, waiting = len(tail.numbers), state.finished_waiting + len(tail.sample_id)
    remaining, limit = likely_remaining(lengths, tail.response), options.max_num_seqs
    own = generation_seconds(remaining, tail.instance, instances, rates, limit)
    without = stage_seconds(own, own.max(axis=1), waiting, rates.inference_s)
    after = tail.instance.copy()
    after[moved] = to
    merged = generation_seconds(remaining, after, instances, rates, limit)
    merged += transfers.arrive(instances, rates)
    released = merged + transfers.leave(instances, rates)
    with_ = stage_seconds(released, merged.max(axis=1), waiting, rates.inference_s)
    if not with_ < without:
        return None

    moves = map(
        Move._make,
        zip(
            tail.sample_id[moved].tolist(),
            tail.numbers[source].tolist(),
            tail.numbers[to].tolist(),
            np.where(kv, "kv", "tokens").tolist(),
            strict=True,
        ),
    )
    destinations = sorted(tail.numbers[placement.destinations].tolist())
    return Migration(tuple(destinations), tuple(moves), without, with_)
