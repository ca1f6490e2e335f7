"""Draws responses from the toy actor at temperature 1, to measure what was learned."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerFast

from .corpus import render_prompt


@torch.inference_mode()
def sample_responses(
    actor: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[str],
    max_new_tokens: int,
    seed: int,
) -> list[list[int]]:
    """One response a question, with `<eos>` unless it reached `max_new_tokens`.

    A finished response leaves the batch at once: lengths are so skewed that decoding all rows to
    the end, as `generate` does, takes six times as long.
    """
    generator = torch.Generator().manual_seed(seed)
    batch = tokenizer(
        [render_prompt(question) for question in questions],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    responses: list[list[int]] = [[] for _ in questions]
    alive = torch.arange(len(questions))
    tokens, mask = batch["input_ids"], batch["attention_mask"]
    cache = DynamicCache(config=actor.config)
    for _ in range(max_new_tokens):
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = actor(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
        )
        probabilities = output.logits[:, -1].softmax(dim=-1)
        tokens = torch.multinomial(probabilities, 1, generator=generator)
        for row, token in zip(alive.tolist(), tokens[:, 0].tolist(), strict=True):
            responses[row].append(token)
        kept = (tokens[:, 0] != tokenizer.eos_token_id).nonzero()[:, 0]
        if not len(kept):
            break
        alive, tokens = alive[kept], tokens[kept]
        mask = torch.cat([mask[kept], torch.ones_like(tokens)], dim=1)
        cache.batch_select_indices(kept)
    return responses
