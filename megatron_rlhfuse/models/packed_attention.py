"""Causal attention over packed sequences where Transformer Engine is not there to do it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


@dataclass
class PackedSequences(PackedSeqParams):
    """With the lengths in host memory, too: to ask a GPU for them would be to wait for it."""

    lengths: tuple[int, ...] = ()


class PackedAttention(DotProductAttention):
    """Megatron's local attention, which also takes packed sequences: one call of torch's scaled
    dot-product attention for each of them."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequences | None = None,
    ) -> Tensor:
        """query: [tokens, heads, width], key and value: [tokens, groups, width] where packed.

        Returns [tokens, heads, width]; a query sees its own sequence alone, up to itself.
        """
        if packed_seq_params is None:
            return super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias
            )
        lengths = packed_seq_params.lengths
        parts = (each.split(lengths) for each in (query, key, value))
        return torch.cat([self._of_sequence(*of_one) for of_one in zip(*parts, strict=True)])

    def _of_sequence(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # [length, heads, width] -> [1, heads, length, width]
        query, key, value = (each.transpose(0, 1).unsqueeze(0) for each in (query, key, value))
        context = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=key.size(1) != query.size(1),
        )
        return context.squeeze(0).transpose(0, 1)
