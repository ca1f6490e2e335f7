"""Trains the toy actor on the corpus, and the toy reward model on preference pairs.

Both are functions of (seed, steps) alone on one kind of machine: the thread count is fixed by the
caller, and every draw comes from a seeded generator.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from .corpus import Example, draw_example, questions
from .packing import Document, PackedRows, pack
from .preference import draw_pair
from .tokenizer import encode_example

ROW_LENGTH = 256
ACTOR_STEPS = 200
ACTOR_DOCUMENTS = 64
"""Documents of a step."""
ACTOR_LEARNING_RATE = 3e-3
REWARD_STEPS = 120
REWARD_PAIRS = 32
"""Pairs of a step."""
REWARD_LEARNING_RATE = 1e-3
WARM_UP = 0.1
"""Share of the steps in which the learning rate rises; it then falls to 0 along a line."""
CENTERING = 0.01
"""Weight of (chosen + rejected)^2, which keeps rewards around zero: the head has no bias."""


def actor_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """4 layers for 1, 2 or 4 pipeline stages; 2 key-value heads for 2 tensor-parallel ranks."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def train_actor(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A model of the corpus's responses (the prompt's tokens are not trained on)."""
    torch.manual_seed(seed)
    rng = random.Random(f"actor/{seed}")
    all_questions = list(questions())
    model = LlamaForCausalLM(actor_config(tokenizer))

    def loss() -> Tensor:
        examples = [draw_example(rng, all_questions) for _ in range(ACTOR_DOCUMENTS)]
        documents = [encode_example(tokenizer, example) for example in examples]
        rows = pack(documents, ROW_LENGTH, tokenizer.pad_token_id)
        hidden = _hidden_states(model.model, rows)
        trained = rows.labels.flatten() >= 0
        return functional.cross_entropy(
            model.lm_head(hidden[trained]), rows.labels.flatten()[trained]
        )

    _optimize(model, loss, ACTOR_STEPS, ACTOR_LEARNING_RATE)
    return model


def train_reward(
    tokenizer: PreTrainedTokenizerFast, actor: LlamaForCausalLM, seed: int
) -> LlamaForSequenceClassification:
    """The actor's trunk with a scalar head, trained so that sigmoid(chosen - rejected) -> 1.

    The loss is that of Bradley and Terry (1952), as in Ouyang et al. 2022, section 3.5.
    """
    torch.manual_seed(seed)
    rng = random.Random(f"reward/{seed}")
    all_questions = list(questions())
    config = actor_config(tokenizer)
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    model.model.load_state_dict(actor.model.state_dict())

    def loss() -> Tensor:
        pairs = [draw_pair(rng, all_questions) for _ in range(REWARD_PAIRS)]
        chosen, rejected = pair_scores(model, tokenizer, pairs)
        centering = (chosen + rejected).square().mean()
        return -functional.logsigmoid(chosen - rejected).mean() + CENTERING * centering

    _optimize(model, loss, REWARD_STEPS, REWARD_LEARNING_RATE)
    return model


def scores(
    model: LlamaForSequenceClassification, documents: Sequence[Document], pad: int
) -> Tensor:
    """Scores of whole documents, read at their last tokens: [documents] float32."""
    rows = pack(documents, ROW_LENGTH, pad)
    return model.score(_hidden_states(model.model, rows)[rows.ends])[:, 0]


def pair_scores(
    model: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    pairs: Sequence[tuple[Example, Example]],
) -> tuple[Tensor, Tensor]:
    """Scores of the chosen and the rejected answers: each [pairs] float32."""
    documents = [encode_example(tokenizer, example) for pair in pairs for example in pair]
    chosen, rejected = scores(model, documents, tokenizer.pad_token_id).view(-1, 2).unbind(dim=1)
    return chosen, rejected


def _hidden_states(trunk: torch.nn.Module, rows: PackedRows) -> Tensor:
    """[rows * row_length, hidden] float32."""
    output = trunk(
        input_ids=rows.tokens,
        position_ids=rows.positions,
        attention_mask=rows.attention,
        use_cache=False,
    )
    return output.last_hidden_state.flatten(0, 1)


def _optimize(
    model: torch.nn.Module, loss: Callable[[], Tensor], steps: int, learning_rate: float
) -> None:
    """AdamW with warm-up and linear decay, gradients clipped at 1."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0)
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, (steps - step) / (steps - warm_up))
    )
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
