"""A model of random weights for rollout.py, large enough that computing it takes a while."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIDDEN, LAYERS = 768, 8


def make_random_model(folder: Path, tokenizer: Path) -> None:
    """Writes a Llama of 52 million parameters, with the tokenizer of another model."""
    import torch
    from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

    small = AutoConfig.from_pretrained(tokenizer)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=small.vocab_size,
            hidden_size=HIDDEN,
            intermediate_size=2048,
            num_hidden_layers=LAYERS,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=4096,
            bos_token_id=small.bos_token_id,
            eos_token_id=small.eos_token_id,
            pad_token_id=small.pad_token_id,
        )
    )
    model.save_pretrained(folder)
    for path in (*tokenizer.glob("*token*"), *tokenizer.glob("*.jinja")):
        shutil.copy(path, folder / path.name)


def no_reward(prompt: str, response: str, fields: Mapping[str, Any]) -> float:
    """A reward function, which a job must have: its value is not used."""
    return 0.0
