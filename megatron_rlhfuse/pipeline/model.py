"""One model cut into pipeline stages, driven by Megatron's stock schedules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.utils import get_model_config, unwrap_model

from megatron_rlhfuse.pipeline.groups import ModelGroups

ForwardStep = Callable[[Iterator[Any], torch.nn.Module], tuple[torch.Tensor, Callable[..., Any]]]


class PipelinedModel:
    """This rank's stage of a model, its process groups, and the 1F1B schedule over them.

    `model` is a GPTModel, bare or wrapped (Float16Module, DistributedDataParallel). Micro-batches
    may differ in length: stages tell each other the shape of what they send.
    """

    def __init__(self, model: torch.nn.Module, groups: ModelGroups) -> None:
        self.model = model
        self.groups = groups
        self.config = get_model_config(model)
        process_groups = groups.pgc
        self._schedule = get_forward_backward_func(pp_size=process_groups.pp.size(), vp_size=None)
        self._p2p = P2PCommunicator(pp_group=process_groups.pp, config=self.config)

    @property
    def module(self) -> Any:
        """The GPTModel inside the wrappers."""
        return unwrap_model(self.model)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.groups.is_last_stage

    def run(
        self,
        forward_step: ForwardStep,
        micro_batches: Sequence[Any],
        *,
        forward_only: bool,
    ) -> list[Any]:
        """Every rank of the replica calls this with the same micro-batches.

        With `forward_only` returns what the loss function returns for `non_loss_data=True`, per
        micro-batch; else the metrics of each micro-batch. Empty before the last stage.
        """
        stored = self._schedule(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            # Upper bounds of nothing: with variable lengths stages exchange shapes instead.
            seq_length=1,
            micro_batch_size=1,
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            p2p_communicator=self._p2p,
            pg_collection=self.groups.pgc,
        )
        return list(stored)
