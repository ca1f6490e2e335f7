"""The exact solver: against all orders of tiny problems, the lower bound, the published optima."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.bounds import lower_bound, reaches
from megatron_rlhfuse.schedule.errors import InfeasibleError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate, predecessor
from megatron_rlhfuse.schedule.exact import solve_exactly
from megatron_rlhfuse.schedule.order import (
    Order,
    Subtask,
    order_to_tokens,
    parse_order,
    subtasks_of,
)
from megatron_rlhfuse.schedule.problem import Model, Problem, load_problem
from tests.unit.schedule_strategies import executable_orders, problems

pytest.importorskip("ortools", reason="OR-tools is not installed")

PUBLISHED = Path(__file__).resolve().parents[2] / "examples/problems"
SECONDS = 30.0
"""Far more than any problem here takes: running out of it is a failure."""

SMALL = problems(max_devices=3, max_models=3, max_micro_batches=3, max_stages=3)


def optimum(problem: Problem, memory: float | None = None) -> Timeline:
    """A shortest order, with the checks that every result must pass."""
    found = solve_exactly(problem, SECONDS, memory)
    assert found.optimal
    assert found.bound == pytest.approx(found.timeline.makespan, rel=1e-12)
    tokens = order_to_tokens(found.timeline.order)
    again = evaluate(problem, parse_order(problem, tokens))
    assert again.makespan == found.timeline.makespan
    assert again.peak_activation == found.timeline.peak_activation
    return again


def every_order(problem: Problem) -> Iterator[Timeline]:
    """All orders that can be executed and that tokens can express, micro-batches in any order."""
    subtasks = [
        (device, subtask)
        for m, model in enumerate(problem.models)
        for pipeline in range(len(model.pipelines))
        for device, subtask in subtasks_of(problem, m, pipeline)
    ]
    seen: set[tuple[tuple[Subtask, ...], ...]] = set()
    stack: list[tuple[tuple[Subtask, ...], ...]] = [((),) * problem.devices]
    while stack:
        rows = stack.pop()
        done = {subtask for row in rows for subtask in row}
        if len(done) == len(subtasks):
            order = [list(row) for row in rows]
            if parse_order(problem, order_to_tokens(order)) == order:
                yield evaluate(problem, order)
        for device, subtask in subtasks:
            before = predecessor(problem, subtask)
            if subtask not in done and (before is None or before in done):
                longer = (*rows[:device], (*rows[device], subtask), *rows[device + 1 :])
                if longer not in seen:
                    seen.add(longer)
                    stack.append(longer)


def model(
    micro_batches: int,
    forward: tuple[float, ...],
    backward: tuple[float, ...],
    pipelines: tuple[tuple[int, ...], ...],
    *,
    activation: tuple[float, ...] = (1.0, 1.5, 2.0),
    weight: tuple[float, ...] | None = None,
) -> Model:
    held = activation[: len(forward)]
    return Model("", micro_batches, forward, backward, held, pipelines, weight)


ACTOR = model(2, (2.0, 1.0), (3.0, 5.0), ((0, 1),))
TINY = {
    "opposite": Problem(2, (ACTOR, model(1, (3.0, 2.0), (2.0, 4.0), ((1, 0),)))),
    "transfer": Problem(2, (model(2, (2.0, 1.0), (3.0, 5.0), ((0, 1),)),), p2p=1.5),
    "split": Problem(2, (model(2, (2.0, 1.0), (3.0, 5.0), ((0, 1),), weight=(2.0, 3.0)),)),
    "two pipelines": Problem(
        2, (model(1, (2.0, 1.0), (3.0, 5.0), ((0, 1),)), model(1, (3.0,), (4.0,), ((1,), (0,))))
    ),
    "interleaved": Problem(2, (model(2, (2.0, 1.0, 1.0), (1.0, 3.0, 2.0), ((0, 1, 0),)),)),
    "interleaved, split": Problem(
        2,
        (
            model(1, (2.0, 1.0, 1.0), (5.0, 3.0, 4.0), ((0, 1, 0),), weight=(1.0, 1.0, 3.0)),
            model(1, (1.0,), (3.0,), ((0,),)),
        ),
    ),
    "three models": Problem(
        2,
        (
            model(1, (2.0, 1.0), (3.0, 5.0), ((0, 1),)),
            model(1, (1.0, 2.0), (2.0, 2.0), ((1, 0),)),
            model(1, (3.0,), (1.0,), ((1,),)),
        ),
    ),
}


@pytest.mark.parametrize("name", TINY)
def test_equals_the_best_of_all_orders_at_every_memory_limit(name: str) -> None:
    problem = TINY[name]
    reachable = {(max(each.peak_activation), each.makespan) for each in every_order(problem)}
    best = min(makespan for _, makespan in reachable)
    assert lower_bound(problem) <= best == optimum(problem).makespan
    peaks = sorted({peak for peak, _ in reachable})
    for memory in peaks:
        expected = min(makespan for peak, makespan in reachable if peak <= memory)
        within = optimum(problem, memory)
        assert within.makespan == expected
        assert max(within.peak_activation) <= memory
    with pytest.raises(InfeasibleError, match="no order keeps to the memory limits"):
        solve_exactly(problem, SECONDS, peaks[0] - 0.25)


def test_a_memory_limit_can_cost_time() -> None:
    # Else the tests around would not see whether limits change anything.
    assert optimum(TINY["opposite"], 2.0).makespan > optimum(TINY["opposite"]).makespan


@settings(max_examples=60, deadline=None)
@given(SMALL.flatmap(lambda problem: st.tuples(st.just(problem), executable_orders(problem))))
def test_between_the_lower_bound_and_any_order(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    shortest = optimum(problem).makespan
    assert lower_bound(problem) <= shortest <= evaluate(problem, order).makespan


@settings(max_examples=40, deadline=None)
@given(
    problems(
        max_devices=3, max_models=2, max_micro_batches=3, max_stages=3, memory_limit=True
    ).flatmap(lambda problem: st.tuples(st.just(problem), executable_orders(problem)))
)
def test_keeps_to_limits_and_beats_every_order_that_does(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    within = optimum(problem)
    limits = problem.memory_limit
    assert all(p <= limit for p, limit in zip(within.peak_activation, limits, strict=True))
    other = evaluate(problem, order)
    if all(p <= limit for p, limit in zip(other.peak_activation, limits, strict=True)):
        assert within.makespan <= other.makespan
    assert optimum(replace(problem, memory_limit=())).makespan <= within.makespan


@pytest.mark.parametrize(("number", "published"), [(2, 225), (5, 225)])
def test_published_instances_are_solved_to_their_bound(number: int, published: float) -> None:
    problem = load_problem(PUBLISHED / f"published-{number:02}.json")
    assert optimum(problem).makespan == published


def test_memory_of_1f1b_depth_is_enough_for_the_published_optimum() -> None:
    problem = load_problem(PUBLISHED / "published-05.json")
    within = optimum(problem, memory=15.6)
    assert within.makespan == 225
    assert max(within.peak_activation) <= 15.6


@pytest.mark.parametrize("unit", [0.1, 0.003, 1e-9, 1000.0])
def test_times_may_be_decimal(unit: float) -> None:
    def scaled(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(round(value * unit, 9) for value in values)

    models = tuple(
        replace(each, forward=scaled(each.forward), backward=scaled(each.backward))
        for each in TINY["opposite"].models
    )
    small = optimum(replace(TINY["opposite"], models=models))
    whole = optimum(TINY["opposite"])
    assert small.makespan == pytest.approx(whole.makespan * unit, rel=1e-12)
    assert reaches(small.makespan, whole.makespan * unit)


def test_a_backward_and_its_part_are_subtracted_as_decimals() -> None:
    split = model(2, (0.1, 0.1), (1.1, 1.1), ((0, 1),), weight=(0.8, 0.8))
    assert split.duration("B", 0) != 0.3  # as floats
    assert optimum(Problem(2, (split,))).makespan == pytest.approx(2.7)


def test_activations_are_added_as_decimals() -> None:
    problem = Problem(1, (model(3, (1.0,), (1.0,), ((0,),), activation=(0.1,)),))
    assert 0.1 + 0.1 + 0.1 > 0.3  # as floats
    assert optimum(problem, memory=0.3).makespan == 6


def test_the_same_order_every_time() -> None:
    problem = load_problem(PUBLISHED / "published-05.json")
    first, second = (solve_exactly(problem, SECONDS) for _ in range(2))
    assert first == second


def test_time_that_runs_out_is_said() -> None:
    problem = load_problem(PUBLISHED / "published-05.json")
    with pytest.raises(ScheduleError, match="within 0 s; more time may help") as without:
        solve_exactly(problem, 0.0)
    assert not isinstance(without.value, InfeasibleError)
    with pytest.raises(InfeasibleError, match="within 0 s; more time may help"):
        solve_exactly(problem, 0.0, memory=20.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"p2p": 1 / 3}, r"p2p: 0\.333\d+ has more than 9 decimals; round it"),
        ({"p2p": 0.1 + 0.2}, r"p2p: 0\.30000000000000004 has more"),
        (
            {"models": (replace(ACTOR, backward=(1.0, 2 / 3)),)},
            r"models\[0\], stage 1: backward: 0\.666",
        ),
        (
            {"models": (replace(ACTOR, activation=(1.0, 2 / 3)),), "memory_limit": (9.0, 9.0)},
            r"models\[0\], stage 1: activation: 0\.666",
        ),
        ({"p2p": 1e9 + 1e-6}, r"times: all together \d+ of their common unit 1e-0\d"),
    ],
)
def test_numbers_that_cannot_be_scaled_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ScheduleError, match=message):
        solve_exactly(replace(TINY["opposite"], **changes), SECONDS)  # type: ignore[arg-type]


def test_without_or_tools_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(ScheduleError, match=r"pip install megatron_rlhfuse\[exact\]"):
        solve_exactly(TINY["opposite"], SECONDS)
