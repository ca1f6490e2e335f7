"""Attention over packed sequences: against a softmax by hand, and against Megatron's attention."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.training.batches import RaggedTokens

if TYPE_CHECKING:
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.dot_product_attention import DotProductAttention

HEADS, WIDTH = 4, 8
LENGTHS = (3, 1, 7, 2, 5)
TOLERANCE = 1e-12

grouped = pytest.mark.parametrize("groups", [1, 2, HEADS])


@pytest.fixture(autouse=True, scope="module")
def megatron() -> Iterator[None]:
    """A job of one rank, as far as Megatron's attention asks for one."""
    platform.prepare()
    compat.apply()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.utils import GlobalMemoryBuffer

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_state, "_GLOBAL_MEMORY_BUFFER", GlobalMemoryBuffer())
        tensor_parallel.model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
        yield
    dist.destroy_process_group()


def attention(cls: type[DotProductAttention], groups: int) -> DotProductAttention:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=3,
        hidden_size=HEADS * WIDTH,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        attention_softmax_in_fp32=False,
    )
    return cls(
        config,
        layer_number=2,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        pg_collection=ProcessGroupCollection(tp=dist.group.WORLD),
    )


@functools.cache
def packed_attention(groups: int) -> DotProductAttention:
    from megatron_rlhfuse.models.packed_attention import PackedAttention

    return attention(PackedAttention, groups)


@functools.cache
def megatron_attention(groups: int) -> DotProductAttention:
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    return attention(DotProductAttention, groups)


def packed_sequences(lengths: tuple[int, ...]) -> PackedSeqParams:
    batch = RaggedTokens.of([[0]] * len(lengths), [[0] * (n - 1) for n in lengths])
    params = batch.batch(packed=True).packed_seq_params()
    assert params is not None
    return params


def inputs(groups: int) -> list[Tensor]:
    """Query, key and value, [tokens, heads or groups, width] float64, that want gradients."""
    generator = torch.Generator().manual_seed(groups)
    return [
        torch.randn(
            sum(LENGTHS), heads, WIDTH, generator=generator, dtype=torch.float64
        ).requires_grad_()
        for heads in (HEADS, groups, groups)
    ]


def run(qkv: list[Tensor], groups: int, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    return packed_attention(groups)(*qkv, None, packed_seq_params=packed_sequences(lengths))


def by_hand(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence, position by position and head by head."""
    heads_of_a_group = query.size(1) // key.size(1)
    rows = []
    for t in range(len(query)):
        heads = []
        for head in range(query.size(1)):
            group = head // heads_of_a_group
            scores = key[: t + 1, group] @ query[t, head] / WIDTH**0.5
            heads.append(scores.softmax(0) @ value[: t + 1, group])
        rows.append(torch.stack(heads))
    return torch.stack(rows)


def by_megatron(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The same through Megatron, which takes [sequence, batch, heads, width]."""
    qkv = [each.unsqueeze(1) for each in (query, key, value)]
    sees_not = torch.ones(1, 1, len(query), len(query)).triu(1).bool()
    return megatron_attention(key.size(1))(*qkv, sees_not).view_as(query)


def by_sequence(reference: Any, qkv: list[Tensor]) -> Tensor:
    parts = zip(*(each.split(LENGTHS) for each in qkv), strict=True)
    return torch.cat([reference(*of_one) for of_one in parts])


def gradients(output: Tensor, qkv: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((output * weights).sum(), qkv)


@grouped
@pytest.mark.parametrize("reference", [by_hand, by_megatron])
def test_every_sequence_is_attended_to_by_itself(groups: int, reference: Any) -> None:
    qkv = inputs(groups)
    found, wanted = run(qkv, groups), by_sequence(reference, qkv)
    assert found.shape == (sum(LENGTHS), HEADS, WIDTH)
    torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    for mine, theirs in zip(gradients(found, qkv), gradients(wanted, qkv), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@grouped
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_kept(groups: int, dtype: torch.dtype) -> None:
    qkv = inputs(groups)
    found = run([each.to(dtype) for each in qkv], groups)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(
        found.double(), by_sequence(by_hand, qkv), rtol=tolerance, atol=tolerance
    )


@grouped
@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_a_sequence_has_no_part_in_another(groups: int, changed: int) -> None:
    qkv = inputs(groups)
    before = run(qkv, groups).split(LENGTHS)
    with torch.no_grad():
        for each in qkv:
            each.split(LENGTHS)[changed].mul_(-100.0)
    after = run(qkv, groups).split(LENGTHS)
    same = [torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert same == [number != changed for number in range(len(LENGTHS))]
    for found in torch.autograd.grad(after[changed].sum(), qkv):
        parts = found.split(LENGTHS)
        assert not any(part.any() for n, part in enumerate(parts) if n != changed)


@grouped
def test_a_sequence_by_itself_is_what_it_is_among_others(groups: int) -> None:
    qkv = inputs(groups)
    among = run(qkv, groups).split(LENGTHS)
    for number, length in enumerate(LENGTHS):
        alone = run([each.split(LENGTHS)[number] for each in qkv], groups, (length,))
        assert torch.equal(alone, among[number])


@grouped
def test_what_is_not_packed_is_left_to_megatron(groups: int) -> None:
    qkv = [each.unflatten(0, (6, 3)) for each in inputs(groups)]  # [sequence, batch, ...]
    sees_not = torch.ones(1, 1, 6, 6).triu(1).bool()
    found, wanted = (
        made(groups)(*qkv, sees_not) for made in (packed_attention, megatron_attention)
    )
    assert torch.equal(found, wanted)
