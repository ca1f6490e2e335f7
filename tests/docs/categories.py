"""How each command of a document is known to work. A new one needs a place here.

- BLOCKS: whole documents whose shell blocks another test runs from top to bottom;
- HERE: run by test_commands.py, in a reader's folder, as they stand or with a smaller budget;
- jobs: `pretrain_rlhf.py`, whose flags go through the real parser and all its rules;
- namespace: a job in a network of its own; the network is made, and what it is for is tried;
- ELSEWHERE: the same command is run by another test, or by `make test` itself;
- clusters: `scripts/slurm/*.sbatch` with options for a cluster that is not there, in blocks of
  text; the flags of the job go through the parser;
- MEASURE: what takes long and asserts nothing; its script must at least start.
"""

from __future__ import annotations

from typing import NamedTuple

from tests.docs.documents import Command


class Evidence(NamedTuple):
    """A file of the repository, and what must stand in it for the command to be run by it."""

    path: str
    needles: tuple[str, ...]


BLOCKS = {
    "docs/cluster.md": Evidence(
        "tests/slurm/test_cluster_page.py", ('"docs/cluster.md"', 'block.language == "bash"')
    ),
    "docs/planner.md": Evidence("tests/unit/test_planner_docs.py", ('"planner.md"', "run_block(")),
    "docs/fusion.md": Evidence(
        "tests/distributed/test_existing_job.py", ('"fusion.md"', 'for block in blocks("bash"):')
    ),
}
"""Their `bash` blocks."""

HERE = (
    "python pretrain_rlhf.py --rlhfuse-check",
    "rlhfuse doctor",
    "rlhfuse patch",
    "rlhfuse plan",
    "rlhfuse report",
    "rlhfuse simulate",
    "touch ",
)
"""What they begin with."""

SHORTER = {
    # tests/e2e/test_doctor.py runs the self-tests.
    "rlhfuse doctor": ("--no-self-test",),
    "rlhfuse doctor --json": ("--no-self-test",),
    "rlhfuse simulate CLUSTER.json": ("--seconds", "0.5"),
    "rlhfuse simulate examples/clusters/7b-7b-8gpus.json": ("--seconds", "0.5"),
}
"""What is added to a command that would take long."""

_ALL = Evidence("Makefile", ("test: install lint toy", "-m pytest $(TESTS)"))
_EXAMPLE = "tests/distributed/test_existing_job.py"

ELSEWHERE = {
    "make install": Evidence("tests/unit/test_install.py", ("scripts/install.sh",)),
    "make test": Evidence(".ci/run", ("exec make test",)),
    "make lint": _ALL,
    "make toy": _ALL,
    "make demo": Evidence("tests/e2e/test_demo.py", ('"scripts" / "demo.sh"', "RUN_DIR")),
    "python -m pytest tests/gpu": Evidence("Makefile", ("tests/gpu",)),
    "python -m pytest tests/unit/test_rlhf_advantages.py": _ALL,
    "python -m pytest tests/e2e/test_demo.py": _ALL,
    "python scripts/make_flag_reference.py": Evidence(
        "tests/unit/test_flag_reference.py", ("scripts/make_flag_reference.py",)
    ),
    "git apply examples/fused.patch": Evidence(_EXAMPLE, ("examples/fused.patch",)),
    "torchrun --nproc-per-node 4 examples/existing_megatron_job.py --pipeline 4": Evidence(
        _EXAMPLE, ("examples/existing_megatron_job.py", "--pipeline")
    ),
    ". .venv/bin/activate": Evidence("scripts/install.sh", ('-m venv --clear "$venv"',)),
}

MEASURE = {"make benchdispatch": "benchmarks/dispatch.py"}


def category(command: Command, language: str) -> str | None:
    """The name of the first that fits; None for a command that nobody has looked at."""
    if language == "bash" and command.document in BLOCKS:
        return "blocks"
    if command.text in ELSEWHERE:
        return "elsewhere"
    if command.text in MEASURE:
        return "measure"
    if any(command.text.startswith(begin) for begin in HERE):
        return "here"
    if command.words[0] == "unshare":
        return "namespace"
    if any(word.endswith("pretrain_rlhf.py") for word in command.words):
        return "job"
    return None
