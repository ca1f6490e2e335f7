"""Which plan runs in which step: measure, plan, search, keep to it; and when 1F1B stays."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlhfuse.pipeline import plan_file
from megatron_rlhfuse.pipeline.autoplan import AutoPlan, PlanOptions
from megatron_rlhfuse.pipeline.devices import DeviceMap, map_devices, opposite_layout
from megatron_rlhfuse.pipeline.errors import PlanMismatchError
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.pipeline.plan_cache import PlanCache
from megatron_rlhfuse.pipeline.plan_file import check_problem
from megatron_rlhfuse.pipeline.profile import Costs, StageCost, unmeasured_problem
from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.errors import OrderError, ProblemError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.plan import load_plan, make_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.search import greedy
from tests.unit.one_rank_planning import (
    ACTIVATION,
    COSTS,
    COUNTS,
    DEVICES,
    NAMES,
    PATIENCE,
    is_searching,
    one_rank,
    opposite,
)

QUICK = PlanOptions(search_seconds=0.1, profile_steps=2)


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from one_rank(monkeypatch)


def make(
    options: PlanOptions = QUICK,
    devices: DeviceMap = DEVICES,
    counts: Sequence[int] = COUNTS,
    **changes: Any,
) -> AutoPlan:
    options = dataclasses.replace(options, **changes)
    return AutoPlan(devices, counts, options, {"model": "small"}, lambda: 1e-4)


def step(plan: AutoPlan, costs: Costs = COSTS) -> str:
    """A step; returns where its plan came from."""
    plan.before_step()
    program = plan.program(0, forward=False)
    assert program
    source = plan.source
    plan.after_step(costs if plan.profiling else None)
    return source


def steps(plan: AutoPlan, count: int) -> list[str]:
    return [step(plan) for _ in range(count)]


def step_until(plan: AutoPlan, done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done():
        assert time.monotonic() < deadline, plan.source
        step(plan)
        time.sleep(0.02)


def back_to_back(problem: Problem) -> float:
    return evaluate(problem, one_f_one_b(problem)).makespan


# ---------------------------------------------------------------- the states of a job


def test_a_job_measures_then_plans_then_searches_then_keeps_to_what_was_found() -> None:
    plan = make()
    flags = []
    for _ in range(3):
        plan.before_step()
        flags.append((plan.source, plan.profiling, plan.measures_memory, plan.is_measured))
        plan.after_step(COSTS)
    assert flags == [
        ("1f1b", True, True, False),
        ("greedy", True, False, True),
        ("greedy", True, False, True),
    ]
    plan.before_step()
    assert is_searching() and not plan.profiling
    step_until(plan, lambda: plan.source == "search")
    settled = plan.timeline
    assert steps(plan, 3) == ["search"] * 3
    assert plan.timeline is settled and not plan.profiling and not is_searching()
    assert settled.makespan <= greedy(settled.problem).makespan < back_to_back(settled.problem)


def test_the_first_measured_step_counts_for_memory_alone() -> None:
    plan = make(profile_steps=2, search_seconds=0)
    step(plan, (StageCost(9.0, 9.0, 7.0),) * 2)
    for _ in range(2):
        step(plan, (StageCost(0.01, 0.02, 0.0),) * 2)
    plan.before_step()
    assert plan.timeline.problem.models[0].forward == (0.01,) * 4
    assert plan.timeline.problem.p2p == 1e-4


def test_without_steps_to_profile_the_greedy_plan_of_the_first_step_stays() -> None:
    plan = make(profile_steps=0)
    assert steps(plan, 4) == ["1f1b", "greedy", "greedy", "greedy"]
    assert not plan.profiling and not is_searching()


def test_without_a_search_the_greedy_plan_stays() -> None:
    plan = make(search_seconds=0)
    assert steps(plan, 6) == ["1f1b", *["greedy"] * 5]
    assert not plan.profiling and not is_searching()


def test_a_forward_only_step_leaves_the_state_as_it_is() -> None:
    plan = make()
    plan.before_step()
    kinds = {i.kind for i in plan.program(0, forward=True)}
    plan.after_step(None)
    assert kinds == {"F"}
    assert steps(plan, 2) == ["1f1b", "greedy"]


def test_every_rank_goes_through_the_same_states(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[list[bytes]] = []

    def record(messages: list[bytes], source: int) -> list[bytes]:
        sent.append(messages)
        return messages

    def replay(messages: None, source: int) -> list[bytes]:
        assert messages is None
        return sent.pop(0)

    monkeypatch.setattr(plan_file, "broadcast_messages", record)
    first = make()
    sources, orders = [], []
    deadline = time.monotonic() + PATIENCE
    while (not sources or sources[-1] != "search") and time.monotonic() < deadline:
        sources.append(step(first))
        orders.append(first.timeline.order)
        time.sleep(0.02)
    assert sources[-1] == "search"
    monkeypatch.setattr(plan_file, "broadcast_messages", replay)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    second = make()
    for source, order in zip(sources, orders, strict=True):
        assert step(second) == source
        assert second.timeline.order == order
    assert sent == [] and not is_searching()


def test_closing_ends_a_search_at_once() -> None:
    plan = make(search_seconds=600)
    steps(plan, 4)
    assert is_searching()
    began = time.monotonic()
    plan.close()
    assert time.monotonic() - began < 4
    assert not is_searching()
    assert step(plan) == "search"  # what it had found is used


# ---------------------------------------------------------------- when 1F1B is as good, or must do


def test_models_without_stages_stay_with_1f1b() -> None:
    alone = Layout.contiguous(1, 1, 1)
    plan = make(devices=map_devices(NAMES, [alone, alone]))
    assert steps(plan, 3) == ["1f1b"] * 3
    step_until(plan, lambda: not is_searching() and not plan.profiling)
    assert step(plan) == "1f1b"


@pytest.mark.parametrize("micro_batches", [3.0, 4.0, 5.0])
def test_plans_keep_to_the_memory_limit(micro_batches: float) -> None:
    limit = micro_batches * ACTIVATION
    plan = make(memory_limit=limit)
    steps(plan, 2)
    assert max(plan.timeline.peak_activation) <= limit
    assert plan.source == "greedy"
    step_until(plan, lambda: plan.source == "search")
    assert max(plan.timeline.peak_activation) <= limit


def test_a_plan_that_fits_the_memory_is_run_though_1f1b_is_shorter() -> None:
    plan = make(memory_limit=2 * ACTIVATION, search_seconds=0)
    steps(plan, 3)
    problem = plan.timeline.problem
    assert evaluate(problem, one_f_one_b(problem)).over_limit() is not None
    assert plan.timeline.makespan > back_to_back(problem)
    assert plan.source == "greedy" and plan.timeline.over_limit() is None


def test_where_nothing_fits_the_memory_1f1b_is_run() -> None:
    plan = make(memory_limit=ACTIVATION / 2)
    assert steps(plan, 3) == ["1f1b"] * 3
    step_until(plan, lambda: not is_searching())
    assert steps(plan, 2) == ["1f1b"] * 2


# ---------------------------------------------------------------- plans of before


def searched(folder: Path, counts: Sequence[int] = COUNTS) -> AutoPlan:
    plan = make(cache=folder, counts=counts)
    step_until(plan, lambda: plan.source == "search")
    return plan


def test_a_plan_found_once_is_run_from_the_second_step_of_the_next_job(tmp_path: Path) -> None:
    before = searched(tmp_path)
    plan = make(cache=tmp_path)
    assert steps(plan, 3) == ["1f1b", "cache", "cache"]
    assert plan.is_measured and not plan.profiling
    assert plan.timeline.order == before.timeline.order
    assert plan.program(2, False) == before.program(2, False)


def test_other_micro_batches_or_limits_have_a_plan_of_their_own(tmp_path: Path) -> None:
    searched(tmp_path)
    for plan in (
        make(cache=tmp_path, counts=(4, 3)),
        make(cache=tmp_path, memory_limit=1e9),
        make(cache=tmp_path, devices=opposite(2)),
    ):
        assert steps(plan, 2) == ["1f1b", "greedy"]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_plan_of_before_that_no_longer_fits_the_memory_is_not_run(tmp_path: Path) -> None:
    limit = 4 * ACTIVATION
    plan = make(cache=tmp_path, memory_limit=limit)
    step_until(plan, lambda: plan.source == "search")
    longer = tuple(dataclasses.replace(cost, activation=2 * ACTIVATION) for cost in COSTS)
    again = make(cache=tmp_path, memory_limit=limit)
    assert [step(again, longer) for _ in range(2)] == ["1f1b", "greedy"]
    assert max(again.timeline.peak_activation) <= limit


def _for_other_counts(text: str) -> str:
    problem = unmeasured_problem(DEVICES, (5, 5))
    return json.dumps(plan_to_json(make_plan(greedy(problem), greedy=1.0, seconds=0.0)))


def _out_of_sequence(text: str) -> str:
    plan = json.loads(text)
    other = {"a0F0": "a0F1", "a0F1": "a0F0", "a0B0": "a0B1", "a0B1": "a0B0"}
    plan["order"] = [[other.get(token, token) for token in row] for row in plan["order"]]
    return json.dumps(plan)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:-9],
        lambda text: "",
        lambda text: text.replace("a0F0", "a0F9", 1),
        _for_other_counts,
        _out_of_sequence,
    ],
)
def test_a_spoilt_plan_on_disk_is_made_anew(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    searched(tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(spoil(file.read_text()))
    plan = make(cache=tmp_path)
    assert steps(plan, 2) == ["1f1b", "greedy"]
    step_until(plan, lambda: plan.source == "search")
    assert load_plan(file).timeline.order == plan.timeline.order


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    plan = searched(tmp_path / "file" / "plans")
    assert step(plan) == "search"


def test_a_stored_plan_leaves_no_other_file(tmp_path: Path) -> None:
    cache = PlanCache(tmp_path / "new")
    timeline = greedy(unmeasured_problem(DEVICES, COUNTS))
    cache.store({"a": 1}, make_plan(timeline, greedy=timeline.makespan, seconds=1.0))
    assert list((tmp_path / "new").iterdir()) == [cache.path({"a": 1})]
    found = cache.load({"a": 1})
    assert found is not None and found.timeline.order == timeline.order
    assert cache.load({"a": 2}) is None


# ---------------------------------------------------------------- plans of a file


def write_plan(path: Path, counts: Sequence[int] = COUNTS) -> Path:
    timeline = greedy(unmeasured_problem(DEVICES, counts))
    plan = make_plan(timeline, greedy=timeline.makespan, seconds=0.0)
    path.write_text(json.dumps(plan_to_json(plan)))
    return path


def test_a_plan_of_a_file_is_run_from_the_first_step_and_timed_in_it(tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.json")
    plan = make(plan=file)
    plan.before_step()
    order = plan.timeline.order
    assert (plan.source, plan.profiling, plan.is_measured) == ("file", True, False)
    plan.after_step(COSTS)
    plan.before_step()
    assert (plan.source, plan.profiling, plan.is_measured) == ("file", False, True)
    assert plan.timeline.order == order == load_plan(file).timeline.order
    assert plan.timeline.problem.models[0].forward == (0.01,) * 4
    assert steps(plan, 3) == ["file"] * 3 and not is_searching()


def test_a_file_that_cannot_be_used_is_refused_at_every_try(tmp_path: Path) -> None:
    missing = make(plan=tmp_path / "none.json")
    other = make(plan=write_plan(tmp_path / "plan.json", (5, 4)))
    for _ in range(2):
        with pytest.raises(FileNotFoundError, match=r"none\.json"):
            missing.before_step()
        with pytest.raises(PlanMismatchError, match="actor runs 4"):
            other.before_step()


def test_an_order_out_of_sequence_is_refused(tmp_path: Path) -> None:
    file = write_plan(tmp_path / "plan.json")
    file.write_text(_out_of_sequence(file.read_text()))
    with pytest.raises(OrderError, match="must stay in sequence"):
        step(make(plan=file))


@pytest.mark.parametrize("error", [OSError("no disk"), ProblemError("p2p", "no"), KeyError("odd")])
def test_whatever_rank_0_fails_with_is_told_to_the_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    sent: list[list[bytes]] = []

    def load(path: Path) -> None:
        raise error

    def record(messages: list[bytes], source: int) -> list[bytes]:
        sent.append(messages)
        return messages

    monkeypatch.setattr(plan_file, "load_plan", load)
    monkeypatch.setattr(plan_file, "broadcast_messages", record)
    with pytest.raises(type(error)) as caught:
        make(plan=tmp_path).before_step()
    assert caught.value is error
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(plan_file, "broadcast_messages", lambda *_: sent.pop())
    with pytest.raises(PlanMismatchError) as told:
        make(plan=tmp_path).before_step()
    assert str(told.value) == str(error)


def problem_of(devices: DeviceMap, counts: Sequence[int] = COUNTS) -> Problem:
    return unmeasured_problem(devices, counts)


def _same_way() -> DeviceMap:
    layout = Layout.contiguous(4, 1, 4)
    return map_devices(NAMES, [layout, layout])


def _replicas_exchanged(problem: Problem) -> Problem:
    model = problem.models[1]
    exchanged = dataclasses.replace(model, pipelines=model.pipelines[::-1])
    return dataclasses.replace(problem, models=(problem.models[0], exchanged))


def _two_replicas() -> DeviceMap:
    layout = Layout.contiguous(4, 1, 4)
    return map_devices(NAMES, [layout, opposite_layout(layout, 1, 2)])


def test_a_plan_of_this_layout_is_accepted() -> None:
    for devices in (DEVICES, _same_way(), _two_replicas()):
        check_problem(problem_of(devices), devices, COUNTS)


@pytest.mark.parametrize(
    ("problem", "devices", "said"),
    [
        (problem_of(opposite(2)), DEVICES, "the plan is for 2 devices, this job has 4 in each of"),
        (
            problem_of(map_devices(("actor",), [Layout.contiguous(4, 1, 4)]), (4,)),
            DEVICES,
            "the plan is for 1 model(s), this job trains actor and critic",
        ),
        (
            problem_of(_same_way()),
            DEVICES,
            "models[1].pipelines: the plan has [[0, 1, 2, 3]], critic runs on [[3, 2, 1, 0]]: plan "
            "for this layout",
        ),
        (
            _replicas_exchanged(problem_of(_two_replicas())),
            _two_replicas(),
            "models[1].pipelines: want them in the order [[1, 0], [3, 2]]",
        ),
        (
            problem_of(DEVICES, (4, 6)),
            DEVICES,
            "models[1].micro_batches: the plan has 6, critic runs 4 in a step",
        ),
    ],
)
def test_a_plan_of_another_job_is_refused(problem: Problem, devices: DeviceMap, said: str) -> None:
    with pytest.raises(PlanMismatchError) as caught:
        check_problem(problem, devices, COUNTS)
    assert said in str(caught.value)
