"""The lower bound: the published numbers, closed formulas, and no order ever below it."""

from __future__ import annotations

import time
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.bounds import (
    BusyTime,
    Job,
    device_bounds,
    least_memory,
    lower_bound,
    preemptive_bound,
    reaches,
)
from megatron_rlhfuse.schedule.errors import InfeasibleError
from megatron_rlhfuse.schedule.evaluate import evaluate
from megatron_rlhfuse.schedule.order import Order, parse_order
from megatron_rlhfuse.schedule.problem import Model, Problem, load_problem
from tests.unit.schedule_strategies import executable_orders, models, problems

PUBLISHED = Path(__file__).resolve().parents[2] / "examples/problems"
PUBLISHED_BOUNDS = [708, 372, 225, 702, 366, 225, 618, 330, 186, 606, 318, 186]


def uniform(
    devices: int, pipelines: list[list[int]], micro_batches: int, forward: float, backward: float
) -> Problem:
    """One model with equal stages."""
    stages = len(pipelines[0])
    model = Model(
        name="",
        micro_batches=micro_batches,
        forward=(forward,) * stages,
        backward=(backward,) * stages,
        activation=(1.0,) * stages,
        pipelines=tuple(map(tuple, pipelines)),
    )
    return Problem(devices, (model,))


def with_order(
    problem_strategy: st.SearchStrategy[Problem],
) -> st.SearchStrategy[tuple[Problem, Order]]:
    """A problem and some order of it that can be executed."""
    return problem_strategy.flatmap(
        lambda problem: st.tuples(st.just(problem), executable_orders(problem))
    )


def published_formula(problem: Problem) -> float:
    """RLHFuse's bound, per device: earliest first start + all work + shortest possible tail.

    With one pipeline alone it is that pipeline's chain. For pipelines that pass a device once.
    """
    bounds = []
    chains = [(model, [pipeline]) for model in problem.models for pipeline in model.pipelines]
    for group in [*([chain] for chain in chains), chains]:
        for device in range(problem.devices):
            heads, work, tails = [], 0.0, []
            for model, pipelines in group:
                for pipeline in pipelines:
                    if device in pipeline:
                        before = pipeline.index(device)
                        heads.append(sum(model.forward[:before]) + before * problem.p2p)
                        tails.append(sum(model.backward[:before]) + before * problem.p2p)
                        each = model.forward[before] + model.backward[before]
                        work += each * model.micro_batches
            if heads:
                bounds.append(min(heads) + work + min(tails))
    return max(bounds)


@pytest.mark.parametrize("number", range(12))
def test_the_published_bounds(number: int) -> None:
    problem = load_problem(PUBLISHED / f"published-{number:02}.json")
    assert lower_bound(problem) == PUBLISHED_BOUNDS[number] == published_formula(problem)


@settings(max_examples=300, deadline=None)
@given(with_order(problems(max_micro_batches=3)))
def test_no_order_is_below_the_bound(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    bounds = device_bounds(problem)
    bound = lower_bound(problem)
    assert bound.is_integer()
    assert max(bounds) <= bound <= evaluate(problem, order).makespan
    for needed, work in zip(bounds, problem.work(), strict=True):
        assert needed >= work


@settings(max_examples=100, deadline=None)
@given(with_order(problems(integer_times=False)))
def test_no_order_is_below_the_bound_where_times_are_rounded(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    assert lower_bound(problem) <= evaluate(problem, order).makespan * (1 + 1e-12)


@settings(max_examples=200, deadline=None)
@given(problems(repeat_devices=False, split_backward=False, max_micro_batches=6))
def test_at_least_the_published_formula(problem: Problem) -> None:
    assert lower_bound(problem) >= published_formula(problem)


def test_above_the_published_formula_where_forwards_arrive_late() -> None:
    model = Model("", 2, (5.0, 1.0), (1.0, 1.0), (1.0, 1.0), ((0, 1),))
    problem = Problem(2, (model,))
    rows = [["a0F0", "a0F1", "a0B0", "a0B1"], ["a0F0", "a0B0", "a0F1", "a0B1"]]
    assert evaluate(problem, parse_order(problem, rows)).makespan == 13
    assert published_formula(problem) == 12
    assert lower_bound(problem) == 13  # the second F arrives at 10, and then takes 3


def test_a_device_that_is_passed_again_has_to_do_its_earlier_stages_first() -> None:
    # After the first F of stage 0, its second and the first of stage 2 run on the same device, in
    # either order, and both leave at least 7 to be done: 3 + 3 + 1 + 7. Chains alone give 13.
    model = Model("", 2, (3.0, 1.0, 1.0, 1.0), (1.0,) * 4, (1.0,) * 4, ((0, 1, 0, 1),))
    problem = Problem(2, (model,))
    rows = [["a0F0", "a0F1", "a0F0", "a0F1", "a0B0", "a0B1", "a0B0", "a0B1"]] * 2
    assert lower_bound(problem) == 14 == evaluate(problem, parse_order(problem, rows)).makespan


@settings(max_examples=100, deadline=None)
@given(models(1, max_micro_batches=8))
def test_one_device_needs_its_work(model: Model) -> None:
    problem = Problem(1, (model,), p2p=5.0)  # nothing is transferred
    assert lower_bound(problem) == problem.work()[0]


@pytest.mark.parametrize(("stages", "micro_batches"), [(1, 5), (4, 1), (4, 3), (4, 9), (7, 7)])
def test_one_pipeline_alone_needs_what_1f1b_takes(stages: int, micro_batches: int) -> None:
    problem = uniform(stages, [list(range(stages))], micro_batches, 2.0, 3.0)
    assert lower_bound(problem) == (micro_batches + stages - 1) * (2 + 3)


def test_transfers_count_both_ways() -> None:
    model = Model("", 1, (1.0,) * 3, (2.0,) * 3, (1.0,) * 3, ((0, 1, 1),))
    assert lower_bound(Problem(2, (model,), p2p=0.5)) == 9 + 2 * 0.5


def test_a_weight_gradient_may_be_done_when_the_rest_has_left() -> None:
    # F, F, B of 2, B of 1, W of 2 on the first device; the other's W of 3 starts beside the last B.
    model = Model("", 1, (1.0, 1.0), (3.0, 5.0), (1.0, 1.0), ((0, 1),), (2.0, 3.0))
    problem = Problem(2, (model,))
    order = parse_order(problem, [["a0F0", "a0B0", "a0W0"]] * 2)
    assert lower_bound(problem) == 7 == evaluate(problem, order).makespan


def test_the_bottleneck_device_stands_out_and_an_idle_one_has_no_bound() -> None:
    model = Model("", 10, (1.0, 4.0), (1.0, 4.0), (1.0, 1.0), ((0, 2),))
    assert device_bounds(Problem(4, (model,))) == [20, 0, 82, 0]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 5), st.integers(0, 9)), min_size=1, max_size=7
    )
)
def test_the_preemptive_bound_is_the_largest_over_all_sets(
    jobs: list[tuple[int, int, int]],
) -> None:
    sets = [some for n in range(1, len(jobs) + 1) for some in combinations(jobs, n)]
    expected = max(
        min(head for head, _, _ in some)
        + sum(duration for _, duration, _ in some)
        + min(tail for _, _, tail in some)
        for some in sets
    )
    assert preemptive_bound([Job(*job) for job in jobs]) == expected


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), min_size=1))
def test_a_machine_is_busy_until_the_latest_over_all_heads(jobs: list[tuple[int, int]]) -> None:
    busy = BusyTime()
    for head, duration in jobs:
        busy.add(head, duration)
    assert busy.end == max(
        start + sum(duration for head, duration in jobs if head >= start) for start, _ in jobs
    )


@settings(max_examples=300, deadline=None)
@given(with_order(problems(max_micro_batches=3) | problems(integer_times=False)))
def test_no_order_takes_less_than_the_least_memory(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    timeline = evaluate(problem, order)
    least = least_memory(problem, timeline.makespan)
    assert least <= max(timeline.peak_activation) * (1 + 1e-12)
    assert least <= least_memory(problem, lower_bound(problem))
    one_by_one = least_memory(problem, 1e6)
    assert one_by_one <= least
    for model in problem.models:
        assert one_by_one >= max(model.activation)


@settings(max_examples=60, deadline=None)
@given(
    problems(max_devices=3, max_micro_batches=3, max_stages=3, max_models=2),
    st.sampled_from([1.0, 1.0, 1.2]),
)
def test_below_the_least_memory_every_order_is_longer(problem: Problem, more: float) -> None:
    """Against the exact solver, under the highest cap below the bound; activations are whole."""
    pytest.importorskip("ortools", reason="OR-tools is not installed")
    from megatron_rlhfuse.schedule.exact import solve_exactly

    free = solve_exactly(problem, 60)
    makespan = free.timeline.makespan * more
    least = least_memory(problem, makespan)
    assert free.optimal and least.is_integer()
    if least == 0:
        return
    try:
        found = solve_exactly(problem, 60, least - 1)
    except InfeasibleError as error:
        assert str(error) == "no order keeps to the memory limits"
        return
    assert found.optimal
    assert found.timeline.makespan > makespan


@pytest.mark.parametrize(
    ("stages", "micro_batches"), [(1, 5), (2, 2), (4, 1), (4, 3), (4, 9), (7, 7)]
)
def test_one_pipeline_alone_holds_what_1f1b_holds(stages: int, micro_batches: int) -> None:
    problem = uniform(stages, [list(range(stages))], micro_batches, 2.0, 3.0)
    makespan = (micro_batches + stages - 1) * 5.0
    assert least_memory(problem, makespan) == min(stages, micro_batches)
    assert least_memory(problem, makespan * (1 + 1e-12)) == min(stages, micro_batches)
    assert least_memory(problem, 5.0 * stages * micro_batches) == 1  # one after the other


def test_pipelines_that_must_overlap_add_up() -> None:
    # Both models' forwards on device 0 must have started at time 2, and no backward ends by then.
    model = Model("", 1, (1.0, 5.0), (1.0, 1.0), (3.0, 1.0), ((0, 1),))
    problem = Problem(3, (model, Model("", 1, (1.0, 5.0), (1.0, 1.0), (4.0, 1.0), ((0, 2),))))
    assert lower_bound(problem) == 9
    assert least_memory(problem, 9) == 7
    assert least_memory(problem, 16) == 4


def test_no_jobs_need_no_time() -> None:
    assert preemptive_bound([]) == 0


def test_rounding_does_not_hide_that_the_bound_is_reached() -> None:
    problem = uniform(8, [list(range(8))], 1000, 0.1, 0.7)
    bound = lower_bound(problem)
    assert bound == pytest.approx(1007 * 0.8, rel=1e-12)
    assert all(reaches(bound * scale, bound) for scale in (1 - 1e-12, 1.0, 1 + 1e-12))
    assert not reaches(bound + 1e-5, bound)


def test_64_devices_take_well_under_a_second() -> None:
    down = tuple(range(64))
    times = {"forward": (2.0,) * 64, "backward": (4.0,) * 64, "activation": (1.0,) * 64}
    actor = Model("actor", 256, **times, pipelines=(down,))
    critic = Model("critic", 256, **times, pipelines=(down[::-1],))
    began = time.process_time()
    lower_bound(Problem(64, (actor, critic)))
    assert time.process_time() - began < 2.5  # 0.3 s on an idle core
