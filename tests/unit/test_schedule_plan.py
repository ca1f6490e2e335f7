"""Plans as files: what is written comes back, and nothing that was changed passes."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from math import nextafter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.bounds import lower_bound
from megatron_rlhfuse.schedule.errors import OrderError, ProblemError, ScheduleError
from megatron_rlhfuse.schedule.plan import (
    Plan,
    is_plan,
    load_plan,
    make_plan,
    parse_plan,
    plan_to_json,
)
from megatron_rlhfuse.schedule.problem import Model, Problem
from megatron_rlhfuse.schedule.search import greedy, search
from tests.unit.schedule_strategies import problems

ACTOR = Model("actor", 3, (1.0, 2.0), (2.0, 4.0), (1.5, 2.5), ((0, 1),))
CRITIC = Model("critic", 2, (1.0, 1.0), (3.0, 3.0), (1.0, 1.0), ((1, 0),), (1.0, 1.0))
PROBLEM = Problem(2, (ACTOR, CRITIC), p2p=0.5, memory_limit=(6.0, 7.0))


def planned(problem: Problem) -> Plan:
    timeline = greedy(problem)
    return make_plan(timeline, greedy=timeline.makespan, seconds=0.25)


WRITTEN: dict[str, Any] = json.loads(json.dumps(plan_to_json(planned(PROBLEM))))


def edited(edit: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    data = copy.deepcopy(WRITTEN)
    edit(data)
    return data


def put(name: str, value: Any) -> Callable[[dict[str, Any]], object]:
    return lambda data: data.update({name: value})


def swap(device: int, one: str, other: str) -> Callable[[dict[str, Any]], object]:
    def edit(data: dict[str, Any]) -> None:
        row = data["order"][device]
        i, j = row.index(one), row.index(other)
        row[i], row[j] = row[j], row[i]

    return edit


@settings(max_examples=100, deadline=None)
@given(problem=problems(memory_limit=True) | problems(integer_times=False))
def test_a_plan_comes_back_from_its_json(problem: Problem) -> None:
    found = search(problem, iterations=8, threads=1)
    plan = make_plan(found.timeline, greedy=found.greedy, seconds=found.seconds)
    assert plan.lower_bound == lower_bound(problem) == found.lower_bound
    assert parse_plan(json.loads(json.dumps(plan_to_json(plan)))) == plan


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(WRITTEN))
    assert load_plan(path) == planned(PROBLEM)
    assert is_plan(WRITTEN)
    assert not is_plan(WRITTEN["problem"])


def test_a_plan_is_at_the_bound_or_not() -> None:
    one = replace(PROBLEM, models=(ACTOR,))
    assert planned(one).at_bound
    timeline = greedy(PROBLEM)
    late = replace(timeline, makespan=timeline.makespan * 1.01)
    assert not make_plan(late, greedy=1.0, seconds=0.0).at_bound


TAMPERED: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (put("makespan", WRITTEN["makespan"] - 1e-3), "makespan: the file says"),
    (put("lower_bound", WRITTEN["lower_bound"] + 1e-3), "lower_bound: the file says"),
    (put("serial_1f1b", WRITTEN["serial_1f1b"] * 2), "serial_1f1b: the file says"),
    (put("peak_activation", [0.0, 0.0]), "peak_activation[0]: the file says"),
    (put("peak_activation", [WRITTEN["peak_activation"][0], 99.0]), "peak_activation[1]: the file"),
    (put("peak_activation", [1.0]), "peak_activation: want a number, or one per device (2)"),
    (put("seconds", -1), "seconds: want a number of at least 0"),
    (put("seconds", float("inf")), "seconds: want a number"),
    (put("greedy", None), "greedy: want a number"),
    (put("version", 2), "version: want 1"),
    (put("version", "1"), "version: want 1"),
    (put("speed", 3), "speed: unknown field"),
    (lambda data: data.pop("order"), "order: missing"),
    (lambda data: data.pop("problem"), "problem: missing"),
    (put("problem", 7), "problem.problem: want a JSON object"),
    (lambda data: data["problem"].update(p2p=-1), "problem.p2p: want a number of at least 0"),
    (
        lambda data: data["problem"]["models"][1].update(forward="fast"),
        "problem.models[1].forward: want a number",
    ),
    (lambda data: data["problem"].update(memory_limit=[6, 1]), "order: device 1 takes"),
    (lambda data: data["problem"]["models"][0].update(forward=[1, 1]), "makespan: the file says"),
    (lambda data: data["problem"]["models"][0].update(activation=1), "peak_activation[0]: the"),
    (put("order", 7), "order: want a list of tokens per device"),
    (lambda data: data["order"].pop(), "order: 1 rows, but the problem has 2 devices"),
    (lambda data: data["order"].append([]), "order: 3 rows, but the problem has 2 devices"),
    (lambda data: data["order"][1].remove("a0B1"), "device 1: a0B1 is missing"),
    (lambda data: data["order"][0].append("a0F0"), "(a0F0): stands here more than once"),
    (lambda data: data["order"][0].append("c0F0"), "(c0F0): the problem has no such model"),
    (lambda data: data["order"][0].append("a0W0"), "(a0W0): the problem has no such kind W"),
    (lambda data: data["order"][0].append("a1F0"), "(a1F0): this pipeline has no stage"),
    (lambda data: data["order"][0].append("a0F3"), "(a0F3): the problem has no such micro-batch"),
    (lambda data: data["order"][0].insert(0, "F"), "device 0, position 0 (F): not a token"),
    (lambda data: data["order"][0].insert(0, 5), "device 0, position 0 (5): not a token"),
    (swap(1, "a0F0", "a0B0"), "a deadlock: a0B0 on device 1 waits for a0F0 on device 1"),
    (swap(0, "a0F0", "a0B2"), "a deadlock: "),
]


@pytest.mark.parametrize(("edit", "says"), TAMPERED, ids=[says for _, says in TAMPERED])
def test_a_plan_that_was_changed_is_refused_where_it_was(
    edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_plan(edited(edit))
    message = str(caught.value)
    assert says in message
    assert message.isprintable()
    if message.startswith("device"):
        assert isinstance(caught.value, OrderError)
        assert "device" in caught.value.grid


def test_another_order_that_can_be_executed_needs_its_own_numbers() -> None:
    serial = [sorted(row, key=lambda token: token[0]) for row in WRITTEN["order"]]
    with pytest.raises(ProblemError, match="makespan: the file says"):
        parse_plan(edited(put("order", serial)))


def test_numbers_may_differ_by_rounding() -> None:
    parse_plan(edited(put("makespan", nextafter(WRITTEN["makespan"], 0))))


@settings(max_examples=100, deadline=None)
@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda item: (
            st.lists(item, max_size=4)
            | st.dictionaries(
                st.sampled_from([*WRITTEN, *WRITTEN["problem"]]) | st.text(max_size=3),
                item,
                max_size=9,
            )
        ),
        max_leaves=30,
    )
)
def test_what_is_no_plan_is_refused(data: Any) -> None:
    with pytest.raises(ScheduleError):
        parse_plan(data)


def places(data: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in JSON."""
    items = data.items() if isinstance(data, dict) else enumerate(data)
    found = []
    for key, value in items:
        found.append((*path, key))
        if isinstance(value, dict | list):
            found += places(value, (*path, key))
    return found


PLACES = places(WRITTEN)
SCALARS: list[Any] = [None, True, -1, 0, 0.5, 2, 3, 1e15, 1e300, 10**400, float("nan"), "", "a0F0"]
VALUES: list[Any] = [*SCALARS, [], {}, [[]], [["a0F0"]], "\ud800", "b0W1", "a0B0\n"]


def mutate(data: Any, place: tuple[Any, ...], value: Any) -> bool:
    """Sets what is at `place`; "delete" and "twice" in a list do that. False if it is no more."""
    for key in place[:-1]:
        try:
            data = data[key]
        except (KeyError, IndexError, TypeError):
            return False
    key = place[-1]
    if not isinstance(data, dict if isinstance(key, str) else list):
        return False
    if isinstance(data, list) and key >= len(data):
        return False
    if value == "delete":
        data.pop(key, None) if isinstance(data, dict) else data.pop(key)
    elif value == "twice" and isinstance(data, list):
        data.append(data[key])
    else:
        data[key] = copy.deepcopy(value)
    return True


@settings(max_examples=500, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.sampled_from(PLACES), st.sampled_from([*VALUES, "delete", "twice"])),
        min_size=1,
        max_size=3,
    )
)
def test_a_plan_that_was_damaged_is_refused_or_still_true(
    changes: list[tuple[tuple[Any, ...], Any]],
) -> None:
    data = copy.deepcopy(WRITTEN)
    for place, value in changes:
        mutate(data, place, value)
    try:
        plan = parse_plan(data)
    except ScheduleError as error:
        assert str(error).isprintable()
        return
    again = parse_plan(json.loads(json.dumps(plan_to_json(plan))))
    assert again == plan
