"""One model's part of a fused step on this rank: Megatron's own forward and backward steps.

What the stock schedules do around those steps for a model by itself (no gradient reduction before
its last backward, embedding gradients, `finalize_model_grads`), this does in the middle of another
model's work. Source: `forward_backward_pipelining_without_interleaving` of Megatron-Core.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.memory import ActivationMeter

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


@dataclass(frozen=True)
class StepInput:
    """What a model does in one step; the fields are those of Megatron's `forward_backward_func`.

    sequence_lengths, batch_sizes: of every micro-batch, [micro_batches]
    most_tokens: that a micro-batch may have in any step; None where nobody knows
    """

    forward_step_func: Callable[..., Any]
    data_iterator: Iterator[Any] | None
    sequence_lengths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    collect_non_loss_data: bool = False
    first_val_step: bool | None = None
    force_all_reduce: bool = False
    most_tokens: int | None = None

    @property
    def micro_batches(self) -> int:
        return len(self.sequence_lengths)

    @property
    def tokens(self) -> int:
        """Of the largest micro-batch."""
        sizes = zip(self.sequence_lengths, self.batch_sizes, strict=True)
        return max(length * rows for length, rows in sizes)


class Stage:
    """A stage of a model; between `begin` and `finish` it runs micro-batches in sequence."""

    def __init__(
        self, name: str, model: torch.nn.Module, process_groups: ProcessGroupCollection
    ) -> None:
        self.name = name
        self.model = model
        self.process_groups = process_groups
        self.config = get_model_config(model)
        _check_config(name, self.config, process_groups)
        pipeline = process_groups.pp
        self.number = pipeline.rank()
        self.is_first = self.number == 0
        self.is_last = self.number == pipeline.size() - 1
        self.activation = 0
        """Most bytes that a micro-batch held from its forward on, in the last metered step."""
        self._headroom = 1.0

    @property
    def planned_activation(self) -> float:
        """What a micro-batch as large as any may hold; activations grow with their tokens."""
        return self.activation * self._headroom

    def message_shapes(self, step: StepInput) -> list[torch.Size]:
        """Shape of what is sent to the next stage for every micro-batch."""
        parts = self.process_groups.tp.size() if self.config.sequence_parallel else 1
        return [
            torch.Size((length // parts, size, self.config.hidden_size))
            for length, size in zip(step.sequence_lengths, step.batch_sizes, strict=True)
        ]

    def begin(
        self, step: StepInput, forward_only: bool, meter: ActivationMeter | None = None
    ) -> None:
        """Before the first micro-batch of a step. `meter` measures what forwards keep."""
        config = self.config
        if not forward_only and self.model.training:
            _check_dropout(self.name, config)
        self._step, self._forward_only = step, forward_only
        self._meter: Any = meter or contextlib.nullcontext()
        if meter is not None:
            self.activation = 0
            self._headroom = max(1.0, (step.most_tokens or 0) / step.tokens)
        self._shapes = self.message_shapes(step)
        self._inputs: dict[int, Tensor | None] = {}
        self._outputs: dict[int, Tensor] = {}
        self._gradients: dict[int, Tensor] = {}
        self._tokens = torch.zeros([], dtype=torch.int, device=platform.device())
        self.collected: list[Any] = []
        """What the loss function reported, by micro-batch; on the last stage only."""
        self._embedding = None
        if config.finalize_model_grads_func is not None and not forward_only:
            self._embedding = schedules.clear_embedding_activation_buffer(
                config, self.model, self.is_last
            )
        self._no_sync: Any = (config.no_sync_func or contextlib.nullcontext)()
        self._no_sync.__enter__()

    def forward(self, micro_batch: int, received: Tensor | None) -> None:
        step = self._step
        with self._meter as meter:
            held = meter.held if meter is not None else 0
            output, tokens = schedules.forward_step(
                step.forward_step_func,
                step.data_iterator,
                self.model,
                step.micro_batches,
                received,
                self.collected,
                self.config,
                cp_group_size=self.process_groups.cp.size(),
                collect_non_loss_data=step.collect_non_loss_data,
                is_first_microbatch=schedules.check_first_val_step(
                    step.first_val_step, self._forward_only, micro_batch == 0
                ),
                current_microbatch=micro_batch,
                is_last_stage=self.is_last,
            )
            # On a GPU the first forward also brings what libraries allocate once.
            counts = micro_batch or step.micro_batches == 1 or not platform.has_cuda()
            if meter is not None and counts:
                self.activation = max(self.activation, meter.held - held)
        if not self.is_last and output.dtype != self.config.pipeline_dtype:
            raise ValueError(
                f"{self.name}: stage {self.number} made an output of {output.dtype}, the config's "
                f"pipeline_dtype is {self.config.pipeline_dtype}"
            )
        if not self.is_last and output.shape != self._shapes[micro_batch]:
            raise ValueError(
                f"{self.name}, micro-batch {micro_batch}: stage {self.number} made an output of "
                f"shape {list(output.shape)}, by seq_length and micro_batch_size it should be "
                f"{list(self._shapes[micro_batch])}; give them per micro-batch where they differ"
            )
        self._tokens += tokens
        self._outputs[micro_batch] = output
        if not self._forward_only:
            self._inputs[micro_batch] = received
        elif self.is_last:
            del self._outputs[micro_batch]

    def backward(self, micro_batch: int, received: Tensor | None) -> None:
        """Megatron's backward step; the last one of the step lets gradient reduction begin."""
        if micro_batch == self._step.micro_batches - 1 and (
            self.config.grad_sync_func is None or self.is_first
        ):
            self._enable_grad_sync()
        gradient = schedules.backward_step(
            self._inputs.pop(micro_batch), self._outputs.pop(micro_batch), received, self.config
        )
        if gradient is not None:
            self._gradients[micro_batch] = gradient

    def output(self, micro_batch: int) -> Tensor:
        """What goes to the next stage."""
        return self._outputs[micro_batch]

    def gradient(self, micro_batch: int) -> Tensor:
        """What goes to the previous stage; given away."""
        return self._gradients.pop(micro_batch)

    def free_output(self, micro_batch: int) -> None:
        """Drops the data of an output that was handed over; its graph stays for the backward."""
        if self._forward_only:
            del self._outputs[micro_batch]
            return
        schedules.deallocate_output_tensor(
            self._outputs[micro_batch], self.config.deallocate_pipeline_outputs
        )

    def finish(self) -> None:
        """After the last micro-batch: reduces what has not begun to be."""
        if self._no_sync is not None:
            self._enable_grad_sync()
            if self.config.grad_sync_func is not None and not self._forward_only:
                self.config.grad_sync_func(self.model.parameters())

    def finalize(self) -> None:
        """Megatron's `finalize_model_grads`. COLLECTIVE: models in the same order on every rank."""
        config = self.config
        if config.finalize_model_grads_func is None or self._forward_only:
            return
        schedules.finish_embedding_wgrad_compute(
            config, self._embedding, self.is_last, self.process_groups.tp
        )
        config.finalize_model_grads_func(
            [self.model],
            self._tokens if config.calculate_per_token_loss else None,
            pg_collection=self.process_groups,
            force_all_reduce=self._step.force_all_reduce,
        )

    def _enable_grad_sync(self) -> None:
        self._no_sync.__exit__(None, None, None)
        self._no_sync = None


def _check_config(name: str, config: Any, process_groups: ProcessGroupCollection) -> None:
    """Refuses what stock schedules treat apart and this one does not. Raises ValueError."""
    refused = {
        "num_moe_experts": "mixture of experts",
        "mtp_num_layers": "multi-token prediction",
        "virtual_pipeline_model_parallel_size": "interleaved stages",
        "fine_grained_activation_offloading": "offloading activations",
        "defer_embedding_wgrad_compute": "deferred embedding gradients",
        "experimental_attention_variant": "an experimental attention",
        "experimental_attention_variant_loss_scale_func": "an experimental attention",
        "fp8": "fp8, whose scaling factors are reduced in the middle of a step,",
    }
    for field, what in refused.items():
        if getattr(config, field, None):
            raise ValueError(
                f"{name}: {what} ({field} = {getattr(config, field)}) cannot be trained in a fused "
                "pipeline yet; train this model by Megatron's own schedule"
            )
    if config.num_microbatches_with_partial_activation_checkpoints is not None:
        raise ValueError(
            f"{name}: recomputing only some micro-batches "
            "(num_microbatches_with_partial_activation_checkpoints) cannot be done in a fused "
            "pipeline: recompute all or none"
        )
    if config.pipeline_dtype is None and process_groups.pp.size() > 1:
        raise ValueError(f"{name}: pipeline_dtype is not set: the dtype of what stages send")
    if getattr(config, "cuda_graph_impl", "none") != "none":
        raise ValueError(f"{name}: CUDA graphs (cuda_graph_impl) must be off in a fused pipeline")
    if process_groups.cp.size() > 1:
        raise ValueError(
            f"{name}: context parallelism of {process_groups.cp.size()}; a fused pipeline takes 1"
        )


def _check_dropout(name: str, config: Any) -> None:
    if config.attention_dropout or config.hidden_dropout:
        raise ValueError(
            f"{name}: attention_dropout and hidden_dropout must be 0: all models of a rank draw "
            "from one random stream, so the result would depend on the schedule"
        )
