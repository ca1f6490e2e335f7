"""Trains both toy models, measures on the actor's own samples what they promise, and saves them."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from .corpus import draw_example, questions, render_prompt
from .packing import Document
from .preference import draw_pair
from .sampling import sample_responses
from .tokenizer import encode_example, make_tokenizer
from .training import pair_scores, scores, train_actor, train_reward

THREADS = 2
"""Fixed: sums in another order would give other weights."""
MEASURED_SAMPLES = 1024
MAX_NEW_TOKENS = 160
LEAST_SKEW = 5.0
"""P99 of the response length over its median."""
HELD_OUT_PAIRS = 1000
LEAST_ACCURACY = 0.9
SCORED_AT_ONCE = 128


def build_models(folder: Path, seed: int) -> dict[str, Any]:
    """Writes `folder`/actor and `folder`/reward; what was measured, as toy.json reports it.

    Raises RuntimeError when lengths or reward model miss what the toy input is for.
    """
    torch.set_num_threads(THREADS)
    transformers.utils.logging.disable_progress_bar()
    began = time.perf_counter()
    tokenizer = make_tokenizer()
    actor = train_actor(tokenizer, seed)
    actor_done = time.perf_counter()
    reward = train_reward(tokenizer, actor, seed)
    reward_done = time.perf_counter()

    rng = random.Random(f"measure/{seed}")
    examples = [draw_example(rng, list(questions())) for _ in range(MEASURED_SAMPLES)]
    asked = [example.question for example in examples]
    responses = sample_responses(actor, tokenizer, asked, MAX_NEW_TOKENS, seed)
    documents = []
    for question, response in zip(asked, responses, strict=True):
        prompt = tokenizer.encode(render_prompt(question))
        documents.append((prompt + response, len(prompt)))
    reward_report = _measure_and_scale(reward, tokenizer, documents, seed)
    lengths = _lengths([len(response) for response in responses])
    for name, value, least in (
        ("the skew of the response lengths (P99 / median)", lengths["skew"], LEAST_SKEW),
        ("the accuracy of the reward model", reward_report["pair_accuracy"], LEAST_ACCURACY),
    ):
        if value < least:
            raise RuntimeError(f"{name} is {value}, below {least}: try another --seed")

    for name, model in (("actor", actor), ("reward", reward)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    finished = sum(response[-1] == tokenizer.eos_token_id for response in responses)
    corpus = [encode_example(tokenizer, example) for example in examples]
    return {
        "response_tokens": {**lengths, "cap": MAX_NEW_TOKENS, "finished": finished},
        "corpus_response_tokens": _lengths([len(tokens) - prompt for tokens, prompt in corpus]),
        "reward": reward_report,
        "seconds": {
            "actor": round(actor_done - began, 1),
            "reward": round(reward_done - actor_done, 1),
            "total": round(time.perf_counter() - began, 1),
        },
    }


@torch.inference_mode()
def _measure_and_scale(
    reward: LlamaForSequenceClassification,
    tokenizer: PreTrainedTokenizerFast,
    samples: Sequence[Document],
    seed: int,
) -> dict[str, float]:
    """Scales the head so that rewards of the actor's samples have standard deviation 1."""
    rng = random.Random(f"held out/{seed}")
    pairs = [draw_pair(rng, list(questions())) for _ in range(HELD_OUT_PAIRS)]
    correct = 0
    for start in range(0, len(pairs), SCORED_AT_ONCE):
        chosen, rejected = pair_scores(reward, tokenizer, pairs[start : start + SCORED_AT_ONCE])
        correct += int((chosen > rejected).sum())
    parts = [
        scores(reward, samples[start : start + SCORED_AT_ONCE], tokenizer.pad_token_id)
        for start in range(0, len(samples), SCORED_AT_ONCE)
    ]
    sample_scores = torch.cat(parts)
    scale = sample_scores.std()
    reward.score.weight.div_(scale)
    return {
        "pair_accuracy": round(correct / len(pairs), 4),
        "held_out_pairs": len(pairs),
        "sample_mean": round((sample_scores / scale).mean().item(), 4),
        "sample_std": 1.0,
    }


def _lengths(lengths: Sequence[int]) -> dict[str, float]:
    """Order statistics of response lengths in tokens; `skew` is P99 over the median."""
    ordered = sorted(lengths)
    median, p99 = (ordered[int(share * len(ordered))] for share in (0.5, 0.99))
    return {
        "samples": len(ordered),
        "median": median,
        "p99": p99,
        "max": ordered[-1],
        "skew": round(p99 / median, 2),
    }
