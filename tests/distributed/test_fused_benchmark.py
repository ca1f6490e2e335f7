"""benchmarks/fused_pipeline.py runs, and its numbers make sense; speed is not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse.schedule.problem import load_problem

ROOT = Path(__file__).resolve().parents[2]

AGAINST_PLAN = (
    "planned_s",
    "measured_s",
    "planned_serial_1f1b_s",
    "serial_1f1b_s",
    "planned_speedup",
    "speedup",
    "measured_over_planned",
    "speedup_over_planned",
)
OVERHEAD = tuple(
    f"{way}_{name}_per_subtask" for way in ("executor", "megatron") for name in ("us", "cpu_us")
)


def test_a_published_instance_emulated() -> None:
    unit_ms = 0.5
    result = _run("--emulate", "--unit-ms", f"{unit_ms}", "--search-seconds", "0.5")
    _check_against_plan(result)
    # Sleeps are never shorter than asked for, and no run shorter than the work of a device.
    problem = load_problem(ROOT / "examples" / "problems" / "published-01.json")
    assert result["measured_s"] >= max(problem.work()) * unit_ms / 1e3
    assert result["planned_speedup"] > 1


def test_two_gpt_models_that_plan_by_themselves() -> None:
    result = _run("--real")
    _check_against_plan(result)
    assert result["source"] in ("search", "1f1b")
    assert result["planned_under_load_s"] > 0
    assert result["planned_speedup_under_load"] >= 1


def test_the_overhead_alone() -> None:
    result = _run("--overhead", "--ranks", "2")
    assert all(result[name] > 0 for name in OVERHEAD)
    assert "planned_s" not in result


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--emulate", "--ranks", "4"], "--ranks: instance 1 is for 8"),
        (["--emulate", "--instance", "12"], "--instance: want a number from 0 to 11"),
        (["--real", "--repeats", "0"], "--repeats: want a number above 0"),
        ([], "one of the arguments"),
    ],
)
def test_flags_that_make_no_sense_are_named(flags: list[str], message: str) -> None:
    assert message in _process(*flags).stderr


def _check_against_plan(result: dict[str, Any]) -> None:
    assert all(result[name] > 0 for name in (*AGAINST_PLAN, *OVERHEAD))
    assert 0 <= result["peak_activation_error"] <= 0.05
    for name, planned, measured in (
        ("measured_over_planned", "planned_s", "measured_s"),
        ("speedup_over_planned", "planned_speedup", "speedup"),
    ):
        assert result[name] == pytest.approx(result[measured] / result[planned], rel=1e-2)
    for name in ("measured", "serial"):
        shortest, longest = result[f"{name}_spread_s"]
        assert 0 < shortest <= longest


def _run(*flags: str) -> dict[str, Any]:
    done = _process(*flags, "--repeats", "1")
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def _process(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "fused_pipeline.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)
