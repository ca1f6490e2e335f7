"""An existing Megatron job, three of its lines changed: the same losses and weights, bit by bit.

And what docs/fusion.md says. Rules for its blocks:
- `json` blocks whose paragraph says "save it as `x.json`" are there as that file;
- `bash` blocks are run in a folder that has `examples/` and a tree `Megatron-LM/`;
- the `diff` block is examples/fused.patch;
- `python` blocks are run: the one with `install()` within the example's script, the others each in
  place of the call in its training loop.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.distributed.conftest import REPOSITORY, RunRanks
from tests.distributed.existing_job_checks import (
    ABSENT,
    LENGTHS,
    MICRO_BATCHES,
    RANKS,
    check_api,
)

pytestmark = pytest.mark.skipif(shutil.which("git") is None, reason="needs the git program")

GUIDE = REPOSITORY / "docs" / "fusion.md"
EXAMPLE = Path("examples/existing_megatron_job.py")
PATCH = Path("examples/fused.patch")
STEPS = 6
FLAGS = f"--pipeline {RANKS} --steps {STEPS} --micro-batches 4 --hidden 32 --layers 4".split()
SECONDS = 180
"""Of one job; half a minute on two cores, most of it for imports."""


class Block(NamedTuple):
    """A fenced block of the guide, and the text right before it."""

    language: str
    text: str
    paragraph: str


def blocks(*languages: str) -> list[Block]:
    guide = GUIDE.read_text(encoding="utf-8")
    found = [
        Block(match[1], match[2], guide[: match.start()].rstrip().rpartition("\n\n")[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    ]
    return [block for block in found if block.language in languages]


def install_block() -> str:
    (text,) = [block.text for block in blocks("python") if "install()" in block.text]
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reader's folder, once the shell blocks of the guide have run there."""
    root = tmp_path_factory.mktemp("reader")
    shutil.copytree(REPOSITORY / "examples", root / "examples")
    for name in ("pipeline_parallel/schedules.py", "package_info.py"):
        installed = metadata.distribution("megatron-core").locate_file(f"megatron/core/{name}")
        (root / "Megatron-LM/megatron/core" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(installed), root / "Megatron-LM/megatron/core" / name)
    (root / "bin").mkdir()
    command = f'#!/bin/sh\nexec "{sys.executable}" -m megatron_rlhfuse "$@"\n'
    (root / "bin/rlhfuse").write_text(command)
    (root / "bin/rlhfuse").chmod(0o755)
    for block in blocks("json"):
        name = re.search(r"save\s+it\s+as\s+`([\w-]+\.json)`", block.paragraph)
        assert name is not None
        (root / name[1]).write_text(block.text, encoding="utf-8")
    shutil.copy(root / EXAMPLE, root / "plain.py")
    for block in blocks("bash"):
        run(["bash", "-eu", "-c", block.text], root)
    (root / "installed.py").write_text(with_install((root / EXAMPLE).read_text()))
    return root


def with_install(fused: str) -> str:
    """The fused script, with Megatron's own function in the place of ours, as the guide has it."""
    head, call = install_block().rstrip().rsplit("\n", 1)
    ours = "from megatron_rlhfuse import fused_forward_backward, opposite_process_groups"
    assert ours in fused and "losses = fused_forward_backward(**both)" in fused
    fused = fused.replace(ours, f"{head}\nfrom megatron_rlhfuse import opposite_process_groups")
    return fused.replace("losses = fused_forward_backward(**both)", call)


def run(command: list[str], folder: Path) -> str:
    """Runs a command to its end; it must succeed. Returns what it printed."""
    paths = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
    }
    with (folder / "output.log").open("w+") as output:
        process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            status = process.wait(SECONDS)
        finally:
            if process.poll() is None:
                process.terminate()  # torchrun passes it on to its ranks
                process.wait(30)
        output.seek(0)
        text = output.read()
    assert status == 0, f"{command}: status {status}\n{text[-6000:]}"
    return text


def train(script: str, folder: Path) -> list[str]:
    """What a script prints of its models; the ranks print in any order."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    output = run([*command, f"--nproc-per-node={RANKS}", script, *FLAGS], folder)
    assert re.search(r"^\d+\.\d+ s per step$", output, re.MULTILINE), output[-3000:]
    return sorted(re.findall(r"^(?:first|second) model: .*$", output, re.MULTILINE))


@pytest.fixture(scope="module")
def plain(folder: Path) -> list[str]:
    return train("plain.py", folder)


def test_the_plain_job_trains_both_models(plain: list[str]) -> None:
    losses = [line for line in plain if "loss" in line]
    weights = [line for line in plain if "weights" in line]
    assert len(losses) == 2 * STEPS and len(weights) == 2 and len(set(plain)) == len(plain)


def test_three_lines_fuse_it_and_change_no_bit(plain: list[str], folder: Path) -> None:
    lines = PATCH.read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("-") for line in lines) == 3 + 1  # and the header
    assert sum(line.startswith("+") for line in lines) == 3 + 1
    assert "get_forward_backward_func" not in (folder / EXAMPLE).read_text(encoding="utf-8")
    assert train(str(EXAMPLE), folder) == plain


def test_megatrons_own_function_takes_lists_of_two(plain: list[str], folder: Path) -> None:
    script = (folder / "installed.py").read_text(encoding="utf-8")
    assert all(line.strip() in script for line in install_block().splitlines())
    assert train("installed.py", folder) == plain


@pytest.fixture(scope="module")
def api(run_ranks: RunRanks, folder: Path) -> list[dict[str, Any]]:
    snippets = [block.text for block in blocks("python") if "install()" not in block.text]
    script = str(REPOSITORY / EXAMPLE)
    return run_ranks(check_api, RANKS, script, str(folder), snippets, timeout=SECONDS)


# By name: how the message begins, and what else it says.
REFUSED = {
    "forward_step_func": ("ValueError: forward_step_func: want a list of 2", ""),
    "data_iterator": ("ValueError: data_iterator: want a list of 2", ""),
    "num_microbatches": ("ValueError: num_microbatches: want a list of 2", ""),
    "seq_length": ("ValueError: seq_length: want a list of 2", ""),
    "micro_batch_size": ("ValueError: micro_batch_size: want a list of 2", ""),
    "pg_collection": ("ValueError: pg_collection: want a list of 2", ""),
    "no list": ("ValueError: model: want a list of 2", ""),
    "number": ("ValueError: seq_length: want a list of 2", ""),
    "chunks": ("ValueError: model[1]: a list of 2", "interleaved stages"),
    "iterators": ("ValueError: data_iterator[1]: a list of 2", "interleaved stages"),
    "decoder": ("ValueError: decoder_seq_length and adjust", "leave them out"),
    "absent": (f"LayoutError: model 1 has no part on rank {ABSENT}:", "all ranks of the job"),
    "num_moe_experts": ("ValueError: model 1: mixture of experts", "Megatron's own schedule"),
    "virtual_pipeline_model_parallel_size": ("ValueError: model 1: interleaved stages", ""),
    "lengths": ("ValueError: seq_length[1]: 2 numbers for 8 micro-batches", ""),
    "nothing": ("ValueError: num_microbatches of model 1: ranks have [0]", "from 1"),
    "hidden_dropout": ("ValueError: model 1: attention_dropout and hidden_dropout must be 0", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_wrong_is_said_on_every_rank(api: list[dict[str, Any]], name: str) -> None:
    begins, says = REFUSED[name]
    for rank, found in enumerate(api):
        message = found["refused"][name]
        assert message.startswith(begins) and says in message, f"rank {rank}: {message}"


def test_every_refusal_is_checked(api: list[dict[str, Any]]) -> None:
    assert api[0]["refused"].keys() == REFUSED.keys()


def test_lengths_that_are_not_those_of_the_data(api: list[dict[str, Any]]) -> None:
    assert api[0]["mismatch"] == (  # here model 0 begins
        "ValueError: model 0, micro-batch 0: stage 0 made an output of shape [64, 2, 32], by "
        "seq_length and micro_batch_size it should be [32, 2, 32]; give them per micro-batch where "
        "they differ"
    )
    for rank in range(1, RANKS):  # wait for it in vain
        begins = rf"PipelineError: rank {rank}, .*: model 0, .* rank {rank - 1} at the other end"
        assert re.match(begins, api[rank]["mismatch"]), api[rank]["mismatch"]


def test_lengths_per_micro_batch(api: list[dict[str, Any]]) -> None:
    assert len(LENGTHS) == MICRO_BATCHES
    assert all(found["lengths"] for found in api)


def test_python_of_the_guide_trains_as_megatron_does(api: list[dict[str, Any]]) -> None:
    for found in api:
        assert all(block["equal"] for block in found["blocks"])
        # The guide's plan was made by its shell block, and is what runs.
        assert [block["source"] for block in found["blocks"]] == ["1f1b", "file"]
    assert api[0]["blocks"][0]["losses"] == MICRO_BATCHES  # of the second model: its last stage


def test_the_guide_shows_the_patch() -> None:
    (diff,) = blocks("diff")
    assert diff.text == PATCH.read_text(encoding="utf-8")


def test_the_guide_names_flags_that_there_are() -> None:
    flags = (REPOSITORY / "docs" / "flags.md").read_text(encoding="utf-8")
    guide = GUIDE.read_text(encoding="utf-8")
    for flag in re.findall(r"--(?:rlhfuse|critic|actor|reward|rollout|prompt)-[a-z-]+", guide):
        assert f"`{flag}`" in flags, flag


def test_the_guide_names_every_option() -> None:
    from dataclasses import fields

    from megatron_rlhfuse import FusionOptions

    section = GUIDE.read_text(encoding="utf-8").partition("| field of `FusionOptions`")[2]
    rows = re.findall(r"^\| `(\w+)` \|", section.partition("\n\n")[0], re.MULTILINE)
    assert sorted(rows) == sorted(field.name for field in fields(FusionOptions))
