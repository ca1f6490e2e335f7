"""`metrics.jsonl`: strict JSON, each iteration once, repaired after a kill, mirrored when asked."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_rlhfuse.observe.metrics import METRICS, STAGE_SECONDS, MetricsWriter, read_metrics


def write_iterations(directory: Path, iterations: range, **options: Any) -> None:
    with MetricsWriter(directory, **options) as writer:
        for iteration in iterations:
            writer.write(iteration, {"reward_mean": float(iteration)})


def iterations_in(directory: Path) -> list[int]:
    return [record["iteration"] for record in read_metrics(directory / "metrics.jsonl")]


def reject_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_line_holds_what_was_measured_as_strict_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        values = {"reward_mean": 1.5, "policy_loss": math.nan, "kl": -math.inf, "fusion": "none"}
        writer.write(1, {**values, "value_loss": None, "optimizer_steps": 4})
        line = (tmp_path / "metrics.jsonl").read_text()  # flushed before the writer is closed
    record = json.loads(line, parse_constant=reject_constant)
    assert record.pop("time") > 1.6e9
    assert record == {
        "iteration": 1,
        "reward_mean": 1.5,
        "policy_loss": None,
        "kl": None,
        "fusion": "none",
        "optimizer_steps": 4,
    }


def test_undeclared_metric_is_refused_by_name(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="rewrad_mean"):
            writer.write(1, {"rewrad_mean": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_iteration_is_not_written_twice(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(3, {})
        with pytest.raises(ValueError, match="iteration 3 after iteration 3"):
            writer.write(3, {})
    with (
        MetricsWriter(tmp_path, resume_from=3) as writer,
        pytest.raises(ValueError, match="iteration 2 after iteration 3"),
    ):
        writer.write(2, {})


def test_resumed_run_has_each_iteration_once(tmp_path: Path) -> None:
    write_iterations(tmp_path, range(1, 8))
    write_iterations(tmp_path, range(5, 10), resume_from=4)
    assert iterations_in(tmp_path) == list(range(1, 10))
    replaced = read_metrics(tmp_path / "metrics.replaced.jsonl")
    assert [record["iteration"] for record in replaced] == [5, 6, 7]


def test_fresh_run_in_an_old_folder_keeps_the_old_lines_aside(tmp_path: Path) -> None:
    write_iterations(tmp_path, range(1, 4))
    write_iterations(tmp_path, range(1, 2))
    assert iterations_in(tmp_path) == [1]
    assert len(read_metrics(tmp_path / "metrics.replaced.jsonl")) == 3


def test_every_torn_last_line_is_repaired(tmp_path: Path) -> None:
    write_iterations(tmp_path / "whole", range(1, 4))
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    last_line = whole.splitlines(keepends=True)[-1]
    for torn_bytes in range(1, len(last_line)):
        folder = tmp_path / str(torn_bytes)
        folder.mkdir()
        (folder / "metrics.jsonl").write_bytes(whole[:-torn_bytes])
        kept = [1, 2, 3] if torn_bytes == 1 else [1, 2]  # one byte: the newline alone
        assert iterations_in(folder) == kept
        write_iterations(folder, range(kept[-1] + 1, 6), resume_from=kept[-1])
        assert iterations_in(folder) == [1, 2, 3, 4, 5]


def test_bad_line_inside_the_file_is_named(tmp_path: Path) -> None:
    write_iterations(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    for bad in ("{", "7", '{"reward_mean": 1}', ""):
        path.write_text("\n".join([lines[0], bad, lines[2]]) + "\n")
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
            read_metrics(path)
        with pytest.raises(ValueError, match=r"metrics\.jsonl:2: "):
            MetricsWriter(tmp_path, resume_from=3)


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        writer.write(1, {"reward_mean": 0.25, "fusion": "none", "value_loss": None})
        writer.write(2, {"reward_mean": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["reward/reward_mean"]
    points = [(event.step, event.value) for event in events.Scalars("reward/reward_mean")]
    assert points == [(1, 0.25), (2, 0.5)]


class FakeWandbRun:
    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str | None = None) -> None: ...

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, asked = FakeWandbRun(), {}

    def init(**options: Any) -> FakeWandbRun:
        asked.update(options)
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    options = {"wandb_project": "rlhf", "wandb_name": "first", "config": {"lr": 1e-5}}
    with MetricsWriter(tmp_path, **options) as writer:
        writer.write(1, {"kl": 0.01, "fusion": "none"})
    assert (asked["project"], asked["name"], asked["config"]) == ("rlhf", "first", {"lr": 1e-5})
    assert run.logged == [{"iteration": 1, "reward/kl": 0.01}]
    assert run.finished


def test_missing_wandb_names_flag_and_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_iterations(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"--wandb-project rlhf .*`pip install wandb`"):
        MetricsWriter(tmp_path, wandb_project="rlhf")
    assert iterations_in(tmp_path) == [1, 2, 3]  # nothing was cut by the run that did not start


def test_wandb_is_not_imported_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    write_iterations(tmp_path, range(1, 2))


def test_stages_are_declared_in_seconds() -> None:
    assert {METRICS[name].unit for name in STAGE_SECONDS} == {"s"}
