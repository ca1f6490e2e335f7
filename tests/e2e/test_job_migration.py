"""Whole jobs that score the first samples while the last ones migrate and are still generated.

What is learned must not show any of it.
"""

from __future__ import annotations

import importlib.util
import time
from pathlib import Path

import pytest

from megatron_rlhfuse.observe.metrics import METRICS
from tests.e2e.jobs import INTER, KV, PACED, end, run_paced, start_paced
from tests.e2e.runs import (
    assert_equal_weights,
    during,
    end_of,
    metrics,
    migrated,
    same_everywhere,
    spans_of,
)

ITERATIONS = PACED["train_iters"]
SAMPLES = 16  # of an iteration
MIGRATION_FIELDS = {
    "migration_threshold",
    "migrated_samples",
    "migration_s",
    "migrated_kv_mb",
    "recomputed_tokens",
    "predicted_rollout_s",
    "predicted_serial_rollout_s",
}
"""Of every iteration of a job that fuses generation and inference."""


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_paced(tmp_path_factory.mktemp("unfused"), rlhfuse_fusion="none")


@pytest.fixture(scope="module")
def by_kv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Samples migrate with their keys and values."""
    return run_paced(tmp_path_factory.mktemp("kv"), **INTER, **KV)


@pytest.fixture(scope="module")
def by_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """From the start, as often as it pays, and with nothing but their tokens."""
    flags = {
        "rlhfuse_migration_threshold": 1,
        "rlhfuse_migration_transfer": "tokens",
        "rlhfuse_migration_rebalance": True,
    }
    return run_paced(tmp_path_factory.mktemp("tokens"), **(INTER | flags))


@pytest.fixture(scope="module")
def both_fusions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chooses its threshold by itself, and trains in a fused pipeline."""
    run = tmp_path_factory.mktemp("both")
    return run_paced(run, rlhfuse_fusion="both", rlhfuse_plan_cache="none")


@pytest.fixture(scope="module")
def one_instance(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nowhere to migrate to; the second rank leads no engine."""
    return run_paced(tmp_path_factory.mktemp("one"), **INTER, rollout_instances=1)


@pytest.fixture(scope="module")
def never(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_paced(
        tmp_path_factory.mktemp("never"), **(INTER | {"rlhfuse_migration_threshold": 0})
    )


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `by_kv`; what migrates goes from one node to the other."""
    return run_paced(tmp_path_factory.mktemp("nodes"), nodes=2, **INTER, **KV)


@pytest.fixture(scope="module")
def two_nodes_by_nixl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `two_nodes`, over another relay."""
    if importlib.util.find_spec("nixl") is None:
        pytest.skip("the package nixl is not installed")
    flags = {"nodes": 2, "rlhfuse_migration_relay": "nixl"}
    return run_paced(tmp_path_factory.mktemp("nixl"), **flags, **INTER, **KV)


FUSED = [
    "by_kv",
    "by_tokens",
    "both_fusions",
    "one_instance",
    "never",
    "two_nodes",
    "two_nodes_by_nixl",
]


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def test_weights_and_metrics_equal_those_of_a_job_without_fusion(
    unfused: Path, fused: Path
) -> None:
    assert_equal_weights(fused, unfused)
    assert same_everywhere(fused) == same_everywhere(unfused)
    assert len(metrics(fused)) == ITERATIONS


def test_rollouts_are_measured(fused: Path) -> None:
    for record in metrics(fused):
        assert record["fusion"] in ("inter", "both")
        assert record["rollout_s"] == pytest.approx(record["generation_s"] + record["inference_s"])
        assert 0 < record["inference_start_s"] < record["rollout_s"] < record["iteration_s"]
        assert 0 <= record["rollout_idle_s"] < record["rollout_s"]
        assert record.keys() >= MIGRATION_FIELDS
        assert 0 <= record["migration_threshold"] <= 1
        assert 0 < record["predicted_rollout_s"] <= record["predicted_serial_rollout_s"]
        # Samples that are to migrate may all have finished when their engine hears of it.
        assert "migration_start_s" in record or record["migrated_samples"] == 0


def test_a_job_without_fusion_scores_nothing_before_the_last_sample(unfused: Path) -> None:
    rollout = {name for name, metric in METRICS.items() if metric.group == "rollout"}
    for record in metrics(unfused):
        assert record["fusion"] == "none"
        assert rollout & record.keys() == {"rollout_s", "rollout_idle_s", "inference_start_s"}
        assert record["inference_start_s"] >= record["generation_s"]
        assert record["rollout_s"] == pytest.approx(record["generation_s"] + record["inference_s"])
    assert not spans_of(unfused, "migration")


@pytest.mark.parametrize("run", ["by_kv", "two_nodes", "two_nodes_by_nixl"])
def test_samples_migrate_with_keys_and_values(request: pytest.FixtureRequest, run: str) -> None:
    records = migrated(request.getfixturevalue(run))
    assert records
    for record in records:
        assert record["migration_threshold"] == 0.5
        assert 1 <= record["migrated_samples"] <= SAMPLES // 2
        assert record["recomputed_tokens"] == record["migrated_samples"]
        assert record["migrated_kv_mb"] > 0 and record["migration_s"] > 0
    assert any(record["inference_start_s"] < record["generation_s"] for record in records)


def test_samples_migrate_with_their_tokens(by_tokens: Path) -> None:
    records = migrated(by_tokens)
    assert records
    for record in records:
        assert record["migration_threshold"] == 1
        assert record["recomputed_tokens"] > record["migrated_samples"]
        assert record["migrated_kv_mb"] == 0


@pytest.mark.parametrize("run", ["never", "one_instance"])
def test_nothing_migrates(request: pytest.FixtureRequest, run: str) -> None:
    folder = request.getfixturevalue(run)
    for record in metrics(folder):
        assert record["migrated_samples"] == record["recomputed_tokens"] == 0
        assert record["migrated_kv_mb"] == record["migration_s"] == 0
    assert not spans_of(folder, "migration")


def test_the_trace_shows_who_gave_and_who_took(by_kv: Path) -> None:
    for record in metrics(by_kv):
        iteration = record["iteration"]
        spans = during(by_kv, iteration)
        given, taken = (
            [e for e in spans if e["name"] == f"migrate {way}" and e["cat"] == "migration"]
            for way in ("out", "in")
        )
        for events in (given, taken):
            assert sum(e["args"]["samples"] for e in events) == record["migrated_samples"]
        if given:
            assert {e["pid"] for e in given} != {e["pid"] for e in taken}
            assert min(e["ts"] for e in given) <= min(map(end_of, taken))


def test_the_trace_shows_inference_beside_generation(by_kv: Path) -> None:
    for record in migrated(by_kv):
        spans = during(by_kv, record["iteration"])
        scored = min(e["ts"] for e in spans if e["name"] == "score")
        last = max(end_of(e) for e in spans if e["cat"] == "sample")
        if scored < last:
            return
    pytest.fail("in no iteration a sample was scored before the last one was made")


def test_an_engine_that_is_killed_changes_nothing(unfused: Path, tmp_path: Path) -> None:
    job = start_paced(tmp_path, **INTER, **KV)
    job.wait_for("run folder")
    time.sleep(0.4)
    job.engine(rank=1).kill()
    end(job)
    assert sum(record["engine_restarts"] for record in metrics(tmp_path)) == 1
    assert_equal_weights(tmp_path, unfused)
