"""The searches: valid plans within the limits, at the optimum, the same whatever the machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import inf, pi
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.schedule import search as searches
from megatron_rlhfuse.schedule.baselines import merge_backward, one_f_one_b, serial_timeline
from megatron_rlhfuse.schedule.bounds import least_memory, lower_bound
from megatron_rlhfuse.schedule.errors import InfeasibleError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.order import Order, order_to_tokens, parse_order
from megatron_rlhfuse.schedule.pareto import front, pareto
from megatron_rlhfuse.schedule.problem import Model, Problem, load_problem
from megatron_rlhfuse.schedule.search import (
    Progress,
    Result,
    StopSearch,
    anneal,
    greedy,
    search,
)
from tests.unit.schedule_strategies import executable_orders, problems

PUBLISHED = Path(__file__).resolve().parents[2] / "examples/problems"
PUBLISHED_BOUNDS = [708, 372, 225, 702, 366, 225, 618, 330, 186, 606, 318, 186]

ANY = problems(memory_limit=True) | problems(memory_limit=True, integer_times=False)
"""One to three models, split backwards, interleaved stages, transfers, limits that can be kept."""

METHODS: list[Callable[[Problem], Timeline]] = [
    greedy,
    lambda problem: search(problem, iterations=16, threads=1).timeline,
    lambda problem: anneal(problem, iterations=200, threads=1).timeline,
]


def published(number: int) -> Problem:
    return load_problem(PUBLISHED / f"published-{number:02}.json")


def checked(timeline: Timeline) -> Timeline:
    """The timeline after the checks that every plan must pass, by way of its tokens."""
    problem = timeline.problem
    again = evaluate(problem, parse_order(problem, order_to_tokens(timeline.order)))
    assert again.makespan == timeline.makespan
    assert again.peak_activation == timeline.peak_activation
    assert again.over_limit() is None
    assert lower_bound(problem) <= again.makespan * (1 + 1e-12)
    assert least_memory(problem, again.makespan) <= max(again.peak_activation) * (1 + 1e-12)
    return again


def peak(timeline: Timeline) -> float:
    return max(timeline.peak_activation)


def one_micro_batch_fits(problem: Problem) -> bool:
    """Of each pipeline alone, on every device."""
    for model in problem.models:
        for pipeline in model.pipelines:
            needed = [0.0] * problem.devices
            for stage, device in enumerate(pipeline):
                needed[device] += model.activation[stage]
            if any(n > limit for n, limit in zip(needed, problem.memory_limit, strict=True)):
                return False
    return True


def small_problem(seed: int) -> Problem:
    """Mostly below a hundred subtasks; every third one has memory limits."""
    rng = random.Random(seed)
    devices = rng.randint(2, 3)

    def times(stages: int) -> tuple[float, ...]:
        return tuple(float(rng.randint(1, 7)) for _ in range(stages))

    models = []
    for _ in range(rng.randint(1, 2)):
        stages = rng.randint(1, devices)
        interleaved = rng.random() < 0.3
        ways = [rng.sample(range(devices), stages) for _ in range(rng.randint(1, 2))]
        if interleaved:
            ways, stages = [way * 2 for way in ways], stages * 2
        backward, weight = times(stages), times(stages)
        split = rng.random() < 0.3
        models.append(
            Model(
                name="",
                micro_batches=rng.randint(1, 3 if interleaved else 4),
                forward=times(stages),
                backward=tuple(b + w for b, w in zip(backward, weight, strict=True))
                if split
                else backward,
                activation=tuple(float(rng.randint(1, 3)) for _ in range(stages)),
                pipelines=tuple(map(tuple, ways)),
                weight_gradient=weight if split else None,
            )
        )
    problem = Problem(devices, tuple(models), p2p=float(rng.choice([0, 0, 1, 2])))
    if seed % 3:
        return problem
    needed = [0.0] * devices
    for model in models:
        for pipeline in model.pipelines:
            for stage, device in enumerate(pipeline):
                needed[device] += model.activation[stage]
    return replace(problem, memory_limit=tuple(n + rng.randint(0, 2) for n in needed))


def scaled(
    problem: Problem, *, time: float = 1.0, activation: float = 1.0, exactly: bool = False
) -> Problem:
    """Other units. `exactly`: products are rounded to the decimal number that is meant."""

    def times(values: tuple[float, ...], scale: float) -> tuple[float, ...]:
        return tuple(round(x * scale, 6) if exactly else x * scale for x in values)

    models = []
    for model in problem.models:
        weight = model.weight_gradient
        models.append(
            replace(
                model,
                forward=times(model.forward, time),
                backward=times(model.backward, time),
                activation=times(model.activation, activation),
                weight_gradient=None if weight is None else times(weight, time),
            )
        )
    (p2p,) = times((problem.p2p,), time)
    limits = times(problem.memory_limit, activation)
    return Problem(problem.devices, tuple(models), p2p, limits)


def renumbered(problem: Problem) -> Problem:
    """The last device becomes the first."""
    last = problem.devices - 1
    models = tuple(
        replace(model, pipelines=tuple(tuple(last - d for d in way) for way in model.pipelines))
        for model in problem.models
    )
    return replace(problem, models=models, memory_limit=problem.memory_limit[::-1])


def swapped(problem: Problem) -> Problem:
    """The last model becomes the first."""
    return replace(problem, models=problem.models[::-1])


def backwards(problem: Problem) -> Problem:
    """Time runs the other way, for models whose backward is whole."""
    models = tuple(
        replace(model, forward=model.backward, backward=model.forward) for model in problem.models
    )
    return replace(problem, models=models)


@pytest.mark.parametrize("method", METHODS, ids=["greedy", "search", "anneal"])
@settings(max_examples=150, deadline=None)
@given(problem=ANY)
def test_every_plan_is_valid_and_within_the_limits(
    method: Callable[[Problem], Timeline], problem: Problem
) -> None:
    timeline = method(problem)
    assert timeline.problem is problem
    checked(timeline)


@pytest.mark.parametrize("method", METHODS, ids=["greedy", "search", "anneal"])
@settings(max_examples=100, deadline=None)
@given(
    problem=problems(max_devices=3, max_micro_batches=3),
    limits=st.lists(st.integers(0, 12).map(float), min_size=3, max_size=3),
)
def test_infeasible_is_what_cannot_hold_one_micro_batch_and_nothing_else(
    method: Callable[[Problem], Timeline], problem: Problem, limits: list[float]
) -> None:
    problem = replace(problem, memory_limit=tuple(limits[: problem.devices]))
    if one_micro_batch_fits(problem):
        checked(method(problem))
    else:
        with pytest.raises(InfeasibleError, match=r"^memory_limit: device \d has"):
            method(problem)


@settings(max_examples=150, deadline=None)
@given(problem=ANY)
def test_a_search_is_no_longer_than_greedy_and_1f1b(problem: Problem) -> None:
    found = search(problem, iterations=8, threads=1)
    # Times without a common unit are rounded before the search.
    makespan = found.timeline.makespan * (1 - 1e-8)
    assert found.greedy == greedy(problem).makespan
    assert search(problem, seconds=1e-9).timeline.makespan * (1 - 1e-8) <= found.greedy
    assert makespan <= found.greedy
    assert anneal(problem, iterations=8, threads=1).timeline.makespan * (1 - 1e-8) <= found.greedy
    for baseline in (
        evaluate(problem, one_f_one_b(problem)),
        serial_timeline(merge_backward(problem), one_f_one_b),
    ):
        if baseline.over_limit() is None:
            assert makespan <= baseline.makespan


@settings(max_examples=100, deadline=None)
@given(problem=problems(max_micro_batches=6))
def test_greedy_keeps_no_more_in_flight_than_1f1b(problem: Problem) -> None:
    for row in greedy(problem).order:
        held: dict[tuple[int, int, int], int] = {}
        for model, pipeline, kind, _, stage in row:
            place = model, pipeline, stage
            if kind == "F":
                held[place] = held.get(place, 0) + 1
                assert held[place] <= problem.models[model].stages - stage
            if kind == problem.models[model].kinds[-1]:
                held[place] -= 1


@settings(max_examples=60, deadline=None)
@given(problem=problems(), scale=st.sampled_from([3.0, 0.1]))
def test_other_units_give_the_same_plan(problem: Problem, scale: float) -> None:
    first = search(problem, iterations=24, threads=1)
    for other in (
        scaled(problem, time=scale, exactly=True),
        scaled(problem, activation=scale, exactly=True),
    ):
        found = search(other, iterations=24, threads=1)
        assert found.timeline.order == first.timeline.order
        times = first.timeline.makespan, found.timeline.makespan
        assert times[1] / times[0] == pytest.approx(
            other.models[0].forward[0] / problem.models[0].forward[0], rel=1e-12
        )


@pytest.mark.parametrize("seed", [seed for seed in range(24) if seed % 3])  # without limits
def test_times_without_decimals_give_plans_as_short(seed: int) -> None:
    problem = small_problem(seed)
    expected = search(problem, iterations=3000, threads=2, stop_at_bound=True).timeline
    other = scaled(problem, time=pi)
    found = search(other, iterations=3000, threads=2, stop_at_bound=True).timeline
    assert checked(found).makespan == pytest.approx(expected.makespan * pi, rel=1e-8)


@settings(max_examples=100, deadline=None)
@given(problem=problems(memory_limit=True))
def test_activations_without_decimals_fit_where_decimal_ones_do(problem: Problem) -> None:
    expected = greedy(problem)
    found = greedy(scaled(problem, activation=pi))
    assert checked(found).order == expected.order


def test_a_limit_that_is_a_sum_of_measured_activations_admits_that_sum() -> None:
    sizes = (1.1234567891234, pi, 1.3)
    model = Model("", 6, (1.0,) * 3, (1.0,) * 3, sizes, ((0, 1, 2),))
    free = search(Problem(3, (model,)), iterations=8)
    capped = replace(Problem(3, (model,)), memory_limit=tuple(free.timeline.peak_activation))
    assert capped.memory_limit == (3 * sizes[0], 2 * sizes[1], sizes[2])
    found = search(capped, iterations=8).timeline
    assert checked(found).makespan == free.timeline.makespan == 16  # as 1F1B
    lower = tuple(limit * (1 - 1e-7) for limit in capped.memory_limit[:2])
    tighter = replace(capped, memory_limit=(*lower, inf))
    assert checked(search(tighter, iterations=64).timeline).makespan > 16


@pytest.mark.parametrize("limit", [1e15, 5e12, 1e9])
def test_a_limit_far_above_all_activations_is_none(limit: float) -> None:
    model = Model("", 6, (1.0,) * 3, (2.0,) * 3, (1e-9, 2e-9 / 3, 1e-9), ((0, 1, 2),))
    free, limited = Problem(3, (model,)), Problem(3, (model,), memory_limit=(limit,) * 3)
    found = search(limited, iterations=64).timeline
    assert found.order == search(free, iterations=64).timeline.order


@pytest.mark.parametrize("number", range(12))
def test_the_published_instances_meet_their_bounds(number: int) -> None:
    problem = published(number)
    found = search(problem, iterations=2000, threads=2, stop_at_bound=True)
    assert checked(found.timeline).makespan == PUBLISHED_BOUNDS[number] == found.lower_bound
    assert found.turns < 2000


def test_a_published_instance_under_the_peak_of_serial_1f1b() -> None:
    problem = published(5)
    limit = max(serial_timeline(merge_backward(problem), one_f_one_b).peak_activation)
    found = search(replace(problem, memory_limit=(limit,) * 8), iterations=600).timeline
    assert peak(checked(found)) <= limit
    assert found.makespan == PUBLISHED_BOUNDS[5]


@pytest.mark.parametrize("seed", range(45))
def test_the_search_finds_the_optimum_of_small_problems(seed: int) -> None:
    """And of the same problem seen from another side."""
    problem = small_problem(seed)
    best = optimum(problem)
    sides = [problem, renumbered(problem), swapped(problem)]
    if all(model.weight_gradient is None for model in problem.models):
        sides.append(backwards(problem))
    for side in sides:
        found = search(side, iterations=3000, threads=2, stop_at_bound=True)
        makespan = checked(found.timeline).makespan
        if interleaved(problem) and any(limit < inf for limit in problem.memory_limit):
            # A list schedule reserves room for a micro-batch on all of a device's stages at once:
            # under tight limits some optima are out of its reach.
            assert best <= makespan <= found.greedy
        else:
            assert makespan == best


def optimum(problem: Problem) -> float:
    """The least makespan by CP-SAT, proven."""
    pytest.importorskip("ortools", reason="OR-tools is not installed")
    from megatron_rlhfuse.schedule.exact import solve_exactly

    found = solve_exactly(problem, seconds=60)
    assert found.optimal
    return found.timeline.makespan


def interleaved(problem: Problem) -> bool:
    """Whether a pipeline passes a device more than once."""
    return any(len({*way}) < len(way) for model in problem.models for way in model.pipelines)


def test_threads_do_not_matter_but_the_seed_does() -> None:
    problem = replace(published(9), memory_limit=(40.0,) * 16)
    found = {
        seed: [search(problem, iterations=300, threads=n, seed=seed) for n in (1, 2, 9)]
        for seed in (0, 1)
    }
    for first, *others in found.values():
        for other in others:
            assert other.timeline.order == first.timeline.order
            assert other.turns == first.turns
    assert found[0][0].timeline.order != found[1][0].timeline.order


def test_an_annealing_is_the_same_every_time_but_for_the_seed() -> None:
    found = [
        anneal(published(1), iterations=20_000, threads=threads, seed=seed).timeline
        for threads, seed in [(1, 0), (2, 0), (1, 5)]
    ]
    assert found[0].order == found[1].order != found[2].order
    assert found[0].makespan < greedy(published(1)).makespan


def test_an_annealing_lowers_the_memory_without_a_loss_of_time() -> None:
    reports: list[Progress] = []
    found = anneal(published(1), iterations=400_000, threads=1, progress=reports.append).timeline
    half = len(reports) // 2
    first, second = reports[:half], reports[half:]
    assert checked(found).makespan == second[-1].makespan <= first[-1].makespan
    assert peak(found) < first[-1].peak_activation
    assert first[-1].makespan < greedy(published(1)).makespan


def test_the_search_lowers_the_memory_when_the_bound_is_met() -> None:
    problem = published(1)
    first = search(problem, iterations=1500, stop_at_bound=True)
    found = search(problem, iterations=1500)
    assert found.timeline.makespan == first.timeline.makespan == found.lower_bound
    assert first.turns < 600 <= 1500 <= found.turns
    assert found.least_memory <= peak(checked(found.timeline)) < 0.8 * peak(first.timeline)


@pytest.mark.parametrize("method", [search, anneal])
def test_a_search_wants_a_budget(method: Callable[..., Result]) -> None:
    with pytest.raises(ScheduleError, match="want a budget, seconds or iterations"):
        method(published(0))


@pytest.mark.parametrize(("method", "step"), [(search, 700), (anneal, 1)])
@pytest.mark.parametrize("iterations", [1, 100, 1700])
def test_iterations_bound_a_search(
    method: Callable[..., Result], step: int, iterations: int
) -> None:
    found = method(published(6), iterations=iterations, threads=2)
    assert iterations <= found.turns <= iterations + step  # a walk's first step is many turns
    checked(found.timeline)


@pytest.mark.parametrize("method", [search, anneal])
def test_seconds_bound_a_search(method: Callable[..., Result]) -> None:
    began = time.monotonic()
    found = method(published(6), seconds=0.5, threads=2)
    took = time.monotonic() - began
    assert 0.5 <= found.seconds <= took < 10
    checked(found.timeline)


@pytest.mark.parametrize("method", [search, anneal])
def test_the_smaller_of_two_budgets_counts(method: Callable[..., Result]) -> None:
    found = method(published(6), seconds=60, iterations=500, threads=1)
    assert found.seconds < 30
    assert 500 <= found.turns <= 1200


@settings(max_examples=100, deadline=None)
@given(
    drawn=problems(memory_limit=True).flatmap(
        lambda problem: st.tuples(st.just(problem), executable_orders(problem))
    )
)
def test_an_order_to_start_from_is_never_made_longer(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    start = evaluate(problem, order)
    found = search(problem, iterations=8, threads=1, start=order).timeline
    checked(found)
    if start.over_limit() is None:
        assert (found.makespan, peak(found)) <= (start.makespan, peak(start))


def test_a_search_starts_from_an_order_that_it_is_given() -> None:
    best = search(published(1), iterations=600, seed=1).timeline
    again = search(published(1), iterations=600, start=best.order, stop_at_bound=True)
    assert again.turns == 0  # it is at the bound
    assert again.timeline.order == best.order


@pytest.mark.parametrize("method", [search, anneal])
def test_a_search_that_is_stopped_returns_its_best_so_far(method: Callable[..., Result]) -> None:
    reports: list[Progress] = []

    def stop_after_two(progress: Progress) -> None:
        reports.append(progress)
        if len(reports) == 2:
            raise StopSearch

    found = method(published(9), iterations=10_000_000, threads=2, progress=stop_after_two)
    assert len(reports) == 2
    assert checked(found.timeline).makespan == reports[-1].makespan
    assert peak(found.timeline) == pytest.approx(reports[-1].peak_activation, rel=1e-12)
    assert found.turns < 1_000_000


def test_progress_is_in_the_units_of_the_problem_and_never_goes_back() -> None:
    reports: list[Progress] = []
    problem = scaled(published(1), time=0.1, activation=0.1, exactly=True)
    found = search(problem, iterations=3000, threads=2, progress=reports.append)
    assert len(reports) >= 3
    for one, other in pairwise(reports):
        assert one.seconds <= other.seconds
        assert (other.makespan, other.peak_activation) <= (one.makespan, one.peak_activation)
        assert other.lower_bound == pytest.approx(37.2)
    assert reports[-1].makespan == pytest.approx(found.timeline.makespan, rel=1e-12)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("method", [search, anneal])
def test_a_search_ends_where_nothing_is_left_to_gain(method: Callable[..., Result]) -> None:
    """Memory at its bound, though not the makespan at its own: both engines must come to an end."""
    times = (4.0, 1.0, 1.0, 1.0), (4.0, 2.0, 3.0, 1.0)
    model = Model("", 2, *times, (0.0,) * 4, ((1, 1, 0, 1),))
    found = method(Problem(2, (model,), p2p=1.0), iterations=2000, threads=2)
    assert peak(checked(found.timeline)) == 0 == found.least_memory
    assert found.timeline.makespan == 29 == found.lower_bound + 1


@pytest.mark.parametrize("method", [search, anneal])
def test_errors_of_a_callback_are_not_swallowed(method: Callable[..., Result]) -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError("of the callback")

    with pytest.raises(RuntimeError, match="of the callback"):
        method(published(9), iterations=1000, progress=fail)


def test_a_front_holds_what_no_other_point_beats() -> None:
    problem = published(1)
    found = pareto(problem, iterations=2000, threads=2)
    assert len(found) >= 2
    for one, other in pairwise(found):
        assert one.makespan < other.makespan and peak(one) > peak(other)
    for timeline in found:
        assert timeline.problem is problem
        checked(timeline)
    assert found[0].makespan == PUBLISHED_BOUNDS[1]
    assert front(found[::-1]) == found
    assert front([*found, serial_timeline(merge_backward(problem), one_f_one_b)])[0] is found[0]


@settings(max_examples=25, deadline=None)
@given(problem=ANY)
def test_fronts_keep_to_the_limits(problem: Problem) -> None:
    for timeline in pareto(problem, iterations=64, threads=1):
        checked(timeline)


def test_walks_of_a_search_by_time_use_every_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    walks: list[int] = []
    engine = searches._planner.Search

    def spy(*args: object) -> object:
        walks.append(args[-1])  # type: ignore[arg-type]
        return engine(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(searches._planner, "Search", spy)
    search(published(0), seconds=0.1, threads=3)
    search(published(0), iterations=1, threads=3)
    assert walks == [3, searches.WALKS]


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"seconds": 0}, "seconds"),
        ({"iterations": 0}, "iterations"),
        ({"iterations": 10, "threads": 0}, "threads"),
        ({"iterations": 10, "seed": -1}, "seed"),
    ],
)
def test_numbers_that_make_no_search_are_refused(wrong: dict[str, int], field: str) -> None:
    for method in (search, anneal):
        with pytest.raises(ScheduleError, match=f"^{field}: want"):
            method(published(5), **wrong)


def test_a_front_reaches_down_to_one_micro_batch_whatever_transfers_cost() -> None:
    slow = replace(published(5), p2p=1000.0)
    points = pareto(slow, iterations=4000)
    assert len(points) > 3
    assert max(points[-1].peak_activation) < 0.5 * max(points[0].peak_activation)
