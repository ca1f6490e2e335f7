"""What benchmarks train: stages that sleep, and small GPT models of random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.groups import ModelGroups
from megatron_rlhfuse.pipeline.stage import StepInput

HIDDEN = 256
VOCABULARY = 2 * HIDDEN


class Napping(torch.autograd.Function):
    """A stage that takes its time and holds its memory, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, received: Tensor | None, stage: Sleeper) -> Tensor:
        ctx.stage, ctx.has_input = stage, received is not None
        ctx.save_for_backward(torch.empty(stage.held, dtype=torch.uint8))
        output = torch.zeros(stage.output_shape)
        stage.sleep(stage.began, stage.forward_s)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        began = time.perf_counter()
        stage = ctx.stage
        assert ctx.saved_tensors[0].numel() == stage.held
        gradient = torch.zeros(stage.message_shape) if ctx.has_input else None
        stage.sleep(began, stage.backward_s)
        return None, gradient, None


class Sleeper(torch.nn.Module):
    """A stage of `Napping`, as Megatron's schedules want one.

    held: bytes from a forward to its backward; forward_s, backward_s: 0 does not sleep at all
    """

    def __init__(
        self, groups: ModelGroups, length: int, forward_s: float, backward_s: float, held: int
    ) -> None:
        super().__init__()
        self.config = _config(groups, layers=groups.layout.pp, heads=1)
        self.pg_collection = groups.pgc
        self.message_shape = (length, 1, HIDDEN)
        self.output_shape = (1,) if groups.is_last_stage else self.message_shape
        self.forward_s, self.backward_s, self.held = forward_s, backward_s, held
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.began = 0.0
        self.ended = 0.0
        """time.perf_counter() at the end of the last forward or backward."""
        self._received: Tensor | None = None

    def set_input_tensor(self, tensors: Sequence[Tensor | None]) -> None:
        # The first thing of Megatron's forward step, whose own time counts as the stage's.
        self.began = time.perf_counter()
        self._received = tensors[0]

    def forward(self) -> Tensor:
        return Napping.apply(self.anchor, self._received, self)

    def sleep(self, began: float, seconds: float) -> None:
        left = began + seconds - time.perf_counter()
        if left > 0:
            time.sleep(left)
        self.ended = time.perf_counter()


class Trained:
    """A model on this rank, and one training step of it: fused, or by Megatron's own schedule."""

    def __init__(
        self,
        model: Any,
        groups: ModelGroups,
        micro_batches: int,
        length: int,
        forward_step: Callable[[Any, Any], Any],
    ) -> None:
        from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

        self.model, self.groups = model, groups
        self.micro_batches, self._length, self._forward_step = micro_batches, length, forward_step
        self._communicator = P2PCommunicator(pp_group=groups.pgc.pp, config=model.config)

    def step_input(self) -> StepInput:
        count = self.micro_batches
        return StepInput(self._forward_step, iter(()), (self._length,) * count, (1,) * count)

    def stock(self) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        get_forward_backward_func(pp_size=self.groups.layout.pp, vp_size=None)(
            forward_step_func=self._forward_step,
            data_iterator=iter(()),
            model=self.model,
            num_microbatches=self.micro_batches,
            seq_length=self._length,
            micro_batch_size=1,
            p2p_communicator=self._communicator,
            pg_collection=self.groups.pgc,
        )


def sleep_step(iterator: Any, model: Any) -> Any:
    return model(), lambda output: (output.sum(), {})


def gpt(groups: ModelGroups, micro_batches: int, length: int, layers: int) -> Trained:
    """A GPT of random weights, wrapped in Megatron's DDP, and its step on random tokens."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )

    model = gpt_model(groups, layers, heads=4, length=length)
    config = model.config
    wrapped = DistributedDataParallel(
        config, DistributedDataParallelConfig(), model, pg_collection=groups.pgc
    )
    config.finalize_model_grads_func = finalize_model_grads
    positions = torch.arange(length).unsqueeze(0)
    tokens = torch.randint(0, VOCABULARY, (1, length))

    def forward_step(iterator: Any, part: Any) -> Any:
        return part(tokens, positions, None), lambda output: (output.square().mean(), {})

    return Trained(wrapped, groups, micro_batches, length, forward_step)


def gpt_model(
    groups: ModelGroups, layers: int, heads: int, length: int, attention: type | None = None
) -> Any:
    """This rank's stage in Megatron's local layers; `attention` in the place of their own."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    config = _config(groups, layers, heads)
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if attention is not None:
        spec.submodules.self_attention.submodules.core_attention = attention
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=VOCABULARY,
        max_sequence_length=length,
        pre_process=groups.is_first_stage,
        post_process=groups.is_last_stage,
        position_embedding_type="rope",
        pg_collection=groups.pgc,
    )


def seed() -> None:
    """What Megatron's layers want of its global state, and torch's generator."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state._set_global_memory_buffer()
    tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    torch.manual_seed(1)


def _config(groups: ModelGroups, layers: int, heads: int) -> Any:
    from megatron.core.transformer import TransformerConfig

    return TransformerConfig(
        num_layers=layers,
        hidden_size=HIDDEN,
        num_attention_heads=heads,
        pipeline_model_parallel_size=groups.layout.pp,
        pipeline_dtype=torch.float32,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=not platform.has_cuda(),
        persist_layer_norm=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
    )
