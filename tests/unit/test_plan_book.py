"""Plans of a job whose numbers of micro-batches change: what they share, and who may search."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse.pipeline.autoplan import AutoPlan, PlanOptions
from megatron_rlhfuse.pipeline.plan_book import PlanBook
from megatron_rlhfuse.pipeline.profile import Costs, StageCost
from tests.unit.one_rank_planning import (
    ACTIVATION,
    COSTS,
    DEVICES,
    PATIENCE,
    is_searching,
    one_rank,
)

ONE, OTHER = (4, 4), (5, 3)
QUICK = PlanOptions(search_seconds=0.1, profile_steps=2)
ENDLESS = PlanOptions(search_seconds=600, profile_steps=2)
TOKENS = (100, 100)
UNTIL_SEARCH = 1 + QUICK.profile_steps
"""Steps that are timed; the next one begins with a search."""


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    yield from one_rank(monkeypatch)


@pytest.fixture
def open_book() -> Iterator[Callable[[PlanOptions], PlanBook]]:
    books = []

    def opened(options: PlanOptions) -> PlanBook:
        books.append(PlanBook(DEVICES, options))
        return books[-1]

    yield opened
    for book in books:
        book.close()


OpenBook = Callable[[PlanOptions], PlanBook]


def key() -> Mapping[str, Any]:
    return {"model": "small"}


def step(
    book: PlanBook,
    counts: tuple[int, int],
    costs: Costs = COSTS,
    tokens: tuple[int, int] = TOKENS,
) -> AutoPlan:
    """A step; returns its plan."""
    plan = book.plan(counts, tokens, key, lambda: 1e-4)
    assert plan.program(0, forward=False)
    assert tuple(model.micro_batches for model in plan.timeline.problem.models) == counts
    plan.after_step(costs if plan.profiling else None)
    return plan


def step_until(book: PlanBook, counts: tuple[int, int], done: Callable[[AutoPlan], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not done(plan := step(book, counts)):
        assert time.monotonic() < deadline, plan.source
        time.sleep(0.02)


def searches() -> int:
    return sum(thread.name == "plan search" for thread in threading.enumerate())


def test_the_first_pair_measures_before_it_plans(open_book: OpenBook) -> None:
    book = open_book(QUICK)
    plan = book.plan(ONE, TOKENS, key, lambda: 1e-4)
    assert (plan.source, plan.is_measured, plan.measures_memory) == ("1f1b", False, True)


def test_another_pair_has_a_plan_of_its_own_from_its_first_step(open_book: OpenBook) -> None:
    book = open_book(QUICK)
    first = step(book, ONE)
    plan = book.plan(OTHER, TOKENS, key, lambda: 1e-4)
    assert plan is not first
    assert (plan.source, plan.is_measured, plan.profiling) == ("greedy", True, True)
    assert plan.measures_memory  # its own micro-batches may hold more
    problem = plan.timeline.problem
    assert [model.micro_batches for model in problem.models] == [5, 3]
    assert [model.forward for model in problem.models] == [(0.01,) * 4, (0.012,) * 4]
    assert [model.activation for model in problem.models] == [(ACTIVATION,) * 4] * 2
    assert problem.p2p == 1e-4


def test_a_pair_that_comes_again_keeps_its_plan(open_book: OpenBook) -> None:
    book = open_book(PlanOptions(search_seconds=0, profile_steps=2))
    plans = [step(book, counts) for counts in (ONE, OTHER, ONE, OTHER)]
    assert plans[0] is plans[2] and plans[1] is plans[3] and plans[0] is not plans[1]


def test_a_pair_is_described_and_a_hop_is_timed_once(open_book: OpenBook) -> None:
    book = open_book(PlanOptions(search_seconds=0, profile_steps=2))
    calls = []

    def described() -> Mapping[str, Any]:
        calls.append("key")
        return key()

    def timed() -> float:
        calls.append("transfer")
        return 1e-4

    def taken(counts: tuple[int, int]) -> list[str]:
        calls.clear()
        book.plan(counts, TOKENS, described, timed).after_step(COSTS)
        return list(calls)

    assert taken(ONE) == ["key"]
    assert taken(ONE) == ["transfer"]
    assert taken(OTHER) == ["key", "transfer"]
    assert [taken(counts) for counts in (ONE, OTHER) * 3] == [[]] * 6


def test_a_pair_that_started_from_another_measures_for_itself(open_book: OpenBook) -> None:
    book = open_book(PlanOptions(search_seconds=0, profile_steps=2))
    step(book, ONE)
    costs = tuple(StageCost(0.03, 0.07, ACTIVATION) for _ in COSTS)
    plans = [step(book, OTHER, costs) for _ in range(3)]
    assert not plans[-1].profiling
    problem = plans[-1].timeline.problem
    assert [model.forward for model in problem.models] == [(0.03,) * 4] * 2


def test_the_limit_of_memory_holds_from_the_first_step_of_another_pair(
    open_book: OpenBook,
) -> None:
    limit = 4 * ACTIVATION
    book = open_book(PlanOptions(search_seconds=0, memory_limit=limit))
    step(book, ONE)
    plan = step(book, OTHER)
    assert plan.is_measured and max(plan.timeline.peak_activation) <= limit


def test_larger_micro_batches_of_another_pair_are_taken_to_hold_more(open_book: OpenBook) -> None:
    limit = 6 * ACTIVATION
    book = open_book(PlanOptions(search_seconds=0, memory_limit=limit))
    step(book, ONE)
    plan = step(book, OTHER, tokens=(150, 80))
    models = plan.timeline.problem.models
    assert [model.activation for model in models] == [(1.5 * ACTIVATION,) * 4, (ACTIVATION,) * 4]
    assert max(plan.timeline.peak_activation) <= limit


def test_a_pair_takes_over_what_its_own_micro_batches_hold(open_book: OpenBook) -> None:
    book = open_book(PlanOptions(search_seconds=0, profile_steps=2))
    step(book, ONE)
    held = tuple(StageCost(0.01, 0.02, 3 * ACTIVATION) for _ in COSTS)
    plan = book.plan(OTHER, TOKENS, key, lambda: 1e-4)
    metered = []
    for _ in range(3):
        metered.append(plan.measures_memory)
        plan.after_step(held if plan.profiling else None)
        plan = book.plan(OTHER, TOKENS, key, lambda: 1e-4)
    assert metered == [True, False, False]
    problem = plan.timeline.problem
    assert [model.activation for model in problem.models] == [(3 * ACTIVATION,) * 4] * 2


def test_one_search_at_a_time(open_book: OpenBook) -> None:
    book = open_book(ENDLESS)
    for _ in range(UNTIL_SEARCH):
        step(book, ONE)
    assert step(book, ONE).is_searching and searches() == 1
    for _ in range(2 * UNTIL_SEARCH):
        plan = step(book, OTHER)
        assert plan.source == "greedy" and not plan.is_searching
        assert searches() == 1
    assert not plan.profiling  # it has measured enough, and waits for its turn


def test_a_pair_searches_once_no_other_does(open_book: OpenBook) -> None:
    book = open_book(QUICK)
    for _ in range(UNTIL_SEARCH):
        step(book, ONE)
    first = step(book, ONE)
    assert first.is_searching
    # The first pair never comes up again, and what its search finds is taken up all the same.
    step_until(book, OTHER, lambda plan: plan.is_searching)
    assert not first.is_searching and first.source == "search"
    step_until(book, OTHER, lambda plan: plan.source == "search")
    settled = first.timeline
    again = step(book, ONE)
    assert again is first and again.timeline is settled and not again.profiling
    assert not is_searching()


def test_pairs_by_turns_all_come_to_the_plan_that_was_searched_for(open_book: OpenBook) -> None:
    book = open_book(QUICK)
    pairs = [ONE, OTHER, (3, 4)]
    deadline = time.monotonic() + PATIENCE
    while {step(book, counts).source for counts in pairs} != {"search"}:
        assert searches() <= 1
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert not is_searching()


def test_plans_of_all_pairs_are_kept_on_disk(open_book: OpenBook, tmp_path: Path) -> None:
    options = PlanOptions(search_seconds=0.1, profile_steps=1, cache=tmp_path)
    book = open_book(options)
    for counts in (ONE, OTHER):
        step_until(book, counts, lambda plan: plan.source == "search")
    assert len(list(tmp_path.iterdir())) == 2
    later = open_book(options)
    assert [step(later, ONE).source for _ in range(2)] == ["1f1b", "cache"]
    # This pair's plan is known, and what micro-batches cost is known of the other.
    assert step(later, OTHER).source == "cache"


def test_closing_ends_a_search_at_once(open_book: OpenBook) -> None:
    book = open_book(ENDLESS)
    step(book, OTHER)
    for _ in range(UNTIL_SEARCH + 1):
        step(book, ONE)
    assert is_searching()
    began = time.monotonic()
    book.close()
    assert time.monotonic() - began < 4
    assert not is_searching()
    book.close()  # once more does no harm


def test_an_empty_book_closes(open_book: OpenBook) -> None:
    open_book(QUICK).close()
