"""Every command in README.md, CONTRIBUTING.md, docs/ and the other documents works.

categories.py says how each of them is known to; one that has no place there fails.
"""

from __future__ import annotations

import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_rlhfuse.observe.metrics import MetricsWriter
from megatron_rlhfuse.stop_request import STOP_FILE
from tests.docs import jobs
from tests.docs.categories import BLOCKS, ELSEWHERE, HERE, MEASURE, SHORTER, category
from tests.docs.documents import (
    NAMES,
    OTHER,
    ROOT,
    SHELL,
    Block,
    Command,
    all_commands,
    blocks,
    cluster_commands,
    commands,
)

SECONDS = 240
"""Of one command; most take one or two."""

SHELL_BLOCKS = [block for name in NAMES for block in blocks(name) if block.language in SHELL]
CATEGORIES = {
    command: category(command, block.language)
    for block in SHELL_BLOCKS
    for command in commands(block)
}


def of(name: str) -> list[Command]:
    return [command for command, found in CATEGORIES.items() if found == name]


def test_every_command_has_a_place() -> None:
    assert len(CATEGORIES) > 40  # they were found
    assert not [f"{c.where}: {c.text}" for c, found in CATEGORIES.items() if found is None]


def test_every_block_says_what_it_is() -> None:
    """A block without a language is one of commands."""
    odd = [
        f"{name}: {block.language}"
        for name in NAMES
        for block in blocks(name)
        if block.language not in SHELL | OTHER
    ]
    assert not odd


def test_an_unknown_command_has_no_place() -> None:
    (command,) = commands(Block("README.md", "", 1, "rlhfuse draw \\\n  x  # no such command\n"))
    assert command.text == "rlhfuse draw x"
    assert category(command, "") is None


def test_the_tables_hold_nothing_that_no_document_has() -> None:
    texts = {command.text for command in all_commands()}
    assert set(ELSEWHERE) <= texts
    assert set(MEASURE) <= texts
    assert set(SHORTER) <= texts
    assert not [begin for begin in HERE if not any(text.startswith(begin) for text in texts)]
    assert {command.document for command in of("blocks")} == set(BLOCKS)


@pytest.mark.parametrize("text", [*ELSEWHERE, *BLOCKS])
def test_what_runs_elsewhere_is_there(text: str) -> None:
    path, needles = ELSEWHERE.get(text) or BLOCKS[text]
    content = (ROOT / path).read_text(encoding="utf-8")
    if path.startswith("tests/"):
        tests = re.search(r"^TESTS := (.*)", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert tests and str(Path(path).parent) in tests[1]
    assert all(needle in content for needle in needles)
    for word in text.split():
        if re.match(r"(tests|scripts|examples)/", word):
            assert (ROOT / word).exists(), word


def test_make_targets_exist_and_are_explained() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^(\w+):.*##", makefile, re.MULTILINE))
    used = {command.words[1] for command in CATEGORIES if command.words[0] == "make"}
    inline = {
        target
        for name in NAMES
        for target in re.findall(r"`(?:\w+=\S+ )*make (\w+)", (ROOT / name).read_text("utf-8"))
    }
    assert used | inline <= targets


@pytest.mark.parametrize("script", MEASURE.values())
def test_what_only_measures_starts(script: str) -> None:
    assert script in (ROOT / "Makefile").read_text(encoding="utf-8")
    assert f"usage: {Path(script).name}" in run(["python", script, "--help"], ROOT, {})


@pytest.mark.parametrize("command", of("job"), ids=lambda command: command.where)
def test_flags_of_jobs_are_taken(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs.launch(command)
    if job.flags != [jobs.STANDS_FOR_MORE]:
        assert jobs.check(job, tmp_path, monkeypatch).world_size == job.ranks


@pytest.mark.parametrize("command", cluster_commands(), ids=lambda command: command.where)
def test_flags_of_jobs_for_a_cluster_are_taken(command: Command) -> None:
    script, *flags = command.words
    assert (ROOT / script).is_file()
    if script.endswith("train.sbatch"):
        jobs.parser().parse_args([flag for flag in flags if flag != jobs.STANDS_FOR_MORE])
    elif script.endswith("plan.sbatch"):
        assert all(flag.endswith(".json") for flag in flags)


CONNECT = """
import socket, subprocess
listening = socket.create_server(("127.0.0.1", 0))
socket.create_connection(listening.getsockname()).close()
up = subprocess.check_output(["ip", "-o", "link", "show", "up"], text=True).splitlines()
assert [line.split()[1] for line in up] == ["lo:"], up
"""


@pytest.mark.parametrize("command", of("namespace"), ids=lambda command: command.where)
def test_a_network_for_one_job_has_a_loopback_and_nothing_else(
    command: Command, tmp_path: Path
) -> None:
    *enter, inner = command.words
    prepare, _, job = inner.partition(" && ")
    (found,) = commands(Block(command.document, "bash", 1, job))
    assert jobs.launch(found).flags == [jobs.STANDS_FOR_MORE]
    if subprocess.run([*enter, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("user namespaces are not allowed here")
    (tmp_path / "connect.py").write_text(CONNECT)
    run([*enter, f"{prepare} && {sys.executable} connect.py"], tmp_path, {})


def test_a_flag_that_there_is_not_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("torchrun", "--nproc-per-node", "8", "pretrain_rlhf.py", "--rollout-fast")
    with pytest.raises(SystemExit):
        jobs.check(jobs.launch(Command("", "", (), words)), tmp_path, monkeypatch)
    assert "--rollout-fast" in capsys.readouterr().err


def test_flags_that_are_only_named_exist() -> None:
    known = set(jobs.parser()._option_string_actions)
    for name in NAMES:
        text = (ROOT / name).read_text(encoding="utf-8")
        named = set(re.findall(r"--(?:no-)?(?:rlhfuse|rollout|ppo|critic)-[a-z0-9-]+\b", text))
        assert not named - known, name


def by_document() -> dict[str, list[Command]]:
    """What is run here; the doctor, to whom documents are all the same, once in the same words."""
    found: dict[str, list[Command]] = {}
    seen = set()
    for command in of("here"):
        words = (*command.words, *SHORTER.get(command.text, ()))
        if words[:2] != ("rlhfuse", "doctor") or words not in seen:
            found.setdefault(command.document, []).append(command._replace(words=words))
        seen.add(words)
    return found


@pytest.mark.parametrize("document", by_document())
def test_commands_run(document: str, tmp_path: Path) -> None:
    folder = readers_folder(tmp_path / "reader")
    for command in by_document()[document]:
        words = list(command.words)
        output = run(words, folder, dict(command.environment))
        if "--rlhfuse-check" in words:
            assert "fine for " in output
        elif words[0] == "touch":
            assert Path(words[1]).name == STOP_FILE  # what a job looks for


def readers_folder(folder: Path) -> Path:
    """What a reader has after `make install` and `make toy`, and what a document's names stand
    for: PROBLEM.json, CLUSTER.json, PATH, runs/demo."""
    for name in ("examples", "scripts"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pretrain_rlhf.py"):
        shutil.copy(ROOT / name, folder)
    shutil.copy(folder / "examples/problems/published-02.json", folder / "PROBLEM.json")
    shutil.copy(folder / "examples/clusters/7b-7b-8gpus.json", folder / "CLUSTER.json")
    (folder / "build").mkdir()
    (folder / "build/toy").symlink_to(ROOT / "build/toy")
    (folder / "runs/long").mkdir(parents=True)
    with MetricsWriter(folder / "runs/demo") as writer:
        for iteration in (1, 2):
            writer.write(iteration, {"reward_mean": 0.5 * iteration, "iteration_s": 1.0})
    core = "megatron/core"
    for name in (f"{core}/pipeline_parallel/schedules.py", f"{core}/package_info.py"):
        installed = metadata.distribution("megatron-core").locate_file(name)
        (folder / "PATH" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(str(installed), folder / "PATH" / name)
    (folder / "bin").mkdir()
    for name, arguments in (("python", ""), ("rlhfuse", "-m megatron_rlhfuse")):
        (folder / "bin" / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n')
        (folder / "bin" / name).chmod(0o755)
    return folder


def run(words: list[str], folder: Path, environment: dict[str, str]) -> str:
    """Runs a command to its end; it must succeed. Returns what it printed."""
    path = f"{folder / 'bin'}{os.pathsep}{Path(sys.executable).parent}"
    done = subprocess.run(
        words,
        cwd=folder,
        env=os.environ
        | {"PATH": f"{path}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
        | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}"
    return done.stdout
