"""--rlhfuse-check: what a job would refuse, before it waits in a queue."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.jobs import ROOT, SMALL


def check(run: Path, ranks: str, **changed: object) -> subprocess.CompletedProcess[str]:
    """Checks the flags SMALL, with some changed."""
    given = {**SMALL, "rlhfuse-run-dir": run}
    given |= {name.replace("_", "-"): value for name, value in changed.items()}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "pretrain_rlhf.py", "--rlhfuse-check", ranks, *words]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_would_run_is_fine_and_nothing_is_started(tmp_path: Path) -> None:
    checked = check(tmp_path, "2x1")
    assert checked.returncode == 0, checked.stderr
    assert checked.stdout.splitlines() == ["pretrain_rlhf.py: fine for 2x1 rank(s): 512 prompts"]
    assert [each for each in tmp_path.rglob("*") if each.is_file()] == [
        tmp_path / "logs" / "check.log"
    ]


def test_it_says_what_the_job_would_go_on_from(tmp_path: Path) -> None:
    (tmp_path / "save" / "iter_0000001").mkdir(parents=True)
    (tmp_path / "save" / "latest_checkpointed_iteration.txt").write_text("1\n")
    checked = check(tmp_path, "2", load=tmp_path / "save")
    assert checked.stdout.endswith(f"512 prompts; goes on from {tmp_path}/save\n"), checked.stderr


@pytest.mark.parametrize(
    ("ranks", "changed", "fault"),
    [
        ("3", {}, "does not divide the 3 process(es)"),
        ("2x8", {}, "--global-batch-size 8 is no multiple of --micro-batch-size 2 x 8"),
        ("two", {}, "--rlhfuse-check two: want a number of ranks, or NODESxRANKS such as 2x8"),
        ("2", {"prompt_data": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("2", {"actor_model": "nowhere"}, "--actor-model"),
    ],
)
def test_what_would_not_run_is_refused_in_one_line(
    tmp_path: Path, ranks: str, changed: dict[str, object], fault: str
) -> None:
    checked = check(tmp_path, ranks, **changed)
    assert checked.returncode == 2
    (line,) = checked.stderr.splitlines()
    assert line.startswith("pretrain_rlhf.py: error: ") and fault in line
