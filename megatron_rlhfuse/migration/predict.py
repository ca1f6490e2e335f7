"""How long generation and inference still take: a fluid prediction, the same for every plan.

A sample's length is a quantile of the distribution given what it has already; the levels are
spread evenly over all samples, in an order that is fixed but unrelated to where they are. So the
longest of the tail is as long as such a tail's longest is, and it is the same with and without
migrating. The samples of an instance decode together; more than `max_num_seqs` share its steps.
Released instances then share the scoring as if it could be cut at will, but the last sample is
scored after it is finished.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.rates import Rates

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

LEVELS = 4096
"""Lengths drawn per prediction, roughly: of few samples several each, and the mean is taken."""
MOST_DRAWS = 8


def likely_remaining(lengths: LengthDistribution, so_far: Ints) -> Ints:
    """Tokens that samples still want, [draws, samples]."""
    samples = len(so_far)
    draws = int(np.clip(LEVELS // samples, 1, MOST_DRAWS))
    rng = np.random.default_rng(samples)
    order = rng.permuted(np.tile(np.arange(samples), (draws, 1)), axis=1)
    return lengths.remaining(so_far, (order + 0.5) / samples)


def generation_seconds(
    remaining: Ints, instance: Ints, instances: int, rates: Rates, max_num_seqs: int | None
) -> Floats:
    """When each instance has no samples any more, from now, [draws, instances].

    Args: remaining: [draws, samples]; instance: where each sample is, [samples].
    """
    draws = len(remaining)
    counts = np.bincount(instance, minlength=instances)
    # One sort for all: by draw, then instance, then tokens.
    wide = int(remaining.max()) + 1
    row = np.arange(draws)[:, None] * instances + instance
    key = np.sort((row * wide + remaining).ravel())
    row, tokens = np.divmod(key, wide)
    first = np.concatenate(([True], row[1:] != row[:-1]))
    more = np.diff(tokens, prepend=0)
    more[first] = tokens[first]
    begin = np.flatnonzero(first)
    there = counts[row % instances]
    running = there - (np.arange(len(key)) - begin[np.cumsum(first) - 1])
    batch = running if max_num_seqs is None else np.minimum(running, max_num_seqs)
    seconds = more * rates.step_table(int(batch.max()))[batch] * (running / batch)
    ends = np.bincount(row, seconds, minlength=draws * instances).astype(np.float64)
    return ends.reshape(draws, instances)


def stage_seconds(released: Floats, generated: Floats, samples: int, inference_s: float) -> float:
    """When the last of `samples` is scored, from now; the mean over draws.

    Args: released: when each instance begins to score, [draws, instances]; generated: when the
        last sample is finished, [draws].
    """
    order = np.sort(released, axis=1)
    servers = np.arange(1, order.shape[1] + 1)
    # The time at which the first k instances are done, were they alone: the least is what all of
    # them need, because one released later than that only raises it.
    shared = ((samples * inference_s + np.cumsum(order, axis=1)) / servers).min(axis=1)
    return float(np.maximum(shared, generated + inference_s).mean())
