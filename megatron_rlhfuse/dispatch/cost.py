"""What a sequence costs: linear in its length for the matrices, quadratic for attention. PURE."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlhfuse.models.hf_config import ModelShape


@dataclass(frozen=True)
class SequenceCost:
    """Floating-point operations of a forward pass over n tokens: linear * n + quadratic * n^2.

    A backward pass is twice that, so ratios hold for training too.
    """

    linear: float
    quadratic: float

    @classmethod
    def of(cls, shape: ModelShape) -> SequenceCost:
        """Of a dense decoder with causal attention.

        A weight takes two operations a token; a token's scores and their use take four a head
        dimension and token that it sees, which is half of them in the mean.
        """
        heads, groups, width = shape.num_attention_heads, shape.num_query_groups, shape.head_dim
        attention = shape.hidden_size * width * (2 * heads + 2 * groups)
        mlp = 3 * shape.hidden_size * shape.ffn_hidden_size
        outputs = shape.vocab_size if shape.head == "language" else 1
        weights = shape.num_layers * (attention + mlp) + shape.hidden_size * outputs
        return cls(2.0 * weights, 2.0 * shape.num_layers * heads * width)

    def __call__(self, tokens: int) -> float:
        return tokens * (self.linear + self.quadratic * tokens)
