"""The output layer of critic and reward model: one number per token.

It stands in the place of GPTModel's `output_layer` on the last stage and is called as Megatron's
ColumnParallelLinear is. Its weight, [1, hidden], is the same on all tensor-parallel ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_rlhfuse.pipeline.groups import ModelGroups


class ScalarHead(torch.nn.Module):
    """A bias-free projection of hidden states to one float32 value."""

    def __init__(self, config: TransformerConfig, groups: ModelGroups) -> None:
        super().__init__()
        self.groups = groups
        self.weight = torch.nn.Parameter(
            torch.empty(1, config.hidden_size, dtype=config.params_dtype)
        )
        self.sequence_parallel = config.sequence_parallel
        # Each rank then sees only its part of the sequence: Megatron sums such gradients over tp.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        self.weight.is_embedding_or_output_parameter = True  # type: ignore[attr-defined]

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[Tensor, None]:
        """Values of hidden states.

        Args:
            hidden: [sequence, batch, hidden]; under sequence parallelism this rank's part of it
            weight: must be None, a scalar head shares no weight with the embedding
            runtime_gather_output: no effect, the output is whole on every rank

        Returns:
            values [sequence, batch, 1] float32, and None in place of a bias
        """
        if weight is not None:
            raise ValueError("a scalar head has a weight of its own; build it with untied weights")
        # A sum of thousands of products that GAE then takes differences of: float32 throughout.
        values = torch.nn.functional.linear(hidden.float(), self.weight.float())
        if self.sequence_parallel:
            values = gather_from_sequence_parallel_region(
                values, tensor_parallel_output_grad=False, group=self.groups.pgc.tp
            )
        return values, None

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> ShardedStateDict:
        """The weight for Megatron's distributed checkpoint, replicated over tp and dp."""
        return make_sharded_tensors_for_checkpoint(
            {"weight": self.weight},
            prefix,
            {},
            sharded_offsets,
            tp_group=self.groups.pgc.tp,
            dp_cp_group=self.groups.pgc.dp_cp,
        )
