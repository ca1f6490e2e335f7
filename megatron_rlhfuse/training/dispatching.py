"""Micro-batches of an optimizer step: which samples share one, and which replica computes it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.layout import Layout, Runs
from megatron_rlhfuse.dispatch.micro_batches import (
    Figures,
    Limit,
    deal,
    deal_in_order,
    measure,
)
from megatron_rlhfuse.training.trained_model import TrainedModel
from megatron_rlhfuse.training.training_data import MicroBatch, MiniBatch


@dataclass
class Dispatcher:
    """Deals mini-batches out to a model's replicas; every rank finds the same by itself."""

    model: TrainedModel
    figures: list[Figures] = field(default_factory=list)
    """Of every step, until `take_figures`."""

    def micro_batches(self, mini_batch: MiniBatch) -> list[MicroBatch]:
        """This replica's, in the order in which they run."""
        args, lengths = self.model.args, mini_batch.lengths
        layout = Layout(packed=args.rlhfuse_pack_sequences)
        cost = SequenceCost.of(self.model.shape)
        dealt = _deal(args, lengths, self.model.replicas, cost, layout)
        self.figures.append(measure(lengths, dealt, cost, layout))
        mine = dealt[self.model.groups.pgc.dp.rank()]
        return [mini_batch.micro_batch(run, layout.packed) for run in mine]

    def take_figures(self) -> list[Figures]:
        """Of the steps since the last call."""
        taken, self.figures = self.figures, []
        return taken


def _deal(
    args: argparse.Namespace,
    lengths: Sequence[int],
    replicas: int,
    cost: SequenceCost,
    layout: Layout,
) -> list[Runs]:
    if args.rlhfuse_dispatch == "in-order":
        return deal_in_order(len(lengths), replicas, args.micro_batch_size)
    if args.micro_batch_tokens is not None:
        limit = Limit(tokens=args.micro_batch_tokens)
    else:
        limit = Limit(rows=args.micro_batch_size)
    # Asked of the algorithm, not of the fusion: with and without it gradients add up alike.
    return deal(lengths, replicas, limit, cost, layout, beside_another=args.uses_critic)
