"""Jobs as far as flags are concerned: parsed in this process, with folders of configs only."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Parse = Callable[..., argparse.Namespace]

LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 256,
}
CLASSIFIER = {
    **LLAMA,
    "architectures": ["LlamaForSequenceClassification"],
    "id2label": {"0": "score"},
}


@pytest.fixture(scope="session")
def parser() -> argparse.ArgumentParser:
    """Megatron's parser with our groups; made once, for it takes an import of five seconds."""
    from megatron_rlhfuse import compat, platform

    platform.prepare()
    compat.apply()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_rlhfuse.arguments import add_rlhfuse_arguments

    made = argparse.ArgumentParser(prog="test", allow_abbrev=False)
    return add_rlhfuse_arguments(add_megatron_arguments(made))


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Folders of models, as far as flags are concerned: their configs."""
    configs: dict[str, dict[str, Any]] = {
        "actor": LLAMA,
        "reward": CLASSIFIER,
        "short": {**LLAMA, "max_position_embeddings": 32},
        "other-words": {**CLASSIFIER, "vocab_size": 99},
        "five-layers": {**CLASSIFIER, "num_hidden_layers": 5},
        "gpt": {**LLAMA, "model_type": "gpt2"},
    }
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "file").write_text("")
    return tmp_path


@pytest.fixture
def parse(parser: argparse.ArgumentParser, folders: Path) -> Parse:
    """parse("--flag value ...", world=1): the arguments of a job that runs, with these changes.

    A flag given again replaces the one before it; "-" as its value leaves it out. In a value {}
    stands for the folder of folders.
    """
    from megatron_rlhfuse.flag_rules import check_flags
    from megatron_rlhfuse.validation import complete_flags

    def parsed(flags: str = "", world: int = 1) -> argparse.Namespace:
        given = {
            "--actor-model": "{}/actor",
            "--reward-model": "{}/reward",
            "--prompt-data": "prompts.jsonl",
            "--rollout-batch-size": "16",
            "--global-batch-size": "8",
            "--micro-batch-size": "2",
            "--train-iters": "4",
            "--lr": "1e-4",
            "--rollout-max-prompt-tokens": "64",
            "--rollout-max-new-tokens": "64",
            "--rlhfuse-run-dir": "{}/run",
        }
        for word in flags.replace(" --", "\n--").splitlines():
            name, _, value = word.partition(" ")
            given[name] = value
        words = [w for n, v in given.items() if v != "-" for w in (n, *v.split())]
        args = parser.parse_args([word.replace("{}", str(folders)) for word in words])
        args.rank, args.world_size = 0, world
        check_flags(args)
        return complete_flags(args)

    return parsed


def refusal(parse: Parse, flags: str, world: int = 1) -> str:
    from megatron_rlhfuse.flag_error import FlagError

    with pytest.raises(FlagError) as error:
        parse(flags, world)
    return str(error.value)
