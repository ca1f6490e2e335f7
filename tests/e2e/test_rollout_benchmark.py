"""benchmarks/rollout.py runs, and says what it promises to say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.jobs import ROOT

FLAGS = ("--repeats", "1", "--samples", "16", "--tokens", "48", "--pace", "0.01")


def process(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "rollout.py"), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=400)


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    done = process(*FLAGS, "--threshold", "0.5")
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_both_ways_make_the_same_tokens(result: dict[str, Any]) -> None:
    assert result["mismatched_tokens"] == 0


def test_times_and_predictions_fit_together(result: dict[str, Any]) -> None:
    for name in ("", "predicted_"):
        serial, fused = result[f"{name}serial_s"], result[f"{name}fused_s"]
        assert serial > 0 and fused > 0
        assert result[f"{name}speedup"] == pytest.approx(serial / fused, rel=1e-2)
    assert result["threshold"] == 0.5
    assert result["paced"] is True and result["repeats"] == 1


def test_migration_with_keys_and_values_computes_one_token_again(result: dict[str, Any]) -> None:
    if result["migrated"]:
        assert result["recomputed_tokens_per_sample"] == 1
    else:
        assert result["recomputed_tokens_per_sample"] is None


@pytest.mark.parametrize("flags", [("--repeats", "0"), ("--samples", "3"), ("--model", "huge")])
def test_flags_that_make_no_sense_are_refused(flags: tuple[str, ...]) -> None:
    done = process(*flags)
    assert done.returncode == 2 and flags[0] in done.stderr
