"""Tiny models and real engines for end-to-end tests.

An engine takes many seconds to start, so tests share what they do not break.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from megatron_rlhfuse.rollout.engine import EngineOptions, GenerationEngine
from megatron_rlhfuse.rollout.samples import GenerationRequest, SamplingOptions, sample_seed

BOS, EOS, PAD, UNKNOWN = 256, 257, 258, 259

# One set of options that makes every way to end a response common among 16 samples.
SAMPLING = SamplingOptions(
    temperature=0.8,
    max_new_tokens=48,
    min_new_tokens=4,
    stop_token_ids=tuple(range(0, 256, 20)),
)

Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class TinyModel:
    """A random Llama with a byte tokenizer: a folder for vLLM, the model itself as reference."""

    folder: Path
    reference: LlamaForCausalLM

    def weights(self, version: int) -> Weights:
        """One of many versions of the weights, as a stream would bring it; 0 is the folder's."""
        generator = torch.Generator().manual_seed(version)
        tied = {"lm_head.weight"} if self.reference.config.tie_word_embeddings else set()
        scale = 0.05 if version else 0.0
        return {
            name: tensor + scale * torch.randn(tensor.shape, generator=generator)
            for name, tensor in self.reference.state_dict().items()
            if name not in tied
        }

    def log_probs(
        self, weights: Weights, prompt: tuple[int, ...], response: tuple[int, ...]
    ) -> torch.Tensor:
        """[response] float32: what Hugging Face gives the response under SAMPLING."""
        state = dict(weights)
        if self.reference.config.tie_word_embeddings:
            state["lm_head.weight"] = state["model.embed_tokens.weight"]
        tokens = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logits = torch.func.functional_call(self.reference, state, (tokens,)).logits[0]
        logits = logits[len(prompt) - 1 : -1].float()
        stops = [*SAMPLING.stop_token_ids, EOS]
        logits[: SAMPLING.min_new_tokens, stops] = -torch.inf
        chosen = torch.tensor(response)[:, None]
        return (logits / SAMPLING.temperature).log_softmax(-1).gather(1, chosen)[:, 0]


def make_tiny_model(folder: Path, **changes: Any) -> TinyModel:
    """Writes a model folder; `changes` go to its LlamaConfig."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,  # vLLM's CPU attention knows no head dimension below 32
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,  # wide enough that the distributions are far from uniform
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        **changes,
    )
    model = LlamaForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"<s>": BOS, "</s>": EOS, "<pad>": PAD, "<unk>": UNKNOWN}
    vocabulary = {letter: token for token, letter in enumerate(letters)} | special
    bytes_only = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    ).save_pretrained(folder)
    return TinyModel(folder, model)


def engine_options(model: TinyModel, log_file: Path, **changes: Any) -> EngineOptions:
    """Options of a small engine on a CPU."""
    values: dict[str, Any] = {
        "model": str(model.folder),
        "tensor_parallel_size": 1,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 32,
        "kv_cache_bytes": 32 << 20,
        "gpu_memory_utilization": 0.5,
        "enforce_eager": True,
        "block_size": 32,
        "seed": 0,
        "device": "cpu",
        "visible_devices": None,
        "log_file": str(log_file),
        "start_timeout_s": 240.0,
        "step_timeout_s": 60.0,
        "enable_sleep": False,
    }
    return EngineOptions(**(values | changes))


def requests(count: int, prompt_tokens: int = 70) -> list[GenerationRequest]:
    """Requests whose prompts share their first 40 tokens, more than a block of the KV cache."""
    shared = tuple(token * 7 % 251 for token in range(40))
    return [
        GenerationRequest(
            sample_id=number,
            prompt=shared
            + tuple(
                (number * 31 + token * 11) % 251 for token in range(prompt_tokens - 40 - number)
            ),
            seed=sample_seed(3, 1, number),
        )
        for number in range(count)
    ]


MakeEngine = Callable[..., GenerationEngine]


@contextlib.contextmanager
def closing_engines(log_folder: Path) -> Iterator[MakeEngine]:
    """Makes and starts engines, which are closed at the end whatever happened."""
    engines: list[GenerationEngine] = []

    def make(model: TinyModel, instance: int, **changes: Any) -> GenerationEngine:
        options = engine_options(model, log_folder / f"engine{instance}.log", **changes)
        engine = GenerationEngine(instance, options, SAMPLING)
        engines.append(engine)
        engine.start()
        return engine

    try:
        yield make
    finally:
        for engine in engines:
            engine.close()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def engines(
    tiny_model: TinyModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[GenerationEngine, GenerationEngine]]:
    """Two running engines, started together; tests give them the weights they need."""
    with closing_engines(tmp_path_factory.mktemp("engine-logs")) as make:
        pair = make(tiny_model, 0), make(tiny_model, 1)
        for engine in pair:
            engine.wait_until_ready()
        yield pair


@pytest.fixture(scope="session")
def fresh_engine(
    tiny_model: TinyModel, engines: tuple[GenerationEngine, GenerationEngine]
) -> GenerationEngine:
    """An engine that never had other weights than version 2; not to be updated."""
    engines[1].update_weights(tiny_model.weights(2).items(), 2)
    return engines[1]


@pytest.fixture(scope="session")
def engine(engines: tuple[GenerationEngine, GenerationEngine]) -> GenerationEngine:
    """An engine for any use that leaves it alive; its weights are whatever the last test set."""
    return engines[0]


@pytest.fixture(scope="module")
def make_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeEngine]:
    """Makes engines of a test file's own."""
    with closing_engines(tmp_path_factory.mktemp("engine-logs")) as make:
        yield make
