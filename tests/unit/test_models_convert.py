"""The mapping of tensors, against a packing written down whole, rank by rank."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.models.convert import Weight, canonical_name, stage_weights
from megatron_rlhfuse.models.hf_config import ModelShape

FAMILIES = ("llama", "qwen2", "qwen3")


@st.composite
def shapes(draw: st.DrawFn) -> tuple[ModelShape, int, int]:
    """A model, and tensor and pipeline sizes that fit it."""
    tensor, stages = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3))
    groups = tensor * draw(st.integers(1, 2))
    family, head = draw(st.sampled_from(FAMILIES)), draw(st.sampled_from(["language", "scalar"]))
    shape = ModelShape(
        model_type=family,
        head=head,
        stored_head=head,
        num_layers=stages * draw(st.integers(1, 2)),
        hidden_size=draw(st.integers(1, 5)),
        ffn_hidden_size=tensor * draw(st.integers(1, 3)),
        num_attention_heads=groups * draw(st.integers(1, 3)),
        num_query_groups=groups,
        head_dim=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 13)),
        max_position_embeddings=8,
        norm_epsilon=1e-5,
        rotary_base=1e4,
        rope_scaling_factor=None,
        qkv_bias=family == "qwen2",
        qk_layernorm=family == "qwen3",
        tied_embeddings=draw(st.booleans()),
        folder=Path("model"),
    )
    return shape, tensor, stages


def hf_tensors(shape: ModelShape) -> dict[str, Tensor]:
    """All tensors of the model with distinct elements, written down from transformers' classes."""
    h, f, d = shape.hidden_size, shape.ffn_hidden_size, shape.head_dim
    q, k = shape.num_attention_heads * d, shape.num_query_groups * d
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, h)}
    for i in range(shape.num_layers):
        layer = {
            "input_layernorm.weight": (h,),
            "self_attn.q_proj.weight": (q, h),
            "self_attn.k_proj.weight": (k, h),
            "self_attn.v_proj.weight": (k, h),
            "self_attn.o_proj.weight": (h, q),
            "post_attention_layernorm.weight": (h,),
            "mlp.gate_proj.weight": (f, h),
            "mlp.up_proj.weight": (f, h),
            "mlp.down_proj.weight": (h, f),
        }
        if shape.qkv_bias:
            layer |= {f"self_attn.{n}_proj.bias": ((q if n == "q" else k),) for n in "qkv"}
        if shape.qk_layernorm:
            layer |= {f"self_attn.{n}_norm.weight": (d,) for n in "qk"}
        sizes |= {f"model.layers.{i}.{name}": size for name, size in layer.items()}
    sizes["model.norm.weight"] = (h,)
    if shape.head == "scalar":
        sizes["score.weight"] = (1, h)
    elif not shape.tied_embeddings:
        sizes["lm_head.weight"] = (shape.vocab_size, h)
    tensors, start = {}, 1
    for name, size in sizes.items():
        count = torch.Size(size).numel()
        tensors[name] = torch.arange(start, start + count, dtype=torch.float64).view(size)
        start += count
    return tensors


def reference_shard(
    shape: ModelShape, hf: dict[str, Tensor], name: str, rank: int, tensor: int
) -> Tensor:
    """A parameter as Megatron's classes read it, on one tensor-parallel rank."""

    def cut(whole: Tensor, axis: int = 0) -> Tensor:
        return whole.chunk(tensor, axis)[rank]

    def padded(whole: Tensor) -> Tensor:
        missing = shape.padded_vocab_size(tensor) - shape.vocab_size
        return cut(torch.cat([whole, whole.new_zeros(missing, whole.shape[1])]))

    if name == "embedding.word_embeddings.weight":
        return padded(hf["model.embed_tokens.weight"])
    if name == "decoder.final_layernorm.weight":
        return hf["model.norm.weight"]
    if name == "output_layer.weight" and shape.head == "scalar":
        return hf["score.weight"]
    if name == "output_layer.weight":
        return padded(hf.get("lm_head.weight", hf["model.embed_tokens.weight"]))
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    layer = f"model.layers.{number}."
    if rest.startswith("self_attention.linear_qkv."):
        kind = rest.rsplit(".", 1)[1]
        per_group = shape.num_attention_heads // shape.num_query_groups * shape.head_dim
        q = hf[f"{layer}self_attn.q_proj.{kind}"].split(per_group)
        k = hf[f"{layer}self_attn.k_proj.{kind}"].split(shape.head_dim)
        v = hf[f"{layer}self_attn.v_proj.{kind}"].split(shape.head_dim)
        mixed = [piece for group in zip(q, k, v, strict=True) for piece in group]
        return cut(torch.cat(mixed))
    if rest == "mlp.linear_fc1.weight":
        gate, up = hf[f"{layer}mlp.gate_proj.weight"], hf[f"{layer}mlp.up_proj.weight"]
        return torch.cat([cut(gate), cut(up)])
    if rest == "self_attention.linear_proj.weight":
        return cut(hf[f"{layer}self_attn.o_proj.weight"], 1)
    if rest == "mlp.linear_fc2.weight":
        return cut(hf[f"{layer}mlp.down_proj.weight"], 1)
    plain = {
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    }
    return hf[layer + plain[rest]]


def fill(weight: Weight, hf: dict[str, Tensor], rank: int, tensor: int) -> Tensor:
    shard = torch.zeros(weight.shard_shape(tensor), dtype=torch.float64)
    for source, name in enumerate(weight.sources):
        view = weight.part(shard, source, rank, tensor)
        view.copy_(hf[name][weight.source_slice(source, rank, tensor)].reshape(view.shape))
    return shard


@given(shapes())
def test_shards_are_those_that_megatron_expects(case: tuple[ModelShape, int, int]) -> None:
    shape, tensor, stages = case
    hf = hf_tensors(shape)
    for stage in range(stages):
        for weight in stage_weights(shape, stage, stages):
            for source, name in enumerate(weight.sources):
                assert weight.source_shape(source) == hf[name].shape
            for rank in range(tensor):
                expected = reference_shard(shape, hf, weight.name, rank, tensor)
                assert torch.equal(fill(weight, hf, rank, tensor), expected), weight.name


@given(shapes())
def test_parts_of_all_ranks_give_back_every_tensor(case: tuple[ModelShape, int, int]) -> None:
    shape, tensor, stages = case
    hf = hf_tensors(shape)
    found: dict[str, Tensor] = {}
    for stage in range(stages):
        for weight in stage_weights(shape, stage, stages):
            for source, name in enumerate(weight.sources):
                whole = torch.full(weight.source_shape(source), torch.nan, dtype=torch.float64)
                for rank in weight.holders(tensor):
                    target = whole[weight.source_slice(source, rank, tensor)]
                    part = weight.part(fill(weight, hf, rank, tensor), source, rank, tensor)
                    target.copy_(part.reshape(target.shape))
                found[name] = whole
    assert found.keys() == hf.keys()
    assert all(torch.equal(found[name], hf[name]) for name in hf)


@given(shapes())
def test_stages_share_the_network_without_overlap(case: tuple[ModelShape, int, int]) -> None:
    shape, _, stages = case
    together = [w.name for s in range(stages) for w in stage_weights(shape, s, stages)]
    alone = [weight.name for weight in stage_weights(shape, 0, 1)]
    assert len(set(together)) == len(together)
    has_output = shape.head == "scalar" or not shape.tied_embeddings
    assert ("output_layer.weight" in alone) == has_output
    extra = {"output_layer.weight"} if shape.head == "language" and shape.tied_embeddings else set()
    assert set(together) == set(alone) | (extra if stages > 1 else set())


def test_names_of_both_layer_specs_are_one() -> None:
    engine = {
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "decoder.layers.1.self_attention.q_layernorm.weight",
        "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight",
    }
    local = {
        "decoder.layers.1.input_layernorm.weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "decoder.layers.1.self_attention.q_layernorm.weight",
        "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.layers.1.mlp.linear_fc1.weight",
        "decoder.final_layernorm.weight",
    }
    expected = {name.replace("layers.1.", "layers.13.") for name in local}
    assert {canonical_name(name, 12) for name in engine} == expected
    assert {canonical_name(name, 12) for name in local} == expected
