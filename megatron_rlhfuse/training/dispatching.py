"""Micro-batches of an optimizer step: which samples share one, and which replica computes it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_rlhfuse.dispatch.cost import SequenceCost
from megatron_rlhfuse.dispatch.micro_batches import (
    Figures,
    Limit,
    deal,
    deal_in_order,
    measure,
)
from megatron_rlhfuse.training.experience import Experience
from megatron_rlhfuse.training.trained_model import TrainedModel


@dataclass
class Dispatcher:
    """Deals mini-batches out to a model's replicas; every rank finds the same by itself."""

    model: TrainedModel
    figures: list[Figures] = field(default_factory=list)
    """Of every step, until `take_figures`."""

    def micro_batches(self, mini_batch: Experience) -> list[Experience]:
        """This replica's, in the order in which they run."""
        args, batch = self.model.args, mini_batch.batch
        lengths = (batch.prompt_lengths + batch.response_lengths).tolist()
        rows, replicas = args.micro_batch_size, self.model.replicas
        cost = SequenceCost.of(self.model.shape)
        if args.rlhfuse_dispatch == "balanced":
            dealt = deal(lengths, replicas, Limit(rows=rows), cost)
        else:
            dealt = deal_in_order(len(lengths), replicas, rows)
        self.figures.append(measure(lengths, dealt, cost))
        mine = dealt[self.model.groups.pgc.dp.rank()]
        return [mini_batch.select(torch.tensor(part)) for part in mine]

    def take_figures(self) -> list[Figures]:
        """Of the steps since the last call."""
        taken, self.figures = self.figures, []
        return taken
