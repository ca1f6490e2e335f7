"""A tiny Llama whose answers are known, as a Hugging Face folder: it counts.

Rows of the embedding are random signs, and a row of the output layer is that of the token before:
after token n the model says n + 1, in any dtype. Attention and MLP are random and add a little
noise, so that their weights matter and have gradients.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

VOCABULARY = 64
HIDDEN = 128
LAYERS = 2
HEADS = 2  # of 64 dimensions, which every attention backend knows
FFN = 256
LENGTH = 64
BOS, EOS, PAD = range(60, 63)  # and one for unknown words

NOISE = 0.02
"""Standard deviation of random weights: what the layers add stays below a tenth of a sign."""
CONFIDENCE = 0.2
"""Scale of the output layer: the next number gets a logit of 0.2 * 128, others +-2."""


def make_weights() -> dict[str, torch.Tensor]:
    """Hugging Face name -> float32 tensor; the same at every call."""
    generator = torch.Generator().manual_seed(1)

    def noise(rows: int, columns: int) -> torch.Tensor:
        return NOISE * torch.randn(rows, columns, generator=generator)

    signs = 2.0 * torch.randint(0, 2, (VOCABULARY, HIDDEN), generator=generator) - 1.0
    weights = {
        "model.embed_tokens.weight": signs,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": CONFIDENCE * signs.roll(1, dims=0),
    }
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        weights |= {
            f"{name}.self_attn.{each}_proj.weight": noise(HIDDEN, HIDDEN) for each in "qkvo"
        }
        weights |= {f"{name}.mlp.{each}_proj.weight": noise(FFN, HIDDEN) for each in ("gate", "up")}
        weights[f"{name}.mlp.down_proj.weight"] = noise(HIDDEN, FFN)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{name}.{norm}.weight"] = torch.ones(HIDDEN)
    return weights


def write(folder: Path) -> None:
    """Writes the model: config.json, model.safetensors and a tokenizer of numbers as words."""
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    # By hand: transformers takes seconds to import, and an engine's parent needs none of it.
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": False,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(make_weights(), folder / "model.safetensors", metadata={"format": "pt"})
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    words = {str(number): number for number in range(BOS)}
    words |= {token: BOS + n for n, token in enumerate(special.values())}
    numbers = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    numbers.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    numbers.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
