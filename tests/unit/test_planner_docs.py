"""What docs/planner.md, docs/architecture.md and examples/README.md say about the planner holds.

Rules for blocks of docs/planner.md:
- `bash` and `python` blocks are run from top to bottom in one empty folder that has `examples/`;
  the `text` block right behind one is what it must print, in a terminal's order;
- a `json` block whose paragraph says "save it as `x.json`" is there as that file;
- numbers that a machine's speed decides are left out of the comparison (`VARYING`).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from megatron_rlhfuse.schedule import plan_command, simulate_command
from megatron_rlhfuse.schedule.cluster import parse_cluster
from megatron_rlhfuse.schedule.cluster_problem import plan_cluster
from megatron_rlhfuse.schedule.errors import ProblemError
from megatron_rlhfuse.schedule.estimate import (
    DEFAULT_LINK_EFFICIENCY,
    DEFAULT_MFU,
    RECOMPUTATIONS,
)
from megatron_rlhfuse.schedule.plan import parse_plan
from megatron_rlhfuse.schedule.presets import GPUS, SHAPES
from megatron_rlhfuse.schedule.problem import load_problem, parse_problem
from megatron_rlhfuse.schedule.search import greedy

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "planner.md"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
EXAMPLES = ROOT / "examples"

VARYING = re.compile(r"by |searched fused|fused, split backward|memory: ")
"""Lines of output that depend on how far a search came in its time."""

SECONDS = 60
"""Of one command; all together take a few."""


class Block(NamedTuple):
    """A fenced block of the guide.

    Attributes:
        line: of the opening fence
        paragraph: the text right before it
    """

    language: str
    text: str
    line: int
    paragraph: str


def blocks() -> list[Block]:
    guide = GUIDE.read_text(encoding="utf-8")
    return [
        Block(
            match[1],
            match[2],
            guide.count("\n", 0, match.start()) + 1,
            guide[: match.start()].rstrip().rpartition("\n\n")[2],
        )
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL)
    ]


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a bash or python block as a reader would: `rlhfuse` is that of this checkout."""
    if block.language == "bash":
        command = ["bash", "-eu", "-o", "pipefail", "-c", block.text]
    else:
        command = [sys.executable, "-c", block.text]
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ.get('PATH', '')}",
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}".rstrip(os.pathsep),
        "PYTHONUNBUFFERED": "1",  # else errors come before the output that precedes them
    }
    return subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=SECONDS,
        check=False,
    )


def prepare(folder: Path) -> None:
    """A reader's folder: the examples, the files that the guide says to save, and `rlhfuse`."""
    shutil.copytree(EXAMPLES, folder / "examples")
    for block in blocks():
        name = re.search(r"save\s+it\s+as\s+`([\w-]+\.json)`", block.paragraph)
        if block.language == "json" and name is not None:
            (folder / name[1]).write_text(block.text, encoding="utf-8")
    (folder / "bin").mkdir()
    command = folder / "bin" / "rlhfuse"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m megatron_rlhfuse "$@"\n')
    command.chmod(0o755)


def comparable(output: str) -> list[str]:
    """Its lines, without the numbers that differ from machine to machine."""
    return [
        " ".join(re.sub(r"\d[\d.,]*", "N", line).split()) if VARYING.match(line) else line.rstrip()
        for line in output.strip().splitlines()
    ]


def can_run(block: Block) -> bool:
    """The exact method is an extra: without OR-tools its block is left out."""
    return "--method exact" not in block.text or importlib.util.find_spec("ortools") is not None


def test_what_the_guide_shows_is_what_one_gets(tmp_path: Path) -> None:
    prepare(tmp_path)
    listed = blocks()
    run = 0
    for block, following in zip(listed, [*listed[1:], None], strict=True):
        if block.language not in ("bash", "python") or not can_run(block):
            continue
        done = run_block(block, tmp_path)
        where = f"{GUIDE.name}, line {block.line}:\n{done.stdout}"
        assert done.returncode == 0, where
        shown = following.text if following is not None and following.language == "text" else ""
        assert comparable(done.stdout) == comparable(shown), where
        run += 1
    assert run > 10  # the blocks were found


def test_json_of_the_guide_can_be_read_and_used() -> None:
    kinds = set()
    for block in blocks():
        if block.language != "json":
            continue
        data = json.loads(block.text)
        if "order" in data:
            kinds.add("plan")
            parse_plan(data)
        elif "nodes" in data:
            kinds.add("cluster")
            _, problem = plan_cluster(parse_cluster(data, EXAMPLES))
            assert greedy(problem).over_limit() is None
        else:
            kinds.add("problem")
            assert greedy(parse_problem(data)).over_limit() is None
    assert kinds == {"problem", "plan", "cluster"}


def known_fields(parse: Callable[[Any], object], data: Any) -> set[str]:
    """The fields that the code knows, from what it says about one that it does not."""
    with pytest.raises(ProblemError, match="unknown field; there are ") as caught:
        parse(data)
    return set(str(caught.value).partition("there are ")[2].split(", "))


UNKNOWN = {"no such field": 0}


def with_unknown(*path: str) -> dict[str, Any]:
    """A cluster that is right but for an unknown field in the object at `path`."""
    if not path:
        return UNKNOWN
    data = json.loads((EXAMPLES / "clusters" / "7b-7b-8gpus.json").read_text(encoding="utf-8"))
    place = data
    for name in path[:-1]:
        place = place[name]
        place.pop("preset", None)
    place[path[-1]] = UNKNOWN
    return data


def cluster_fields(*path: str) -> set[str]:
    return known_fields(lambda data: parse_cluster(data, EXAMPLES), with_unknown(*path))


def test_tables_of_the_guide_hold_exactly_the_fields_of_the_code() -> None:
    tables = fields_by_section()
    model = {"devices": 1, "models": [UNKNOWN]}
    assert tables["The problem"] == known_fields(parse_problem, UNKNOWN) | known_fields(
        parse_problem, model
    )
    assert tables["The plan"] == known_fields(parse_plan, UNKNOWN)
    assert tables["The cluster"] == (
        cluster_fields()
        | cluster_fields("gpu")
        | cluster_fields("actor")
        | cluster_fields("actor", "shape")
        | cluster_fields("actor", "measured")
    )


def fields_by_section() -> dict[str, set[str]]:
    """The names in the first cells of the tables below every heading."""
    fields: dict[str, set[str]] = {}
    heading = ""
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        cells = line.split("|")
        if line.startswith("| `"):
            fields.setdefault(heading, set()).update(re.findall(r"`(\w+)`", cells[1]))
    return fields


@pytest.mark.parametrize("command", [plan_command, simulate_command])
def test_guide_names_every_flag(command: Any) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    flags = set(re.findall(r"--[a-z-]+", parser.format_help())) - {"--help"}
    named = set(re.findall(r"--[a-z-]+", GUIDE.read_text(encoding="utf-8")))
    assert not flags - named


def test_guide_names_presets_and_defaults() -> None:
    guide = GUIDE.read_text(encoding="utf-8")
    for name in [*GPUS, *SHAPES, *RECOMPUTATIONS]:
        assert f'`"{name}"`' in guide, name
    assert f"| {DEFAULT_MFU} | of the peak" in guide
    assert f"| {DEFAULT_LINK_EFFICIENCY} | of a link" in guide
    assert f"default {plan_command.DEFAULT_SECONDS:g}" in guide


def test_architecture_has_every_file_of_the_planner() -> None:
    text = ARCHITECTURE.read_text(encoding="utf-8")
    section = text.partition("## The planner\n")[2].partition("\n## ")[0]
    named = {
        name
        for row in re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
        for name in re.findall(r"`([\w.]+)`", row)
    }
    schedule = {path.name for path in (ROOT / "megatron_rlhfuse" / "schedule").glob("*.py")}
    csrc = {path.name for path in (ROOT / "csrc" / "planner").iterdir()}
    assert named == (schedule - {"__init__.py"}) | csrc


def test_examples_are_listed_and_described() -> None:
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    listed = set(re.findall(r"^\| `([\w-]+\.json)`", text, re.MULTILINE))
    assert listed == {path.name for path in EXAMPLES.glob("*/*.json")}
    for path in EXAMPLES.glob("problems/*.json"):
        actor, critic = load_problem(path).models
        sizes = f"| {actor.stages} / {critic.stages} | {actor.micro_batches}"
        assert f"`{path.name}` |" in text and f"{sizes} / {critic.micro_batches} |" in text


def test_readme_has_no_gap_left_to_fill() -> None:
    assert not re.search(r"@[A-Z]+@|TODO|TBD", (ROOT / "README.md").read_text(encoding="utf-8"))
