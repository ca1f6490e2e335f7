"""Which prompts are answered and trained, against a plain simulation."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.data import Prompt, PromptSampler
from megatron_rlhfuse.rollout.prompt_rounds import (
    DrawnPrompt,
    Length,
    PromptBatch,
    PromptRounds,
    cutoff,
    extra_prompts,
    is_beyond,
    longest_responses,
    shortest,
)
from megatron_rlhfuse.rollout.samples import sample_seed

RUN_SEED = 11
DATASET: Any = [Prompt(index, (index,), str(index), {}) for index in range(9)]


@dataclass(frozen=True)
class Case:
    """How many prompts and samples there are."""

    trained: int
    extra: int
    copies: int
    seed: int

    def sampler(self) -> PromptSampler:
        return PromptSampler(len(DATASET), self.trained + self.extra, self.seed)

    def rounds(self, sampler: PromptSampler) -> PromptRounds:
        return PromptRounds(DATASET, sampler, self.copies, self.trained)


cases = st.builds(
    Case,
    trained=st.integers(1, 5),
    extra=st.integers(0, 7),
    copies=st.integers(1, 3),
    seed=st.integers(0, 99),
)


def random_lengths(batch: PromptBatch, rng: random.Random) -> dict[int, int]:
    """Of all samples; with ties."""
    return {sample: rng.randint(1, 8) for sample in range(len(batch))}


def longest(batch: PromptBatch, lengths: dict[int, int], position: int) -> int:
    """Of the responses to a prompt."""
    first = position * batch.copies
    return max(lengths[sample] for sample in range(first, first + batch.copies))


def key(drawn: DrawnPrompt) -> tuple[int, int, int]:
    return drawn.iteration, drawn.position, drawn.prompt.index


@dataclass
class Simulation:
    """The rounds once more, from lists of (iteration, position, index)."""

    case: Case
    waiting: list[tuple[int, int, int]] = field(default_factory=list)
    drawn: list[tuple[int, int, int]] = field(default_factory=list)
    trained: list[tuple[int, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sampler = self.case.sampler()

    def next_batch(self, iteration: int) -> list[tuple[int, int, int]]:
        number = self.case.trained
        if len(self.waiting) >= number:
            batch, self.waiting = self.waiting[:number], self.waiting[number:]
            return batch
        batch = [(iteration, *each) for each in enumerate(self.sampler.next_batch())]
        self.drawn += batch
        return batch

    def settle(self, batch: list[tuple[int, int, int]], tokens: list[int]) -> list[int]:
        """Positions trained. tokens: of the longest response, by position."""
        order = sorted(range(len(batch)), key=lambda position: tokens[position])
        kept = sorted(order[: self.case.trained])  # sorted() is stable: the first of equals
        self.trained += [batch[position] for position in kept]
        self.waiting += [each for position, each in enumerate(batch) if position not in kept]
        return kept


@settings(deadline=None)
@given(cases, st.integers(1, 25), st.randoms(use_true_random=False))
def test_rounds_are_as_simulated(case: Case, iterations: int, rng: random.Random) -> None:
    rounds, simulation = case.rounds(case.sampler()), Simulation(case)
    seeds: dict[tuple[int, int, int], list[int]] = {}
    for iteration in range(1, iterations + 1):
        batch = rounds.next_batch(iteration)
        wanted = simulation.next_batch(iteration)
        assert [key(each) for each in batch.drawn] == wanted
        assert batch.leaves_out == (len(wanted) > case.trained)
        # A deferred prompt keeps its seeds.
        for position, each in enumerate(wanted):
            own = [batch.seed(RUN_SEED, sample) for sample in batch.samples(position)]
            assert seeds.setdefault(each, own) == own
        lengths = random_lengths(batch, rng)
        tokens = [longest(batch, lengths, position) for position in range(len(wanted))]
        kept = simulation.settle(wanted, tokens)
        assert rounds.settle(batch, lengths) == {s for p in kept for s in batch.samples(p)}
        assert rounds.deferred == len(simulation.waiting)
    # Every prompt drawn was trained exactly once, or is deferred.
    assert sorted(simulation.trained + simulation.waiting) == simulation.drawn
    made = [seed for own in seeds.values() for seed in own]
    assert len(set(made)) == len(made) == len(simulation.drawn) * case.copies


@settings(deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_a_prompt_is_deferred_at_most_once(case: Case, rng: random.Random) -> None:
    rounds = case.rounds(case.sampler())
    answered: dict[tuple[int, int, int], list[bool]] = {}  # whether it was trained, each time
    for iteration in range(1, 20):
        batch = rounds.next_batch(iteration)
        kept = rounds.settle(batch, random_lengths(batch, rng))
        for position, each in enumerate(batch.drawn):
            samples = set(batch.samples(position))
            assert samples <= kept or not samples & kept
            answered.setdefault(key(each), []).append(samples <= kept)
    assert {tuple(each) for each in answered.values()} <= {(True,), (False,), (False, True)}


@given(cases, st.randoms(use_true_random=False))
def test_what_is_given_up_does_not_change_what_is_trained(case: Case, rng: random.Random) -> None:
    whole, partial = case.rounds(case.sampler()), case.rounds(case.sampler())
    batch = whole.next_batch(1)
    assert partial.next_batch(1) == batch
    lengths = random_lengths(batch, rng)
    kept = whole.settle(batch, lengths)
    # Of the others some samples are there, or all, or none.
    known = {sample: n for sample, n in lengths.items() if sample in kept or rng.random() < 0.5}
    assert partial.settle(batch, known) == kept
    assert partial.state_dict() == whole.state_dict()


@given(st.builds(Case, st.integers(1, 5), st.just(0), st.integers(1, 3), st.integers(0, 99)))
def test_without_extra_prompts_batches_are_the_samplers(case: Case) -> None:
    rounds, sampler, rng = case.rounds(case.sampler()), case.sampler(), random.Random(case.seed)
    for iteration in range(1, 6):
        batch = rounds.next_batch(iteration)
        drawn = sampler.next_batch()
        assert list(batch) == [DATASET[index] for index in drawn for _ in range(case.copies)]
        for sample in range(len(batch)):
            assert batch.seed(RUN_SEED, sample) == sample_seed(RUN_SEED, iteration, sample)
        assert not batch.leaves_out
        assert rounds.settle(batch, random_lengths(batch, rng)) == set(range(len(batch)))
        assert rounds.deferred == 0


@settings(deadline=None)
@given(cases, st.integers(0, 12), st.integers(0, 99))
def test_a_resumed_job_goes_on_as_if_never_stopped(case: Case, stop: int, seed: int) -> None:
    def run(sampler: PromptSampler, rounds: PromptRounds, iterations: range) -> Iterator[Any]:
        for iteration in iterations:
            batch = rounds.next_batch(iteration)
            lengths = random_lengths(batch, random.Random(seed + iteration))
            yield batch, rounds.settle(batch, lengths)

    sampler = case.sampler()
    whole = case.rounds(sampler)
    list(run(sampler, whole, range(1, stop + 1)))
    saved = json.loads(json.dumps([sampler.state_dict(), whole.state_dict()]))
    resumed_sampler = case.sampler()
    resumed = case.rounds(resumed_sampler)
    resumed_sampler.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    rest = range(stop + 1, stop + 9)
    assert list(run(resumed_sampler, resumed, rest)) == list(run(sampler, whole, rest))


tokens_by_prompt = st.lists(st.integers(1, 8), min_size=1, max_size=12)


@given(tokens_by_prompt, st.integers(1, 6), st.randoms(use_true_random=False))
def test_the_cutoff_only_falls(tokens: list[int], count: int, rng: random.Random) -> None:
    answered: list[Length] = []
    last: Length | None = None
    for position in rng.sample(range(len(tokens)), len(tokens)):
        answered.append((tokens[position], position))
        limit = cutoff(answered, count)
        assert (limit is None) == (len(answered) < count)
        if limit is not None:
            # Exactly the shortest are within it.
            assert {p for n, p in answered if (n, p) <= limit} == shortest(answered, count)
            assert last is None or limit <= last
        last = limit


@given(tokens_by_prompt, st.integers(1, 6), st.randoms(use_true_random=False))
def test_what_is_beyond_is_never_among_the_shortest(
    tokens: list[int], count: int, rng: random.Random
) -> None:
    kept = shortest([(n, position) for position, n in enumerate(tokens)], count)
    order = rng.sample(range(len(tokens)), len(tokens))
    for answered in range(len(tokens)):
        limit = cutoff(((tokens[each], each) for each in order[:answered]), count)
        for position in order[answered:]:
            for reached in range(tokens[position]):
                assert not (is_beyond(reached, position, limit) and position in kept)


@given(tokens_by_prompt, st.integers(1, 6), st.data())
def test_the_last_prompt_is_beyond_where_it_will_be_left_out(
    tokens: list[int], count: int, data: st.DataObject
) -> None:
    """Nothing that is certain is overlooked."""
    last = data.draw(st.sampled_from(range(len(tokens))))
    every = [(n, position) for position, n in enumerate(tokens)]
    limit = cutoff((each for each in every if each[1] != last), count)
    assert is_beyond(tokens[last] - 1, last, limit) == (last not in shortest(every, count))


def make_batch(prompts: int, copies: int) -> PromptBatch:
    drawn = tuple(DrawnPrompt(DATASET[8 - each], 1, each) for each in range(prompts))
    return PromptBatch(drawn, copies, prompts)


def test_prompts_with_a_sample_missing_are_not_answered() -> None:
    assert longest_responses(make_batch(3, 2), {0: 5, 1: 9, 2: 1, 4: 3, 5: 3}) == [(9, 0), (3, 2)]


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_a_batch_is_a_sequence_of_the_prompt_of_every_sample(
    prompts: int, copies: int, data: st.DataObject
) -> None:
    batch = make_batch(prompts, copies)
    wanted = [DATASET[8 - sample // copies] for sample in range(prompts * copies)]
    assert len(batch) == len(wanted)
    assert list(batch) == wanted
    assert list(reversed(batch)) == wanted[::-1]
    for index in range(-len(wanted), len(wanted)):
        assert batch[index] == wanted[index]
    part = data.draw(st.slices(len(wanted)))
    assert batch[part] == wanted[part]
    for outside in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            batch[outside]
    of_prompts = [sample for position in range(prompts) for sample in batch.samples(position)]
    assert of_prompts == list(range(len(wanted)))


@settings(deadline=None)
@given(cases, st.randoms(use_true_random=False))
def test_what_was_deferred_comes_first_in_a_job_without_extra_prompts(
    case: Case, rng: random.Random
) -> None:
    before = case.rounds(case.sampler())
    batch = before.next_batch(1)
    before.settle(batch, random_lengths(batch, rng))
    sampler = PromptSampler(len(DATASET), case.trained, seed=9)
    after = case.rounds(sampler)
    after.load_state_dict(before.state_dict())
    waiting = [tuple(each) for each in before.state_dict()["deferred"]]
    fresh = PromptSampler(len(DATASET), case.trained, seed=9)
    for iteration in (2, 3):
        drawn = [
            (d.prompt.index, d.iteration, d.position) for d in after.next_batch(iteration).drawn
        ]
        old, waiting = waiting[: case.trained], waiting[case.trained :]
        new = fresh.next_batch(case.trained - len(old))
        assert drawn == [*old, *((index, iteration, i) for i, index in enumerate(new))]
    assert after.deferred == len(waiting)


def test_a_checkpoint_without_deferred_prompts_is_loaded() -> None:
    case = Case(2, 1, 1, 3)
    rounds = case.rounds(case.sampler())
    rounds.load_state_dict({})
    assert rounds.deferred == 0


@pytest.mark.parametrize(
    ("trained", "fraction", "extra"), [(100, 0.07, 7), (100, 0.55, 55), (8, 0.3, 3), (8, 0.0, 0)]
)
def test_extra_prompts_are_rounded_up(trained: int, fraction: float, extra: int) -> None:
    assert extra_prompts(trained, fraction) == extra
