"""Whole jobs that fuse generation and inference, in more ways, and when something goes wrong.

What is learned must not show any of it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import INTER, KV, ROOT, copy_checkpoint, end, run_paced, start_paced
from tests.e2e.runs import (
    assert_equal_weights,
    metrics,
    migrated,
    same_everywhere,
    spans_of,
)

KILLER = ROOT / "tests" / "e2e" / "kill_while_migrating.py"
DESIGNATED = 1


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_paced(tmp_path_factory.mktemp("unfused"), rlhfuse_fusion="none")


@pytest.fixture(scope="module")
def designated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What migrates goes to one instance, always the same. Saves after two iterations."""
    run = tmp_path_factory.mktemp("designated")
    return run_paced(
        run,
        **INTER,
        **KV,
        rlhfuse_migration_policy="inference",
        rlhfuse_migration_instances=DESIGNATED,
        save=run / "checkpoints",
        save_interval=2,
    )


@pytest.fixture(scope="module")
def resumed(designated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goes on after two iterations of `designated`, with whatever is fused by default."""
    run = tmp_path_factory.mktemp("resumed")
    return run_paced(
        run,
        rlhfuse_fusion=None,
        rlhfuse_plan_cache="none",
        load=copy_checkpoint(designated, 2, run),
    )


@pytest.mark.parametrize("run", ["designated", "resumed"])
def test_weights_and_metrics_equal_those_of_a_job_without_fusion(
    request: pytest.FixtureRequest, unfused: Path, run: str
) -> None:
    folder = request.getfixturevalue(run)
    assert_equal_weights(folder, unfused)
    assert same_everywhere(folder) == same_everywhere(unfused)
    assert [record["iteration"] for record in metrics(folder)] == [1, 2, 3, 4]


def test_samples_migrate_to_the_designated_instance(designated: Path) -> None:
    assert migrated(designated)
    spans = spans_of(designated, "migration")
    # Every rank leads the instance of its number.
    assert {e["pid"] for e in spans if e["name"] == "migrate in"} == {DESIGNATED}
    assert {e["pid"] for e in spans if e["name"] == "migrate out"} == {1 - DESIGNATED}


def test_everything_is_fused_where_nothing_is_said(resumed: Path) -> None:
    records = metrics(resumed)[2:]
    assert [record["fusion"] for record in records] == ["both", "both"]
    for record in records:
        assert record["fused_steps"] > 0 and record["predicted_rollout_s"] > 0


@pytest.mark.parametrize("killed", ["source", "destination"])
def test_an_engine_that_is_killed_while_samples_migrate_changes_nothing(
    unfused: Path, tmp_path: Path, killed: str
) -> None:
    environment = {
        "RLHFUSE_TEST_KILL": killed,
        "RLHFUSE_TEST_KILLED": str(tmp_path / "killed"),
    }
    end(start_paced(tmp_path, environment=environment, program=KILLER, **INTER, **KV))
    assert_equal_weights(tmp_path, unfused)

    assert sum(record["engine_restarts"] for record in metrics(tmp_path)) == 1
    (record,) = (record for record in migrated(tmp_path) if record["engine_restarts"])
    samples = record["migrated_samples"]
    if killed == "source":
        # What it had made of them is lost: they begin again, elsewhere.
        assert record["migrated_kv_mb"] == record["recomputed_tokens"] == 0
    else:
        # The engine that takes its place finds their keys and values where they were left.
        assert record["migrated_kv_mb"] > 0
        assert samples <= record["recomputed_tokens"] <= 2 * samples
