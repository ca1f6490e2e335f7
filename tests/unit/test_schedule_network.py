"""The problem in ticks: exact for decimals, close for other numbers, and back to an order."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import e, fsum, inf, pi, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse import _planner
from megatron_rlhfuse.schedule.errors import InfeasibleError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.network import TOTAL_TICKS, TickedProblem, to_network
from megatron_rlhfuse.schedule.order import Order
from megatron_rlhfuse.schedule.problem import Model, Problem
from tests.unit.schedule_strategies import executable_orders, problems

DECIMALS = st.integers(1, 100_000).map(lambda n: n / 1000)


def two_stages(
    forward: tuple[float, float],
    backward: tuple[float, float],
    activation: tuple[float, float] = (1.0, 1.0),
    *,
    micro_batches: int = 4,
    weight_gradient: tuple[float, float] | None = None,
    p2p: float = 0.0,
    limits: tuple[float, ...] = (),
) -> Problem:
    model = Model(
        "", micro_batches, forward, backward, activation, ((0, 1),), weight_gradient=weight_gradient
    )
    return Problem(2, (model,), p2p, limits)


def exactly(value: float) -> Fraction:
    """The decimal number that is written for it."""
    return Fraction(repr(value))


def ordered_by_micro_batch(problem: Problem, order: Order) -> bool:
    """Whether every stage runs its micro-batches in order: the network knows no other orders."""
    last: dict[tuple[int, int, str, int], int] = {}
    for row in order:
        for model, pipeline, kind, micro_batch, stage in row:
            if last.get((model, pipeline, kind, stage), -1) > micro_batch:
                return False
            last[model, pipeline, kind, stage] = micro_batch
    return True


@settings(max_examples=100, deadline=None)
@given(
    times=st.lists(DECIMALS, min_size=4, max_size=4),
    sizes=st.lists(DECIMALS, min_size=2, max_size=2),
    p2p=DECIMALS | st.just(0.0),
)
def test_decimal_numbers_are_exact(times: list[float], sizes: list[float], p2p: float) -> None:
    forward, backward = (times[0], times[1]), (times[2], times[3])
    problem = two_stages(forward, backward, (sizes[0], sizes[1]), p2p=p2p)
    found = to_network(problem)
    (ticked,) = found.ticks.models
    unit = exactly(times[0]) / int(ticked.forward[0])
    pairs = [*zip(ticked.forward + ticked.backward, times, strict=True), (found.ticks.p2p, p2p)]
    assert all(tick.is_integer() and int(tick) * unit == exactly(time) for tick, time in pairs)
    size_unit = exactly(sizes[0]) / int(ticked.activation[0])
    assert int(ticked.activation[1]) * size_unit == exactly(sizes[1])
    assert found.time_unit == pytest.approx(float(unit), rel=1e-15)
    assert found.memory_unit == pytest.approx(float(size_unit), rel=1e-15)


def test_the_unit_is_the_largest_there_is() -> None:
    problem = two_stages((0.1, 0.3), (0.2, 0.7), (1.95, 3.9), p2p=0.5, limits=(5.85, inf))
    found = to_network(problem)
    (ticked,) = found.ticks.models
    assert (ticked.forward, ticked.backward, found.ticks.p2p) == ((1, 3), (2, 7), 5)
    assert (ticked.activation, found.limits) == ((1, 2), [3, _planner.NO_LIMIT])
    assert (found.time_unit, found.memory_unit) == (0.1, 1.95)


@settings(max_examples=100, deadline=None)
@given(problem=problems(integer_times=False))
def test_other_numbers_are_rounded_by_less_than_1e_8_of_the_longest(problem: Problem) -> None:
    found = to_network(problem)
    largest = max(problem.p2p, *(t for m in problem.models for t in m.forward + m.backward))
    assert abs(found.ticks.p2p * found.time_unit - problem.p2p) <= 1e-8 * largest
    for ticked, model in zip(found.ticks.models, problem.models, strict=True):
        for stage in range(model.stages):
            for kind in model.kinds:
                time = ticked.duration(kind, stage)
                assert time.is_integer() and time >= 1
                assert abs(time * found.time_unit - model.duration(kind, stage)) <= 1e-8 * largest


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.tuples(st.floats(0.01, 9), st.floats(0.01, 9)),
    held=st.integers(1, 8),
    lost=st.sampled_from([0.0, 1e-7]),
)
def test_limits_in_ticks_hold_in_truth(sizes: tuple[float, float], held: int, lost: float) -> None:
    """A sum of activations is admitted at exactly that limit, and not 1e-7 below it."""
    limits = (sizes[0] * held * (1 - lost), fsum([sizes[1]] * held) * (1 - lost))
    problem = two_stages((1.0, 1.0), (1.0, 1.0), sizes, micro_batches=8, limits=limits)
    if lost and held == 1:
        with pytest.raises(InfeasibleError, match=r"a micro-batch of .* takes"):
            to_network(problem)
        return
    found = to_network(problem)
    (ticked,) = found.ticks.models
    for device, size in enumerate(sizes):
        assert ticked.activation[device] * found.memory_unit >= size * (1 - 1e-15)
        admitted = found.limits[device] // int(ticked.activation[device])
        assert admitted == (held - 1 if lost else held)


def test_limits_are_rounded_down_to_what_can_be_held() -> None:
    problem = two_stages((1.0, 1.0), (1.0, 1.0), (0.1, 0.3), limits=(0.1 + 0.2, 0.5999999))
    assert to_network(problem).limits == [3, 5]
    below = replace(problem, memory_limit=(0.1 * (1 - 1e-7), 1.0))
    with pytest.raises(
        InfeasibleError, match=r"^memory_limit: device 0 has 0\.1, a micro-batch of"
    ):
        to_network(below)


def test_a_device_that_is_passed_again_holds_two_stages_of_a_micro_batch() -> None:
    model = Model("", 1, (1.0,) * 3, (1.0,) * 3, (2.0, 1.0, 2.5), ((0, 1, 0),))
    assert to_network(Problem(2, (model,), memory_limit=(4.5, 1.0))).limits == [9, 2]
    with pytest.raises(InfeasibleError, match=r"device 0 has 4\.4, .* of models\[0\]"):
        to_network(Problem(2, (model,), memory_limit=(4.4, 1.0)))


def test_numbers_of_very_different_size() -> None:
    problem = two_stages(
        (1e-9, 1e6), (1e6, 1e-9), (1e-9, 1e6), weight_gradient=(1.0, 1e-10), limits=(1e15, 2e6)
    )
    found = to_network(problem)
    (ticked,) = found.ticks.models
    weight = ticked.weight_gradient
    assert weight is not None
    for times in (ticked.forward, ticked.backward, weight):
        assert all(1 <= time <= TOTAL_TICKS / problem.subtasks for time in times)
    assert all(b > w for b, w in zip(ticked.backward, weight, strict=True))
    assert ticked.activation[0] >= 1
    assert found.limits[0] == _planner.NO_LIMIT
    assert _planner.greedy(found.network, found.limits)[1] < _planner.FAILED
    assert found.timeline(_planner.greedy(found.network, found.limits)).over_limit() is None


@pytest.mark.parametrize("times", [(1e12, 1.0), (1e15, 1e15 / 3), (pi, e * 1e-12), (1e-300, 1e9)])
def test_sums_of_all_ticks_are_exact_in_floats(times: tuple[float, float]) -> None:
    problem = two_stages(times, times, (times[0], sqrt(2)), micro_batches=300_000)
    found = to_network(problem)
    (ticked,) = found.ticks.models
    assert sum(ticked.forward + ticked.backward) * 300_000 < 2**53
    assert sum(ticked.activation) * 300_000 < 2**53


def test_memory_may_be_free() -> None:
    problem = two_stages((1.0, 2.0), (3.0, 4.0), (0.0, 0.0), limits=(0.0, inf))
    assert to_network(problem).limits == [0, _planner.NO_LIMIT]


@st.composite
def ticked_orders(draw: st.DrawFn) -> tuple[TickedProblem, Order]:
    problem = draw(problems(max_micro_batches=3))
    return to_network(problem), draw(executable_orders(problem))


@settings(max_examples=200, deadline=None)
@given(drawn=ticked_orders())
def test_an_order_as_a_row_and_back(drawn: tuple[TickedProblem, Order]) -> None:
    ticked, order = drawn
    row = ticked.row(order)
    starts, makespan, peak = row
    timed = evaluate(ticked.problem, order)
    assert ticked.order(row) == order
    assert len(starts) == ticked.network.subtasks == ticked.problem.subtasks
    assert makespan * ticked.time_unit == pytest.approx(timed.makespan, rel=1e-12)
    assert peak * ticked.memory_unit == pytest.approx(max(timed.peak_activation), rel=1e-12)


@settings(max_examples=100, deadline=None)
@given(problem=problems())
def test_the_rows_of_the_planner_are_those_of_the_evaluator(problem: Problem) -> None:
    """Starts, makespan and peak that C++ computes, against the reference in Python."""
    ticked = to_network(problem)
    row = _planner.greedy(ticked.network, ticked.limits)
    order = ticked.order(row)
    again = ticked.row(order)
    assert ordered_by_micro_batch(problem, order)
    # A list schedule may start something later than its order needs; not with a gain.
    assert all(mine >= earliest for mine, earliest in zip(row[0], again[0], strict=True))
    assert row[1] >= again[1]
    assert row[2] == again[2]
