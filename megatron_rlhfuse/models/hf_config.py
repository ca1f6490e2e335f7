"""A Hugging Face folder's `config.json` as a `ModelShape`, and as Megatron arguments.

Supported: dense Llama, Qwen2 and Qwen3 with a language-model or a one-label classification head.
Whatever Megatron could not compute in the same way is refused here, by folder and field.
"""

from __future__ import annotations

import copy
import json
from argparse import Namespace
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Head = Literal["language", "scalar"]

MODEL_TYPES = ("llama", "qwen2", "qwen3")
# The constants of Llama 3.1 scaling that Megatron has built in; only the factor is free.
_LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@dataclass(frozen=True)
class ModelShape:
    """Architecture of one dense decoder. Equal shapes have equal Hugging Face tensors.

    Sizes are those of the whole model, whatever the parallel layout. `head` is what the model
    ends in here; `stored_head` what the folder holds (a critic may start from a language model).
    """

    model_type: str
    head: Head
    stored_head: Head
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    norm_epsilon: float
    rotary_base: float
    rope_scaling_factor: float | None
    qkv_bias: bool
    qk_layernorm: bool
    tied_embeddings: bool
    folder: Path = field(compare=False)

    def padded_vocab_size(self, tensor_parallel: int) -> int:
        """Rows of the embedding under tensor parallelism: the next multiple of its size."""
        return -(-self.vocab_size // tensor_parallel) * tensor_parallel


def read_shape(folder: str | Path, head: Head) -> ModelShape:
    """Reads the architecture of the model in `folder`, which shall end in `head`.

    Raises:
        FileNotFoundError: there is no config.json
        ValueError: the architecture is not supported; names folder and field
    """
    folder = Path(folder)
    stored_head = _stored_head(folder, _read_json(folder / "config.json"))
    if head == "language" and stored_head == "scalar":
        raise ValueError(
            f"{folder}/config.json: 'architectures' names a sequence classifier; "
            "a language model (...ForCausalLM) is needed here"
        )
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    _refuse_unsupported(folder, config)
    heads = config.num_attention_heads
    rope = config.rope_parameters
    return ModelShape(
        model_type=config.model_type,
        head=head,
        stored_head=stored_head,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=heads,
        num_query_groups=config.num_key_value_heads or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.max_position_embeddings,
        norm_epsilon=config.rms_norm_eps,
        rotary_base=rope["rope_theta"],
        rope_scaling_factor=rope["factor"] if rope["rope_type"] == "llama3" else None,
        qkv_bias=config.model_type == "qwen2",
        qk_layernorm=config.model_type == "qwen3",
        tied_embeddings=config.tie_word_embeddings,
        folder=folder,
    )


def apply_shape(
    args: Namespace,
    shape: ModelShape,
    tensor_parallel: int,
    pipeline_parallel: int,
    flag_prefix: str = "",
) -> Namespace:
    """A copy of Megatron's arguments that describes the model `shape` in this layout.

    Args:
        args: validated Megatron arguments of the job; left as they are
        flag_prefix: what stands before the parallel flags of this model in messages: "" for
            --tensor-model-parallel-size, "critic-" for --critic-tensor-model-parallel-size

    Raises:
        ValueError: the model cannot be cut that way; names the flag
    """
    _refuse_layout(args, shape, tensor_parallel, pipeline_parallel, flag_prefix)
    described = copy.copy(args)
    llama3 = shape.rope_scaling_factor is not None
    fields: dict[str, Any] = {
        "num_layers": shape.num_layers,
        "hidden_size": shape.hidden_size,
        "ffn_hidden_size": shape.ffn_hidden_size,
        "num_attention_heads": shape.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "normalization": "RMSNorm",
        "layernorm_epsilon": shape.norm_epsilon,
        "swiglu": True,
        "add_bias_linear": False,
        "add_qkv_bias": shape.qkv_bias,
        "qk_layernorm": shape.qk_layernorm,
        "add_position_embedding": True,
        "position_embedding_type": "rope",
        "rotary_base": shape.rotary_base,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "use_rope_scaling": llama3,
        "rope_scaling_factor": shape.rope_scaling_factor if llama3 else 1.0,
        "untie_embeddings_and_output_weights": not shape.tied_embeddings,
        "vocab_size": shape.vocab_size,
        "padded_vocab_size": shape.padded_vocab_size(tensor_parallel),
        "make_vocab_size_divisible_by": 1,
        "max_position_embeddings": shape.max_position_embeddings,
        # One random stream feeds several models: dropout would tie the result to their order.
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tensor_model_parallel_size": tensor_parallel,
        # Megatron derives these three from the actor's size when it validates arguments.
        "tensor_parallel_num_weight_shards": tensor_parallel,
        "expert_tensor_parallel_size": tensor_parallel,
        "expert_tensor_parallel_num_weight_shards": tensor_parallel,
        "pipeline_model_parallel_size": pipeline_parallel,
        "data_parallel_size": args.world_size // (tensor_parallel * pipeline_parallel),
        "sequence_parallel": args.sequence_parallel and tensor_parallel > 1,
    }
    for name, value in fields.items():
        setattr(described, name, value)
    return described


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no Hugging Face model folder: no {path.name}")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _stored_head(folder: Path, raw: dict[str, Any]) -> Head:
    model_type = raw.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{folder}/config.json: 'model_type' is {model_type!r}; "
            f"supported are {', '.join(MODEL_TYPES)}"
        )
    names = raw.get("architectures") or []
    if len(names) == 1 and names[0].endswith("ForCausalLM"):
        return "language"
    if len(names) == 1 and names[0].endswith("ForSequenceClassification"):
        return "scalar"
    raise ValueError(
        f"{folder}/config.json: 'architectures' is {names}; it must name one model that ends in "
        "ForCausalLM or ForSequenceClassification"
    )


def _refuse_unsupported(folder: Path, config: Any) -> None:
    def refuse(name: str, remedy: str) -> None:
        value = getattr(config, name)
        raise ValueError(f"{folder}/config.json: '{name}' is {value!r}; {remedy}")

    if config.hidden_act != "silu":
        refuse("hidden_act", "only 'silu' (SwiGLU) is supported")
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False):
            refuse(name, "such biases are not supported; of Qwen2 only the q, k, v ones are")
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention"}:
        refuse("layer_types", "sliding-window attention is not supported")
    if getattr(config, "sliding_window", None) is not None:
        refuse("sliding_window", "sliding-window attention is not supported")
    if config.num_labels != 1 and _is_classifier(config):
        refuse("num_labels", "a scalar head needs exactly one label ('id2label' with one entry)")
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type")
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        refuse("rope_parameters", "only 'rope_type' default and llama3, over whole heads")
    if kind == "llama3" and any(rope.get(k) != v for k, v in _LLAMA3_SCALING.items()):
        refuse("rope_parameters", f"Megatron's llama3 scaling has {_LLAMA3_SCALING} built in")


def _is_classifier(config: Any) -> bool:
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())


def _refuse_layout(
    args: Namespace, shape: ModelShape, tensor: int, pipeline: int, flag_prefix: str
) -> None:
    tensor_flag = f"--{flag_prefix}tensor-model-parallel-size {tensor}"
    pipeline_flag = f"--{flag_prefix}pipeline-model-parallel-size {pipeline}"
    if shape.num_layers % pipeline:
        raise ValueError(
            f"{pipeline_flag} does not divide the {shape.num_layers} layers of {shape.folder}"
        )
    for count, what in (
        (shape.num_attention_heads, "attention heads"),
        (shape.num_query_groups, "key-value heads"),
        (shape.ffn_hidden_size, "feed-forward columns"),
    ):
        if count % tensor:
            raise ValueError(f"{tensor_flag} does not divide the {count} {what} of {shape.folder}")
    if args.context_parallel_size != 1:
        raise ValueError("--context-parallel-size must be 1: context parallelism is not supported")
    uneven = {
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "pipeline_model_parallel_layout": None,
        "account_for_embedding_in_pipeline_split": False,
        "account_for_loss_in_pipeline_split": False,
    }
    for name, unset in uneven.items():
        if getattr(args, name, unset) != unset:
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} is not supported: every stage holds the same layers")
