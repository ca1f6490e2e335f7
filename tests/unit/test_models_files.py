"""Reading and writing of model folders: strict about tensors, whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_rlhfuse.models.convert import stage_weights
from megatron_rlhfuse.models.hf_config import ModelShape
from megatron_rlhfuse.models.load import load_hf_weights, load_stream, stage_parameters
from megatron_rlhfuse.models.save import save_hf
from megatron_rlhfuse.pipeline.groups import Layout, ModelGroups, Place

LAYOUT = Layout.blocks(4, tensor=2, pipeline=2)
FIRST = Place(0, 0, 1)


def make_shape(**changes: Any) -> ModelShape:
    fields: dict[str, Any] = {
        "model_type": "qwen2",
        "head": "language",
        "stored_head": "language",
        "num_layers": 2,
        "hidden_size": 4,
        "ffn_hidden_size": 6,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 3,
        "vocab_size": 7,
        "max_position_embeddings": 8,
        "norm_epsilon": 1e-5,
        "rotary_base": 1e4,
        "rope_scaling_factor": None,
        "qkv_bias": True,
        "qk_layernorm": False,
        "tied_embeddings": False,
        "folder": Path("model"),
    }
    return ModelShape(**{**fields, **changes})


class Model(torch.nn.Module):
    """One rank's parameters under Megatron's names, layers counted from this stage's first."""

    def __init__(self, shape: ModelShape, place: Place, engine_names: bool = False) -> None:
        super().__init__()
        self.named: dict[str, torch.nn.Parameter] = {}
        for weight in stage_weights(shape, place.stage, LAYOUT.pp):
            name = weight.name.replace(f"layers.{place.stage}.", "layers.0.")
            if engine_names:
                norm = "self_attention.linear_qkv.layer_norm_weight"
                name = name.replace("input_layernorm.weight", norm)
                name = name.replace("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight")
            values = torch.full(weight.shard_shape(LAYOUT.tp), torch.nan)
            self.named[name] = torch.nn.Parameter(values)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Any]]:
        yield from self.named.items()


def groups(place: Place) -> ModelGroups:
    return ModelGroups("test", LAYOUT, place, None)  # type: ignore[arg-type]


def tensors_of(shape: ModelShape) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        name: torch.randn(weight.source_shape(source), generator=generator)
        for weight in stage_weights(shape, 0, 1)
        for source, name in enumerate(weight.sources)
    }


def load(model: Any, tensors: dict[str, Tensor], folder: Path, shape: ModelShape) -> None:
    save_file(tensors, folder / "model.safetensors")
    load_hf_weights(model, folder, shape, groups(FIRST))


def test_engine_names_are_filled_like_local_ones(tmp_path: Path) -> None:
    shape = make_shape()
    local, engine = Model(shape, FIRST), Model(shape, FIRST, engine_names=True)
    load(local, tensors_of(shape), tmp_path, shape)
    load(engine, tensors_of(shape), tmp_path, shape)
    assert local.named.keys() != engine.named.keys()
    for mine, theirs in zip(local.named.values(), engine.named.values(), strict=True):
        assert torch.isfinite(mine).all() and torch.equal(mine, theirs)


def test_padding_rows_are_zero(tmp_path: Path) -> None:
    shape = make_shape()
    model = Model(shape, FIRST)
    load(model, tensors_of(shape), tmp_path, shape)
    embedding = model.named["embedding.word_embeddings.weight"]
    assert embedding.shape == (4, 4) and embedding[3].eq(0).all() and embedding[:3].ne(0).all()


def test_a_tensor_that_is_missing_is_named(tmp_path: Path) -> None:
    shape, tensors = make_shape(), tensors_of(make_shape())
    del tensors["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(ValueError, match=r"lacks tensors .* model\.layers\.1\.self_attn\.k_proj"):
        load(Model(shape, FIRST), tensors, tmp_path, shape)


def test_a_tensor_that_the_architecture_lacks_is_named(tmp_path: Path) -> None:
    shape, tensors = make_shape(), tensors_of(make_shape())
    tensors["model.layers.0.self_attn.o_proj.bias"] = torch.zeros(4)
    with pytest.raises(ValueError, match=r"unknown tensors .* model\.layers\.0\.self_attn\.o_proj"):
        load(Model(shape, FIRST), tensors, tmp_path, shape)


def test_tensors_that_every_folder_may_hold_are_skipped(tmp_path: Path) -> None:
    shape = make_shape(tied_embeddings=True)
    tensors = tensors_of(shape)
    tensors["lm_head.weight"] = torch.zeros(7, 4)  # the tied copy
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(2)
    load(Model(shape, FIRST), tensors, tmp_path, shape)


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    shape, tensors = make_shape(), tensors_of(make_shape())
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(8, 4)
    with pytest.raises(ValueError, match=r"up_proj.weight has shape \(8, 4\).* makes it \(6, 4\)"):
        load(Model(shape, FIRST), tensors, tmp_path, shape)


def test_a_parameter_that_nothing_fills_is_named(tmp_path: Path) -> None:
    shape = make_shape()
    model = Model(shape, FIRST)
    model.named["decoder.layers.0.mlp.linear_fc2.bias"] = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(ValueError, match=r"no Hugging Face tensor fills: .*linear_fc2\.bias"):
        load(model, tensors_of(shape), tmp_path, shape)
    del model.named["decoder.layers.0.mlp.linear_fc2.bias"]
    del model.named["decoder.layers.0.mlp.linear_fc2.weight"]
    with pytest.raises(ValueError, match=r"built without .*linear_fc2\.weight"):
        load(model, tensors_of(shape), tmp_path, shape)


def test_a_model_of_other_sizes_is_refused() -> None:
    model = Model(make_shape(ffn_hidden_size=8), FIRST)
    with pytest.raises(ValueError, match=r"linear_fc1\.weight of shape \(8, 4\).* it is \(6, 4\)"):
        list(stage_parameters(model, make_shape(), LAYOUT, FIRST))  # type: ignore[arg-type]


def test_a_folder_without_safetensors_is_named(tmp_path: Path) -> None:
    shape = make_shape()
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} holds neither"):
        load_hf_weights(Model(shape, FIRST), tmp_path, shape, groups(FIRST))  # type: ignore[arg-type]


def test_a_stream_must_bring_every_tensor_once() -> None:
    shape = make_shape()
    model: Any = Model(shape, FIRST)
    stream = list(tensors_of(shape).items())
    load_stream(model, stream, shape, groups(FIRST))
    with pytest.raises(ValueError, match=r"never came: model\.embed_tokens\.weight"):
        load_stream(model, stream[1:], shape, groups(FIRST))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight came twice"):
        load_stream(model, [stream[0], *stream], shape, groups(FIRST))


def test_a_rank_without_a_part_drains_the_stream() -> None:
    stream = iter(tensors_of(make_shape()).items())
    load_stream(None, stream, make_shape(), None)
    assert next(stream, None) is None


def source_folder(tmp_path: Path, **config: Any) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    known = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "float32"}
    (folder / "config.json").write_text(json.dumps({**known, **config}))
    for name in ("tokenizer.json", "README.md", "pytorch_model.bin"):
        (folder / name).write_text(name)
    return folder


def test_files_stay_below_their_limit_and_hold_every_tensor(tmp_path: Path) -> None:
    tensors = tensors_of(make_shape())
    total = sum(tensor.nbytes for tensor in tensors.values())
    limit = total // 3
    save_hf(tmp_path / "out", source_folder(tmp_path), iter(tensors.items()), True, limit)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == tensors.keys()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    for number, path in enumerate(files, start=1):
        assert path.name == f"model-{number:05d}-of-{len(files):05d}.safetensors"
        held = load_file(path)
        assert sum(tensor.nbytes for tensor in held.values()) <= limit
        for name, tensor in held.items():
            assert index["weight_map"][name] == path.name
            assert torch.equal(tensor, tensors[name])
    held_bytes: dict[str, int] = {}
    for name, file in index["weight_map"].items():  # in the order of the stream
        if file not in held_bytes and held_bytes:  # a file is begun only when it has to be
            assert list(held_bytes.values())[-1] + tensors[name].nbytes > limit
        held_bytes[file] = held_bytes.get(file, 0) + tensors[name].nbytes


def test_only_what_belongs_to_the_model_is_copied(tmp_path: Path) -> None:
    source = source_folder(tmp_path)
    save_hf(tmp_path / "out", source, iter(tensors_of(make_shape()).items()), True)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}


@pytest.mark.parametrize("spelling", ["dtype", "torch_dtype"])
def test_config_tells_the_dtype_that_was_saved(tmp_path: Path, spelling: str) -> None:
    source = source_folder(tmp_path)
    config = {"architectures": ["Qwen2ForCausalLM"], spelling: "float32"}
    (source / "config.json").write_text(json.dumps(config))
    tensors = ((name, tensor.bfloat16()) for name, tensor in tensors_of(make_shape()).items())
    save_hf(tmp_path / "out", source, tensors, True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())[spelling] == "bfloat16"


def test_a_critic_is_saved_as_a_classifier_with_one_label(tmp_path: Path) -> None:
    source = source_folder(tmp_path, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1})
    tensors = tensors_of(make_shape(head="scalar"))
    save_hf(tmp_path / "out", source, iter(tensors.items()), True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2ForSequenceClassification"]
    assert config["id2label"] == {"0": "LABEL_0"} and config["label2id"] == {"LABEL_0": 0}


def test_a_folder_is_replaced_only_by_a_whole_one(tmp_path: Path) -> None:
    source, tensors = source_folder(tmp_path), tensors_of(make_shape())
    save_hf(tmp_path / "out", source, iter(tensors.items()), True)

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from list(tensors.items())[:3]
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        save_hf(tmp_path / "out", source, broken(), True, max_file_bytes=16)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_hf(tmp_path / "out", source, iter(changed.items()), True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], changed[name]) for name in changed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_other_ranks_drain_the_stream_and_write_nothing(tmp_path: Path) -> None:
    stream = iter(tensors_of(make_shape()).items())
    save_hf(tmp_path / "out", source_folder(tmp_path), stream, False)
    assert next(stream, None) is None
    assert not (tmp_path / "out").exists()
