"""The longest prompts are left out: with engines that only count tokens, over a real TCPStore."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.data import Prompt
from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.rollout import tail_cut
from megatron_rlhfuse.rollout.prompt_rounds import (
    DrawnPrompt,
    PromptBatch,
    longest_responses,
    shortest,
)
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.rollout.tail_cut import TailCut

INSTANCES = 2
TIMEOUT_S = 30.0
ITERATIONS = itertools.count(1)
"""Each test has one of its own in the store."""


@pytest.fixture(autouse=True)
def always_look(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step looks at the noted lengths, however soon it comes."""
    monkeypatch.setattr(tail_cut, "LOOK_S", -1.0)


@pytest.fixture(scope="module")
def queues() -> Iterator[list[SampleQueue]]:
    """One for each instance, on a connection of its own."""
    wait = timedelta(seconds=TIMEOUT_S)
    server = dist.TCPStore("127.0.0.1", 0, None, True, wait, wait_for_workers=False)
    clients = [dist.TCPStore("127.0.0.1", server.port, None, False, wait) for _ in range(INSTANCES)]
    yield [SampleQueue(client, TIMEOUT_S, INSTANCES) for client in clients]


@dataclass
class CountingEngine:
    """What TailCut and its caller use of a GenerationEngine."""

    final: dict[int, int]
    """Response tokens of its samples, by sample id."""
    made: dict[int, int] = field(init=False)
    """Tokens so far."""
    running: set[int] = field(init=False)
    ended: list[int] = field(default_factory=list)
    """Finished, and not polled yet."""
    aborted: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.made = dict.fromkeys(self.final, 0)
        self.running = set(self.final)

    @property
    def unfinished(self) -> int:
        return len(self.running) + len(self.ended)

    def lengths(self) -> list[tuple[int, int, int]]:
        return [(sample, 2, self.made[sample]) for sample in sorted(self.running)]

    def abort(self, sample_ids: Iterable[int]) -> None:
        for sample in sample_ids:
            self.running.remove(sample)
            self.aborted.add(sample)

    def decode(self, sample: int, tokens: int = 1) -> None:
        self.made[sample] = min(self.made[sample] + tokens, self.final[sample])
        if self.made[sample] == self.final[sample]:
            self.running.remove(sample)
            self.ended.append(sample)

    def poll(self) -> list[Sample]:
        samples = [
            Sample(each, (1, 2), (3,) * n, (-0.5,) * n, "stop", 1, 0, 1.0, 2.0)
            for each in self.ended
            for n in [self.made[each]]
        ]
        self.ended = []
        return samples


class Tail:
    """An iteration of two instances that answer the prompts in turn."""

    def __init__(
        self, queues: Sequence[SampleQueue], trained: int, copies: int, tokens: Sequence[int]
    ) -> None:
        """tokens: by sample."""
        prompts = len(tokens) // copies
        drawn = (DrawnPrompt(Prompt(p, (1, 2), "", {}), 1, p) for p in range(prompts))
        self.batch = PromptBatch(tuple(drawn), copies, trained)
        self.final = dict(enumerate(tokens))
        self.iteration = next(ITERATIONS)
        self.queues = queues
        self.engines = [
            CountingEngine({s: n for s, n in self.final.items() if s // copies % INSTANCES == each})
            for each in range(INSTANCES)
        ]
        engines: Any = self.engines
        self.cuts = [
            TailCut(engine, queue, self.iteration, self.batch)
            for engine, queue in zip(engines, queues, strict=True)
        ]

    def decode(self, sample: int, tokens: int = 1) -> None:
        self.engines[sample // self.batch.copies % INSTANCES].decode(sample, tokens)

    def poll(self, instance: int) -> list[int]:
        """Offers what is to be offered of what has finished; returns that."""
        samples = self.cuts[instance].finished(self.engines[instance].poll())
        for sample in samples:
            self.queues[instance].push_finished(self.iteration, sample)
        return [sample.sample_id for sample in samples]

    def step(self, instance: int) -> None:
        self.cuts[instance].step()

    def finish(self, *samples: int) -> list[int]:
        """Decodes them to their ends, and polls."""
        for sample in samples:
            self.decode(sample, self.final[sample])
        return [each for instance in range(INSTANCES) for each in self.poll(instance)]

    @property
    def aborted(self) -> set[int]:
        return set().union(*(engine.aborted for engine in self.engines))

    @property
    def made(self) -> dict[int, int]:
        """Tokens, by sample."""
        return {s: n for engine in self.engines for s, n in engine.made.items()}

    @property
    def discarded(self) -> int:
        return sum(cut.discarded_tokens for cut in self.cuts)

    def take_all(self) -> dict[int, int]:
        """Closes the queue; response tokens of all that was offered."""
        assert not any(engine.unfinished for engine in self.engines)
        for queue in self.queues:
            queue.close(self.iteration)
        taken: list[Sample] = []
        while part := self.queues[0].take(self.iteration, 5):
            taken += part
        self.queues[0].delete(self.iteration)
        offered = {sample.sample_id: len(sample.response) for sample in taken}
        assert len(offered) == len(taken)  # none twice
        return offered

    def longest(self, position: int) -> int:
        return max(self.final[sample] for sample in self.batch.samples(position))


MakeTail = Callable[..., Tail]


@pytest.fixture
def tail(queues: list[SampleQueue]) -> MakeTail:
    return lambda trained, copies, *tokens: Tail(queues, trained, copies, tokens)


def random_tail(
    queues: list[SampleQueue], copies: int, trained: int, extra: int, rng: random.Random
) -> Tail:
    """With ties, and a few long responses."""
    samples = (trained + extra) * copies
    tokens = [rng.randint(1, 40 if rng.random() < 0.2 else 6) for _ in range(samples)]
    return Tail(queues, trained, copies, tokens)


sizes = {
    "copies": st.sampled_from([1, 3]),
    "trained": st.integers(1, 5),
    "extra": st.integers(1, 6),
    "seed": st.integers(0, 2**32),
}


@settings(deadline=None)
@given(**sizes)
def test_in_any_order_all_that_is_trained_is_offered(
    queues: list[SampleQueue], copies: int, trained: int, extra: int, seed: int
) -> None:
    rng = random.Random(seed)
    job = random_tail(queues, copies, trained, extra, rng)
    while active := [each for each in range(INSTANCES) if job.engines[each].unfinished]:
        instance = rng.choice(active)
        match rng.choice(["decode", "decode", "poll", "step"]):
            case "decode":
                running = sorted(job.engines[instance].running)
                for sample in rng.sample(running, rng.randint(0, len(running))):
                    job.decode(sample, rng.randint(1, 4))
            case "poll":
                job.poll(instance)
            case "step":
                job.step(instance)
    offered = job.take_all()
    # Whole prompts, at least those that are trained, and none that was given up.
    answered = {sample // copies for sample in offered}
    assert set(offered) == {sample for p in answered for sample in job.batch.samples(p)}
    kept = shortest(longest_responses(job.batch, job.final), trained)
    assert kept <= answered
    assert shortest(longest_responses(job.batch, offered), trained) == kept
    assert not answered & {sample // copies for sample in job.aborted}
    # Every token that was made is in what was offered, or counted.
    assert all(offered[sample] == job.final[sample] for sample in offered)
    assert job.discarded + sum(offered.values()) == sum(job.made.values())


@settings(deadline=None)
@given(**sizes)
def test_in_step_all_others_end_at_once_with_the_last_one_trained(
    queues: list[SampleQueue], copies: int, trained: int, extra: int, seed: int
) -> None:
    job = random_tail(queues, copies, trained, extra, random.Random(seed))
    while any(engine.unfinished for engine in job.engines):
        for engine in job.engines:
            for sample in sorted(engine.running):
                engine.decode(sample)
        for instance in range(INSTANCES):
            job.poll(instance)
        for instance in range(INSTANCES):
            job.step(instance)
    prompts = range(len(job.batch.drawn))
    limit = sorted(map(job.longest, prompts))[trained - 1]
    answered = {sample // copies for sample in job.take_all()}
    assert answered == {position for position in prompts if job.longest(position) <= limit}
    assert all(n == min(job.final[sample], limit) for sample, n in job.made.items())


def test_a_prompt_is_given_up_as_soon_as_it_is_certain_and_not_before(tail: MakeTail) -> None:
    job = tail(2, 1, 9, 3, 9, 4)  # instance 1 answers prompts 1 and 3, the limit is (4, 3)
    job.finish(1)
    job.decode(0, 8)
    job.step(0)
    assert not job.aborted  # one answered prompt is no limit
    job.finish(3)
    job.decode(2, 3)
    job.step(0)
    assert job.aborted == {0}  # with one token more, prompt 2 would be within the limit
    job.decode(2)
    job.step(0)
    assert job.aborted == {0, 2}
    assert job.discarded == 8 + 4
    assert job.take_all() == {1: 3, 3: 4}


def test_the_limit_falls_with_every_shorter_prompt(tail: MakeTail) -> None:
    job = tail(1, 1, 3, 6, 9)
    job.finish(1)
    job.decode(2, 3)
    job.step(0)
    assert not job.aborted
    job.finish(0)
    job.step(0)
    assert job.aborted == {2}
    assert job.take_all() == {0: 3, 1: 6}


def test_with_a_prompt_go_all_its_samples(tail: MakeTail) -> None:
    job = tail(1, 3, 1, 9, 2, 3, 3, 3)
    job.finish(0)  # waits for the others of its prompt
    assert job.finish(3, 4, 5) == [3, 4, 5]
    job.decode(1, 3)
    job.step(0)
    assert job.aborted == {1, 2}
    assert job.discarded == 1 + 3 + 0
    assert job.take_all() == {3: 3, 4: 3, 5: 3}


def test_a_finished_response_can_give_its_prompt_up(tail: MakeTail) -> None:
    job = tail(1, 3, 5, 9, 9, 4, 4, 4)
    assert job.finish(0) == []
    job.finish(3, 4, 5)
    job.step(0)
    assert job.aborted == {1, 2}
    assert job.take_all() == {3: 4, 4: 4, 5: 4}


def test_what_was_on_its_way_is_not_offered(tail: MakeTail) -> None:
    job = tail(1, 3, 2, 9, 9, 3, 3, 3)
    job.decode(0, 2)  # finished, and not polled before its prompt is given up
    job.decode(1, 3)
    for sample in (3, 4, 5):
        job.decode(sample, 3)
    assert job.poll(1) == [3, 4, 5]
    job.step(0)
    assert job.aborted == {1, 2}
    assert job.engines[0].unfinished
    assert job.poll(0) == []
    assert job.discarded == 2 + 3
    assert job.take_all() == {3: 3, 4: 3, 5: 3}


def test_an_answered_prompt_beyond_the_limit_is_not_offered(tail: MakeTail) -> None:
    job = tail(1, 1, 5, 3)
    job.finish(1)
    job.step(0)
    assert job.finish(0) == []
    assert not job.aborted
    assert job.discarded == 5
    assert job.take_all() == {1: 3}


def test_at_the_limit_the_earlier_prompt_is_trained(tail: MakeTail) -> None:
    job = tail(1, 1, 3, 3, 3)
    job.finish(1)
    job.decode(0, 2)
    job.decode(2, 2)
    job.step(0)
    assert job.aborted == {2}
    assert job.finish(0) == [0]
    assert shortest(longest_responses(job.batch, job.take_all()), 1) == {0}
