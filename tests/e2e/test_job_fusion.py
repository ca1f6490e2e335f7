"""Whole jobs whose training is fused: the same weights, planned by themselves, and drawn."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse.observe.metrics import METRICS
from megatron_rlhfuse.observe.timeline import last_iteration
from megatron_rlhfuse.pipeline.devices import map_devices, opposite_layout
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.pipeline.profile import unmeasured_problem
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.plan import load_plan, make_plan, plan_to_json
from tests.e2e.jobs import Job, copy_checkpoint
from tests.e2e.runs import (
    Event,
    assert_equal_weights,
    end_of,
    events_of,
    learned,
    metrics,
    tracks,
)

ITERATIONS = 4
STEPS = 4  # of an iteration: two epochs of two mini-batches
MICRO_BATCHES = 4  # of each model in a step
SUBTASKS = 2 * 2 * MICRO_BATCHES  # of a rank in a step: forward and backward, actor and critic
CLOCK_US = 2.0
"""Spans of the trace are time.time() seconds, exact to a quarter of a microsecond at each end."""


def run_to_end(run: Path, **flags: Any) -> Path:
    flags = {"save_hf": run / "models", **flags}
    job = Job(run, train_iters=ITERATIONS, ppo_epochs=2, ppo_kl_target=0.1, **flags)
    assert job.wait() == 0, job.output
    job.assert_nothing_left()
    return run


@pytest.fixture(scope="module")
def unfused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_to_end(tmp_path_factory.mktemp("unfused"), rlhfuse_fusion="none")


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finds its plan while it trains, and keeps it in the folder `plans`."""
    run = tmp_path_factory.mktemp("fused")
    return run_to_end(
        run,
        rlhfuse_fusion="intra",
        rlhfuse_plan_seconds=0.5,
        rlhfuse_plan_cache=run / "plans",
        save=run / "checkpoints",
        save_interval=2,
    )


@pytest.fixture(scope="module")
def plan_file(fused: Path) -> Path:
    """The plan that `fused` has found."""
    (path,) = (fused / "plans").iterdir()
    return path


@pytest.fixture(scope="module")
def planned_before(plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Starts with the plan that `fused` has found."""
    run = tmp_path_factory.mktemp("planned-before")
    return run_to_end(run, rlhfuse_fusion="both", rlhfuse_plan_cache=plan_file.parent)


@pytest.fixture(scope="module")
def resumed(fused: Path, plan_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goes on from the checkpoint of `fused` after two iterations, with a plan from a file."""
    run = tmp_path_factory.mktemp("resumed")
    checkpoints = copy_checkpoint(fused, 2, run)
    return run_to_end(run, rlhfuse_fusion="intra", rlhfuse_plan=plan_file, load=checkpoints)


def subtasks(rank: int) -> Counter[tuple[Any, ...]]:
    """What a rank does in a step; the critic's stages stand on the ranks in reverse."""
    return Counter(
        (f"{model}0{kind}{micro_batch}", category, stage, micro_batch)
        for model, category, stage in (
            ("a", "actor_training", rank),
            ("b", "critic_training", 1 - rank),
        )
        for kind in "FB"
        for micro_batch in range(MICRO_BATCHES)
    )


def assert_whole_steps(spans: Sequence[Event], rank: int, steps: int) -> None:
    """Every subtask of every step once, one after the other."""
    assert len(spans) == steps * SUBTASKS
    for start in range(0, len(spans), SUBTASKS):
        step = spans[start : start + SUBTASKS]
        found = Counter(
            (e["name"], e["cat"], e["args"]["stage"], e["args"]["micro_batch"]) for e in step
        )
        assert found == subtasks(rank)
    assert_one_after_the_other(spans)


def assert_one_after_the_other(spans: Sequence[Event]) -> None:
    for earlier, later in itertools.pairwise(spans):
        assert end_of(earlier) <= later["ts"] + 1e-3  # a nanosecond, in floats


def split_before(spans: Sequence[Event], name: str) -> list[Sequence[Event]]:
    """The spans in lots, each of which begins with one of this name."""
    starts = [position for position, span in enumerate(spans) if span["name"] == name]
    assert starts[0] == 0
    return [spans[start:end] for start, end in itertools.pairwise([*starts, len(spans)])]


@pytest.mark.parametrize("run", ["fused", "planned_before", "resumed"])
def test_weights_and_metrics_equal_those_of_a_job_without_fusion(
    request: pytest.FixtureRequest, unfused: Path, run: str
) -> None:
    folder = request.getfixturevalue(run)
    assert_equal_weights(folder, unfused)
    assert learned(folder) == learned(unfused)
    assert [record["iteration"] for record in metrics(folder)] == [1, 2, 3, 4]


def test_a_job_without_fusion_says_so(unfused: Path) -> None:
    fusion_fields = {name for name, metric in METRICS.items() if metric.group == "fusion"}
    for record in metrics(unfused):
        assert record["fusion"] == "none" and not fusion_fields & record.keys()
    found = tracks(unfused)
    assert not any("pipeline" in track for _, track in found)
    assert {"actor step", "critic step"} <= {event["name"] for event in found[0, "main"]}


def test_fused_steps_are_measured(fused: Path) -> None:
    records = metrics(fused)
    assert records[0]["fusion_plan"] in ("greedy", "search")
    assert records[-1]["fusion_plan"] == "search"
    for record in records:
        assert record["fusion"] == "intra"
        assert record["fused_steps"] == STEPS
        assert 0 < record["bubble_fraction"] < 1
        assert 0 < STEPS * record["makespan_s"] < record["training_s"]
    assert all(record["planned_makespan_s"] > 0 for record in records)
    # The first step of all ran before anything was known of stage times.
    for record in records[1:]:
        ratio = record["makespan_s"] / record["planned_makespan_s"]
        assert record["makespan_over_planned"] == pytest.approx(ratio)


def test_a_plan_of_an_earlier_run_is_run_from_the_second_step(
    planned_before: Path, plan_file: Path
) -> None:
    timeline = load_plan(planned_before / "plan.json").timeline
    assert timeline.order == load_plan(plan_file).timeline.order
    makespan = timeline.makespan  # with the times of the first step
    for record in metrics(planned_before):
        assert record["fusion_plan"] == "cache"
        assert record["planned_makespan_s"] == pytest.approx(makespan)
    assert list(plan_file.parent.iterdir()) == [plan_file]


def test_a_plan_that_was_given_is_run(resumed: Path) -> None:
    assert [record["fusion_plan"] for record in metrics(resumed)[2:]] == ["file", "file"]


def test_the_trace_shows_every_subtask_of_every_step(fused: Path) -> None:
    found = tracks(fused)
    for rank in (0, 1):
        steps = ITERATIONS * STEPS
        assert sum(e["name"] == "fused step" for e in found[rank, "main"]) == steps
        pipeline = found[rank, "pipeline"]
        assert_whole_steps(pipeline, rank, steps)
        planned = found[rank, "pipeline, planned"]
        assert_one_after_the_other(planned)
        # The first step ran before stage times were known.
        assert planned[0]["ts"] > pipeline[SUBTASKS - 1]["ts"]
    # No further lanes, where spans would stand that overlap.
    assert not [track for _, track in found if "pipeline" in track and "#" in track]


def test_the_planned_spans_are_the_plan(planned_before: Path) -> None:
    """To the end in the last step of an iteration; else the next step may begin earlier.

    None in the first step: it measures what the plan's times are made of.
    """
    timeline = load_plan(planned_before / "plan.json").timeline
    found = tracks(planned_before)
    makespans = [0.0] * ITERATIONS
    for rank in (0, 1):
        order, starts = timeline.order[rank], timeline.start[rank]
        assert starts[0] == 0  # each model begins on a rank of its own, at once
        spans = found[rank, "pipeline, planned"]
        assert_one_after_the_other(spans)
        steps = split_before(spans, order[0].token)
        assert len(steps) == ITERATIONS * STEPS - 1
        for number, step in enumerate(steps, start=1):
            assert [e["name"] for e in step] == [s.token for s in order[: len(step)]]
            for position, event in enumerate(step):
                start, end = starts[position], timeline.end(rank, position)
                offset = event["ts"] - step[0]["ts"]
                assert offset == pytest.approx(1e6 * start, abs=CLOCK_US)
                if position < len(step) - 1:
                    assert event["dur"] == pytest.approx(1e6 * (end - start), abs=CLOCK_US)
            iteration, position = divmod(number, STEPS)
            if position == STEPS - 1:
                assert len(step) == SUBTASKS
                took = end_of(step[-1]) - step[0]["ts"]
                makespans[iteration] = max(makespans[iteration], took)
    assert makespans == pytest.approx([1e6 * timeline.makespan] * ITERATIONS, abs=CLOCK_US)


def test_the_report_draws_the_last_iteration(planned_before: Path) -> None:
    command = Path(sys.executable).with_name("rlhfuse")
    ended = subprocess.run(
        [command, "report", planned_before], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert "<html" in (planned_before / "report.html").read_text()
    assert (planned_before / "plots" / "timeline.png").is_file()
    drawn = last_iteration(events_of(planned_before))
    assert drawn is not None and drawn.iteration == ITERATIONS
    rows = {row.label for row in drawn.rows}
    assert {f"rank {r}, pipeline{p}" for r in (0, 1) for p in ("", ", planned")} <= rows


def write_plan(path: Path, stages: int) -> dict[str, Any]:
    """Writes a plan for so many stages of both models; returns what it wrote."""
    actor = Layout.contiguous(stages, 1, stages)
    layouts = (actor, opposite_layout(actor, 1, stages))
    problem = unmeasured_problem(map_devices(("actor", "critic"), layouts), [MICRO_BATCHES] * 2)
    timeline = evaluate(problem, one_f_one_b(problem))
    written = plan_to_json(make_plan(timeline, greedy=timeline.makespan, seconds=0.0))
    path.write_text(json.dumps(written))
    return written


def with_a_deadlock(path: Path) -> None:
    plan = write_plan(path, stages=2)
    row = plan["order"][0]
    forward, backward = row.index("a0F0"), row.index("a0B0")
    row[forward], row[backward] = row[backward], row[forward]
    path.write_text(json.dumps(plan))


def test_a_plan_that_cannot_be_run_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with_a_deadlock(path)
    job = Job(tmp_path / "run", rlhfuse_fusion="intra", rlhfuse_plan=path)
    job.wait_for("error: ")
    assert job.wait(timeout_s=60) != 0
    job.assert_nothing_left()
    assert "exitcode  : 2 " in job.output
    assert job.output.count("Traceback") == 1  # torchrun's own
    (line,) = (line for line in job.output.splitlines() if "--rlhfuse-plan" in line)
    assert line.startswith(f"pretrain_rlhf.py: error: --rlhfuse-plan {path}: ")
    assert "a0B0" in line
