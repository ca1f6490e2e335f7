"""PURE. Which Hugging Face tensors live in which Megatron parameter, and where.

A Megatron parameter packs one or more Hugging Face tensors along its rows:
- `linear_qkv`: for each key-value group its query heads, then its key, then its value head;
- `linear_fc1`: gate, then up, each rank its own part of both;
- all others hold a single tensor.

Invariants
- A rank's part of a parameter packs, of each source, one contiguous slice along one axis: so
  loading reads slices, and exporting puts slices side by side. `source_slice` says which, and
  `part` says where it lies; loading and exporting both use these two and nothing else.
- The parts of a parameter cover it exactly, except the rows that pad a vocabulary.
- Names are those of the local layer spec, with layers counted through the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from megatron_rlhfuse.models.hf_config import ModelShape

# Transformer Engine fuses each norm into the linear layer after it.
_ENGINE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
_LAYERS = "decoder.layers."


@dataclass(frozen=True)
class Weight:
    """One Megatron parameter of the whole model and the Hugging Face tensors packed in it.

    Attributes:
        name: canonical Megatron name
        sources: Hugging Face names, in packing order
        rows: rows (axis 0) of each source
        columns: length of axis 1, or None for vectors
        split: the axis that tensor parallelism cuts, or None where every rank has all of it
        groups: how often the sources alternate along the rows of the whole parameter
        padded: whether the rows are a vocabulary, padded to a multiple of the tensor ranks
    """

    name: str
    sources: tuple[str, ...]
    rows: tuple[int, ...]
    columns: int | None
    split: int | None
    groups: int = 1
    padded: bool = False

    def source_shape(self, source: int) -> tuple[int, ...]:
        """Shape of a Hugging Face tensor."""
        rows = self.rows[source]
        return (rows,) if self.columns is None else (rows, self.columns)

    def shard_shape(self, tensor_parallel: int) -> tuple[int, ...]:
        """Shape of this parameter on one tensor-parallel rank."""
        rows = self._local(sum(self.rows), 0, tensor_parallel)
        if self.columns is None:
            return (rows,)
        return (rows, self._local(self.columns, 1, tensor_parallel))

    def source_slice(self, source: int, rank: int, tensor_parallel: int) -> tuple[slice, ...]:
        """The slice of a source that tensor-parallel rank `rank` holds; may be empty."""
        slices = []
        for axis, size in enumerate(self.source_shape(source)):
            length = self._local(size, axis, tensor_parallel)
            start = rank * length if axis == self.split else 0
            slices.append(slice(min(start, size), min(start + length, size)))
        return tuple(slices)

    def part(self, shard: Tensor, source: int, rank: int, tensor_parallel: int) -> Tensor:
        """The view of a rank's parameter that holds its slice of a source.

        The view has three axes [group, row in group, column] or two for vectors; it has the
        elements of the slice in the slice's order.
        """
        rows = [self._local(count, 0, tensor_parallel) for count in self.rows]
        groups = max(1, self.groups // tensor_parallel)
        grouped = shard.view(groups, sum(rows) // groups, *shard.shape[1:])
        start = sum(rows[:source]) // groups
        present = self.source_slice(source, rank, tensor_parallel)[0]
        return grouped[:, start : start + (present.stop - present.start) // groups]

    def holders(self, tensor_parallel: int) -> range:
        """The tensor-parallel ranks whose slices together make the sources."""
        return range(1 if self.split is None else tensor_parallel)

    def _local(self, size: int, axis: int, tensor_parallel: int) -> int:
        if axis != self.split:
            return size
        if self.padded:
            return -(-size // tensor_parallel)
        if size % tensor_parallel:
            raise ValueError(f"{self.name}: {tensor_parallel} ranks cannot share {size} evenly")
        return size // tensor_parallel


def canonical_name(name: str, layer_offset: int) -> str:
    """A GPTModel parameter's name with either layer spec -> its name in the whole model.

    Args:
        layer_offset: number of layers on the stages before this one
    """
    if not name.startswith(_LAYERS):
        return name
    number, rest = name.removeprefix(_LAYERS).split(".", 1)
    return f"{_LAYERS}{int(number) + layer_offset}.{_ENGINE_NAMES.get(rest, rest)}"


def stage_weights(shape: ModelShape, stage: int, stages: int) -> Iterator[Weight]:
    """The parameters of one pipeline stage, each name once, in the order of the network."""
    if stage == 0:
        yield _vocabulary(shape, "embedding.word_embeddings.weight", _EMBEDDING)
    count = shape.num_layers // stages
    for layer in range(stage * count, (stage + 1) * count):
        yield from layer_weights(shape, layer)
    if stage < stages - 1:
        return
    yield _norm("decoder.final_layernorm.weight", "model.norm.weight", shape.hidden_size)
    if shape.head == "scalar":
        yield Weight("output_layer.weight", (_SCORE,), (1,), shape.hidden_size, split=None)
    elif not shape.tied_embeddings:
        yield _vocabulary(shape, "output_layer.weight", _LM_HEAD)
    elif stages > 1:  # the last stage has a copy of the embedding of its own
        yield _vocabulary(shape, "output_layer.weight", _EMBEDDING)


def layer_weights(shape: ModelShape, layer: int) -> Iterator[Weight]:
    """The parameters of one transformer layer, counted from 0."""
    ours, theirs = f"{_LAYERS}{layer}.", f"model.layers.{layer}."
    hidden, head = shape.hidden_size, shape.head_dim
    query, key = shape.num_attention_heads * head, shape.num_query_groups * head

    def attention(name: str) -> str:
        return f"{theirs}self_attn.{name}"

    yield _norm(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", hidden)
    for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
        yield Weight(
            f"{ours}self_attention.linear_qkv.{kind}",
            tuple(attention(f"{name}_proj.{kind}") for name in "qkv"),
            rows=(query, key, key),
            columns=hidden if kind == "weight" else None,
            split=0,
            groups=shape.num_query_groups,
        )
    for name in "qk" if shape.qk_layernorm else "":
        target = f"{ours}self_attention.{name}_layernorm.weight"
        yield _norm(target, attention(f"{name}_norm.weight"), head)
    output = f"{ours}self_attention.linear_proj.weight"
    yield Weight(output, (attention("o_proj.weight"),), (hidden,), query, split=1)

    after = f"{theirs}post_attention_layernorm.weight"
    yield _norm(f"{ours}pre_mlp_layernorm.weight", after, hidden)
    ffn = shape.ffn_hidden_size
    gate_up = (f"{theirs}mlp.gate_proj.weight", f"{theirs}mlp.up_proj.weight")
    yield Weight(f"{ours}mlp.linear_fc1.weight", gate_up, (ffn, ffn), hidden, split=0)
    down = f"{theirs}mlp.down_proj.weight"
    yield Weight(f"{ours}mlp.linear_fc2.weight", (down,), (hidden,), ffn, split=1)


_EMBEDDING = "model.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_SCORE = "score.weight"


def _norm(name: str, source: str, size: int) -> Weight:
    return Weight(name, (source,), (size,), None, split=None)


def _vocabulary(shape: ModelShape, name: str, source: str) -> Weight:
    return Weight(name, (source,), (shape.vocab_size,), shape.hidden_size, split=0, padded=True)
