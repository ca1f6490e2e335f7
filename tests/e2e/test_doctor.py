"""`rlhfuse doctor` as a user runs it: on this machine, and where something is broken."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
SELF_TESTS = ("schedule search", "dispatch", "collectives", "Megatron", "vLLM")


def run_doctor(*flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_rlhfuse", "doctor", *flags],
        cwd=ROOT,
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )


def by_subject(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The checks of a report, which is all that was printed; its status and `ok` agree."""
    report = json.loads(done.stdout)
    assert done.stderr == ""
    bad = [check for check in report["checks"] if check["verdict"] == "BAD"]
    assert report["ok"] == (not bad)
    assert done.returncode == (1 if bad else 0)
    assert all(check["remedy"] for check in bad)
    return {check["subject"]: check for check in report["checks"]}


def test_every_self_test_is_ok_and_leaves_nothing(tmp_path: Path) -> None:
    checks = by_subject(run_doctor("--json", TMPDIR=str(tmp_path)))
    for name in SELF_TESTS:
        check = checks[f"test: {name}"]
        assert check["verdict"] == "ok", check
        assert check["seconds"] > 0
    assert list(tmp_path.iterdir()) == []
    left = [
        process.pid
        for process in psutil.process_iter(["environ"])
        if (process.info["environ"] or {}).get("TMPDIR", "").startswith(str(tmp_path))
    ]
    assert left == []


def test_a_module_that_hides_torch_fails_what_needs_it(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('this is not torch')")
    checks = by_subject(run_doctor("--json", PYTHONPATH=str(tmp_path)))
    assert str(tmp_path) in checks["import torch"]["found"]
    assert "PYTHONPATH" in checks["import torch"]["remedy"]
    assert checks["test: schedule search"]["verdict"] == "ok"
    for name in ("device", *(f"test: {each}" for each in SELF_TESTS[1:])):
        assert checks[name]["verdict"] == "BAD"
        assert "this is not torch" in checks[name]["found"]


def test_a_broken_environment_is_a_line_with_a_remedy(tmp_path: Path) -> None:
    done = run_doctor(
        "--no-self-test", TMPDIR=str(tmp_path / "none"), GLOO_SOCKET_IFNAME="no-such-interface"
    )
    assert done.returncode == 1
    *lines, closing = done.stdout.splitlines()
    assert "GLOO_SOCKET_IFNAME, TMPDIR" in closing
    (line,) = (each for each in lines if each.startswith("BAD   TMPDIR"))
    assert str(tmp_path / "none") in line
    assert "unset TMPDIR" in line
    assert not any("test: " in each for each in lines)
