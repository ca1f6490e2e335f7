"""The weights of a running model as a stream of whole Hugging Face tensors, on every rank.

It feeds inference engines, saving, and copies of the model in other layouts.

Invariants
- Collective: every rank of the group takes part in every tensor, in the same order, and must
  consume the stream to its end. Shapes follow from `ModelShape`, so nothing but data travels.
- A rank holds one whole tensor at a time besides the model, and at most its shards.
- The first replica sends; a shard goes straight from its owner to all ranks of the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.models.convert import Weight, stage_weights
from megatron_rlhfuse.models.hf_config import ModelShape
from megatron_rlhfuse.models.load import stage_parameters
from megatron_rlhfuse.pipeline.groups import Layout

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel


def stream_hf_weights(
    model: GPTModel | None,
    shape: ModelShape,
    layout: Layout,
    dtype: torch.dtype,
    group: dist.ProcessGroup | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yields (Hugging Face name, whole tensor), embeddings first, output last.

    Args:
        model: this rank's part, unwrapped, or None on a rank without one
        layout: where the model lives, the same on all ranks
        dtype: of the tensors that come out; shards are converted before they travel
        group: the ranks that take part, among them the first replica; None is all of the job

    A tied output layer is not emitted: Hugging Face models share the embedding. The tensors
    are new ones on this rank's device; the caller may keep them.
    """
    mine: dict[str, Tensor] = {}
    place = layout.place(dist.get_rank())
    if model is not None and place is not None and place.data == 0:
        mine = {weight.name: p for weight, p in stage_parameters(model, shape, layout, place)}
    for stage, owners in enumerate(layout.ranks[0]):
        for weight in stage_weights(shape, stage, layout.pp):
            if _is_copy_of_embedding(weight):
                continue
            for source, name in enumerate(weight.sources):
                shard = mine.get(weight.name)
                yield name, _gather(weight, source, shard, owners, dtype, group)


def _is_copy_of_embedding(weight: Weight) -> bool:
    return weight.name == "output_layer.weight" and weight.sources == ("model.embed_tokens.weight",)


def _gather(
    weight: Weight,
    source: int,
    shard: Tensor | None,
    owners: tuple[int, ...],
    dtype: torch.dtype,
    group: dist.ProcessGroup | None,
) -> Tensor:
    """Puts the slices of one source together, on all ranks of `group`."""
    size = len(owners)
    whole = torch.empty(weight.source_shape(source), dtype=dtype, device=platform.device())
    for part in weight.holders(size):
        target = whole[weight.source_slice(source, part, size)]
        if not target.numel():
            continue  # padding of the vocabulary only
        # Slices along rows are contiguous in the whole tensor and travel in place.
        piece = target if target.is_contiguous() else torch.empty_like(target).contiguous()
        if shard is not None and owners[part] == dist.get_rank():
            piece.copy_(weight.part(shard, source, part, size).reshape(piece.shape))
        dist.broadcast(piece, src=owners[part], group=group)
        if piece is not target:
            target.copy_(piece)
    return whole
