"""Hugging Face configs: what is read, what is refused, and the Megatron arguments that follow."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse.models.hf_config import apply_shape, read_shape

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "rms_norm_eps": 2e-5,
    "vocab_size": 101,
    "tie_word_embeddings": False,
    "rope_theta": 50000.0,
}
QWEN2 = {
    **LLAMA,
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "tie_word_embeddings": True,
}
QWEN3 = {
    **LLAMA,
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 24,
}
SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _folder(tmp_path: Path, config: dict[str, Any]) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def _args(**changes: Any) -> Namespace:
    known = {"world_size": 8, "sequence_parallel": False, "context_parallel_size": 1}
    return Namespace(**{**known, "num_layers": 1, "seed": 7, **changes})


def test_sizes_are_read(tmp_path: Path) -> None:
    shape = read_shape(_folder(tmp_path, LLAMA), "language")
    assert (shape.num_layers, shape.hidden_size, shape.ffn_hidden_size) == (6, 64, 112)
    assert (shape.num_attention_heads, shape.num_query_groups, shape.head_dim) == (8, 4, 8)
    assert (shape.vocab_size, shape.max_position_embeddings) == (101, 512)
    assert (shape.norm_epsilon, shape.rotary_base) == (2e-5, 50000.0)
    assert shape.rope_scaling_factor is None
    assert not (shape.qkv_bias or shape.qk_layernorm or shape.tied_embeddings)


def test_families_differ_in_bias_norm_and_head_size(tmp_path: Path) -> None:
    qwen2 = read_shape(_folder(tmp_path, QWEN2), "language")
    assert qwen2.qkv_bias and qwen2.tied_embeddings and not qwen2.qk_layernorm
    qwen3 = read_shape(_folder(tmp_path, QWEN3), "language")
    assert qwen3.qk_layernorm and not qwen3.qkv_bias
    assert qwen3.head_dim == 24


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": SCALING},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}},
        {"rope_parameters": {"rope_theta": 5e5, **SCALING}},
    ],
)
def test_both_spellings_of_rope_scaling_are_read(tmp_path: Path, spelling: dict[str, Any]) -> None:
    config = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    shape = read_shape(_folder(tmp_path, {**config, **spelling}), "language")
    assert (shape.rotary_base, shape.rope_scaling_factor) == (5e5, 32.0)


def test_heads(tmp_path: Path) -> None:
    critic = read_shape(_folder(tmp_path, LLAMA), "scalar")
    assert (critic.head, critic.stored_head) == ("scalar", "language")
    classifier = {
        **LLAMA,
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "LABEL_0"},
    }
    reward = read_shape(_folder(tmp_path, classifier), "scalar")
    assert (reward.head, reward.stored_head) == ("scalar", "scalar")
    with pytest.raises(ValueError, match="'architectures' names a sequence classifier"):
        read_shape(tmp_path, "language")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"model_type": "gemma2"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"architectures": None}, "architectures"),
        ({"architectures": ["LlamaForTokenClassification"]}, "architectures"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_parameters"),
        ({"rope_scaling": {**SCALING, "high_freq_factor": 8.0}}, "rope_parameters"),
        (
            {"rope_scaling": {**SCALING, "original_max_position_embeddings": 4096}},
            "rope_parameters",
        ),
        (
            {
                "architectures": ["LlamaForSequenceClassification"],
                "id2label": {"0": "a", "1": "b"},
                "label2id": {"a": 0, "b": 1},
            },
            "num_labels",
        ),
    ],
)
def test_what_megatron_would_compute_otherwise_is_refused(
    tmp_path: Path, change: dict[str, Any], field: str
) -> None:
    folder = _folder(tmp_path, {**LLAMA, **change})
    with pytest.raises(ValueError, match=f"{folder}/config.json: '{field}'"):
        read_shape(folder, "scalar")


@pytest.mark.parametrize("config", [QWEN2, QWEN3])
def test_sliding_windows_are_refused_where_they_are_active(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    window = {"sliding_window": 64, "max_window_layers": 3}
    inactive = _folder(tmp_path, {**config, **window, "use_sliding_window": False})
    read_shape(inactive, "language")
    active = _folder(tmp_path, {**config, **window, "use_sliding_window": True})
    with pytest.raises(ValueError, match="sliding-window"):
        read_shape(active, "language")


def test_a_folder_without_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path} is no Hugging Face model folder"):
        read_shape(tmp_path, "language")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        read_shape(tmp_path, "language")


def test_arguments_describe_the_model_and_the_jobs_own_stay(tmp_path: Path) -> None:
    shape = read_shape(_folder(tmp_path, QWEN3), "language")
    args = _args(sequence_parallel=True)
    described = apply_shape(args, shape, tensor_parallel=2, pipeline_parallel=3)
    assert args.num_layers == 1 and not hasattr(args, "hidden_size")
    assert described.seed == 7
    assert (described.num_layers, described.kv_channels, described.num_query_groups) == (6, 24, 4)
    assert (described.normalization, described.layernorm_epsilon) == ("RMSNorm", 2e-5)
    assert described.swiglu and described.qk_layernorm and described.group_query_attention
    assert not (described.add_bias_linear or described.add_qkv_bias)
    assert described.untie_embeddings_and_output_weights
    assert (described.vocab_size, described.padded_vocab_size) == (101, 102)
    assert (described.tensor_model_parallel_size, described.pipeline_model_parallel_size) == (2, 3)
    assert described.sequence_parallel
    assert described.attention_dropout == described.hidden_dropout == 0.0


def test_the_vocabulary_is_padded_only_as_far_as_needed(tmp_path: Path) -> None:
    shape = read_shape(_folder(tmp_path, LLAMA), "language")
    assert [shape.padded_vocab_size(size) for size in (1, 2, 4)] == [101, 102, 104]
    assert not apply_shape(_args(sequence_parallel=True), shape, 1, 1).sequence_parallel


@pytest.mark.parametrize(
    ("tensor", "pipeline", "prefix", "message"),
    [
        (1, 4, "", "^--pipeline-model-parallel-size 4 does not divide the 6 layers"),
        (1, 4, "critic-", "^--critic-pipeline-model-parallel-size 4 does not divide"),
        (8, 1, "critic-", "^--critic-tensor-model-parallel-size 8 .* 4 key-value heads"),
        (3, 1, "", "^--tensor-model-parallel-size 3 .* 8 attention heads"),
    ],
)
def test_a_cut_that_does_not_fit_names_its_flag(
    tmp_path: Path, tensor: int, pipeline: int, prefix: str, message: str
) -> None:
    shape = read_shape(_folder(tmp_path, LLAMA), "language")
    with pytest.raises(ValueError, match=message):
        apply_shape(_args(), shape, tensor, pipeline, prefix)


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"context_parallel_size": 2}, "--context-parallel-size"),
        ({"decoder_first_pipeline_num_layers": 2}, "--decoder-first-pipeline-num-layers"),
        ({"num_layers_per_virtual_pipeline_stage": 1}, "--num-layers-per-virtual-pipeline-stage"),
    ],
)
def test_layouts_that_are_not_supported_name_their_flag(
    tmp_path: Path, change: dict[str, Any], flag: str
) -> None:
    shape = read_shape(_folder(tmp_path, LLAMA), "language")
    with pytest.raises(ValueError, match=flag):
        apply_shape(_args(**change), shape, 1, 1)
