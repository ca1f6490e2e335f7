"""Whole jobs whose micro-batches are limited in tokens, padded and packed, fused and not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.jobs import Job
from tests.e2e.runs import assert_equal_weights, learned, metrics

TOKENS = 224  # two of the longest samples
WAYS: dict[str, dict[str, Any]] = {
    "padded": {"micro_batch_size": None, "micro_batch_tokens": TOKENS},
    "packed": {
        "micro_batch_size": None,
        "micro_batch_tokens": TOKENS,
        "critic_micro_batch_tokens": 2 * TOKENS,
        "rlhfuse_pack_sequences": True,
    },
}


def run_to_end(run: Path, fusion: str, flags: dict[str, Any]) -> Path:
    job = Job(run, save_hf=run / "models", ppo_epochs=2, rlhfuse_fusion=fusion, **flags)
    assert job.wait() == 0, job.output
    job.assert_nothing_left()
    return run


@pytest.mark.parametrize("way", WAYS)
def test_fusion_changes_nothing(tmp_path: Path, way: str) -> None:
    runs = [run_to_end(tmp_path / fusion, fusion, WAYS[way]) for fusion in ("none", "intra")]
    assert_equal_weights(*runs)
    assert learned(runs[0]) == learned(runs[1])
    for record in metrics(runs[1]):
        # Of eight samples in a step at least two fit a micro-batch.
        assert 1 <= record["micro_batches"] <= 4
        assert record["fused_steps"] == 4
        if way == "packed":
            assert record["padded_fraction"] == 0
        else:
            assert 0 < record["padded_fraction"] < 0.5
    trace = json.loads((runs[1] / "trace.json").read_text())["traceEvents"]
    assert any(event.get("name") == "fused step" for event in trace)
