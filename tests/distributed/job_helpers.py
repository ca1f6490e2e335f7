"""A small RLHF job on test ranks: its folders, its arguments, and samples without an engine."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample
from tests.distributed.model_helpers import VOCABULARY, make_hf_model

MAX_PROMPT, MAX_NEW = 12, 16
EOS = 1


def make_folders(root: Path, actor: str = "llama") -> None:
    """Writes ROOT/actor, ROOT/scalar and ROOT/prompts.jsonl; `actor` is one of KINDS.

    Only a llama keeps this tokenizer: of a Qwen folder transformers makes Qwen's own.
    """
    make_hf_model(actor, "language", root / "actor")
    make_hf_model("llama", "scalar", root / "scalar")
    _make_tokenizer().save_pretrained(root / "actor")
    lines = [json.dumps({"prompt": f"w{n} w{n + 1} w{n % 7 + 3}"}) for n in range(3, 24)]
    (root / "prompts.jsonl").write_text("\n".join(lines))


def _make_tokenizer() -> Any:
    """A word per token; fewer words than the model has rows, as is usual."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<eos>": EOS, "<unk>": 2} | {f"w{n}": n for n in range(3, 90)}
    tokenizer = Tokenizer(models.WordLevel(vocab=words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def parse_job(root: Path, *flags: str) -> Namespace:
    """Arguments of a job on the folders of `make_folders`, through the program's own parser."""
    from megatron_rlhfuse.arguments import parse_arguments

    given = f"""
        --actor-model {root}/actor --reward-model {root}/scalar --prompt-data {root}/prompts.jsonl
        --rollout-max-prompt-tokens {MAX_PROMPT} --rollout-max-new-tokens {MAX_NEW}
        --rlhfuse-run-dir {root}/run --no-rlhfuse-trace
    """
    command, sys.argv = sys.argv, ["pretrain_rlhf.py", *given.split(), *flags]
    try:
        return parse_arguments()
    finally:
        sys.argv = command


def changed(args: Namespace, **values: object) -> Namespace:
    """The arguments with other values; the actor is described in the layout they then name."""
    from megatron_rlhfuse.models.hf_config import apply_shape

    other = copy.copy(args)
    for name, value in values.items():
        assert hasattr(other, name), name
        setattr(other, name, value)
    return apply_shape(
        other,
        other.actor_shape,
        other.tensor_model_parallel_size,
        other.pipeline_model_parallel_size,
    )


def make_sample(sample_id: int, seed: int, prompt: tuple[int, ...] | None = None) -> Sample:
    """Random tokens, a function of the seed; lengths differ widely."""
    draw = random.Random(seed)
    if prompt is None:
        prompt = tuple(draw.choices(range(3, VOCABULARY), k=draw.randint(1, MAX_PROMPT)))
    response = tuple(draw.choices(range(3, VOCABULARY), k=draw.randint(1, MAX_NEW)))
    return Sample(
        sample_id=sample_id,
        prompt=prompt,
        response=response,
        log_probs=tuple(draw.uniform(-6, -3) for _ in response),
        stop_reason="length" if len(response) == MAX_NEW else "stop",
        weight_version=0,
        instance=0,
        started=0.0,
        finished=0.0,
    )


class StubEngine:
    """Stands for `GenerationEngine`: random tokens, a function of the request's seed."""

    pid = None
    restarts = recomputed_tokens = 0

    def __init__(self, instance: int, options: Any, sampling: Any) -> None:
        self.instance, self.options = instance, options
        self._version = -1
        self._requests: list[Any] = []

    @property
    def unfinished(self) -> int:
        return len(self._requests)

    def submit(self, requests: Sequence[Any]) -> None:
        self._requests = list(requests)

    def poll(self, timeout_s: float) -> list[Sample]:
        made = [make_sample(r.sample_id, r.seed, r.prompt) for r in self._requests]
        self._requests = []
        return [replace(s, instance=self.instance, weight_version=self._version) for s in made]

    def update_weights(self, stream: Iterable[Any], version: int) -> None:
        self._version = version
        for _ in stream:
            pass

    def _nothing(self) -> None: ...

    start = wait_until_ready = sleep = wake = close = _nothing


def make_scored(sample: Sample, log_probs: Tensor, seed: int) -> ScoredSample:
    """The sample with random scores; its log-probabilities all near those given, [response]."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4, len(sample.response), generator=generator)
    rollout = (log_probs + 0.3 * noise[3]).tolist()
    return ScoredSample(
        sample=replace(sample, log_probs=tuple(rollout)),
        log_probs=log_probs + 0.1 * noise[0],
        reference_log_probs=log_probs + 0.3 * noise[1],
        values=noise[2],
        score=random.Random(-1 - seed).gauss(0, 1),
    )


def digest_of(value: Any) -> str:
    """Equal for values that are equal bit for bit, tensors and arrays inside them included."""
    found = hashlib.sha256()
    for piece in _pieces(value):
        found.update(piece)
    return found.hexdigest()


def _pieces(value: Any) -> Iterator[bytes]:
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield flat.view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield str(key).encode()
            yield from _pieces(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _pieces(item)
    elif hasattr(value, "tobytes"):
        yield value.tobytes()
    else:
        yield repr(value).encode()
