"""Commands that start jobs, as far as their flags are concerned: nothing is started."""

from __future__ import annotations

import argparse
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.run import get_args_parser, parse_min_max_nnodes

from tests.docs.documents import Command
from tests.unit.conftest import CLASSIFIER, LLAMA

STANDS_FOR_MORE = "..."
"""In the place of a job's flags."""


class Launch(NamedTuple):
    """What torchrun makes of a command."""

    ranks: int
    restarts: int
    flags: list[str]


def launch(command: Command) -> Launch:
    """Raises SystemExit where torchrun would refuse."""
    words = list(command.words)
    script = next(i for i, word in enumerate(words) if word.endswith("pretrain_rlhf.py"))
    if "torchrun" not in words[0] and "torch.distributed.run" not in words[:3]:
        return Launch(1, 0, words[script + 1 :])
    first = 1 if words[0].endswith("torchrun") else words.index("torch.distributed.run") + 1
    args = get_args_parser().parse_args(words[first:])
    ranks = parse_min_max_nnodes(args.nnodes)[1] * int(args.nproc_per_node)
    return Launch(ranks, int(args.max_restarts), args.training_script_args)


def check(job: Launch, folder: Path, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """The job's arguments, by the real parser and all rules, in `folder` as current folder.

    Model folders that the flags name are made there, with configs only; what the machine lacks
    (a fused optimizer, GPUs) is taken as there. Raises SystemExit or FlagError.
    """
    from megatron_rlhfuse import compat
    from megatron_rlhfuse.flag_rules import check_flags
    from megatron_rlhfuse.validation import complete_flags

    monkeypatch.chdir(folder)
    monkeypatch.setattr(compat, "has_fused_optimizer", lambda: True)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", str(job.restarts))
    args = parser().parse_args(job.flags)
    args.rank, args.world_size = 0, job.ranks
    for name in ("actor", "critic", "reward", "reference"):
        model = getattr(args, f"{name}_model")
        if model is not None and not Path(model).exists():
            config = CLASSIFIER if name in ("reward", "critic") else LLAMA
            sizes = {"num_hidden_layers": 8, "max_position_embeddings": 4096}
            Path(model).mkdir(parents=True)
            (Path(model) / "config.json").write_text(json.dumps({**config, **sizes}))
    check_flags(args)
    return complete_flags(args)


@cache
def parser() -> argparse.ArgumentParser:
    """Megatron's with this project's flags."""
    from megatron_rlhfuse import compat, platform

    platform.prepare()
    compat.apply()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_rlhfuse.arguments import add_rlhfuse_arguments

    made = argparse.ArgumentParser(prog="pretrain_rlhf.py", allow_abbrev=False)
    return add_rlhfuse_arguments(add_megatron_arguments(made))
