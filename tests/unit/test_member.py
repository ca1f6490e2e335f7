"""An instance's part in migrations, with engines that only keep books."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.migration.state import Migration, Move
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.rollout.board import MigrationBoard
from megatron_rlhfuse.rollout.engine import Extraction
from megatron_rlhfuse.rollout.member import Member
from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample

ITERATION = 1
TOKENS = 4
"""Of every prompt and of every response so far."""


def file_of(instance: int) -> str:
    return f"/proc/1{instance}/fd/3"


def relayed_from(instance: int) -> str:
    return f"/proc/9{instance}/fd/4"


def partial_sample(sample_id: int) -> PartialSample:
    request = GenerationRequest(sample_id, (1,) * TOKENS, 7)
    return PartialSample(request, (5,) * TOKENS, (-0.5,) * TOKENS, None, 0, (), 1, 0.0)


@dataclass
class BookKeepingEngine:
    """What Member uses of a GenerationEngine."""

    instance: int
    pending: dict[int, PartialSample] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    observations: None = None

    @property
    def built(self) -> SimpleNamespace:
        return SimpleNamespace(kv_tokens=1000)

    @property
    def unfinished(self) -> int:
        return len(self.pending)

    def lengths(self) -> list[tuple[int, int, int]]:
        return [(sample_id, TOKENS, TOKENS) for sample_id in self.pending]

    def submit(self, samples: Sequence[PartialSample]) -> None:
        for sample in samples:
            assert sample.sample_id not in self.pending
            self.pending[sample.sample_id] = sample

    def extract(self, sample_ids: Iterable[int], with_kv: Iterable[int]) -> Extraction:
        left = [self.pending.pop(each) for each in sample_ids if each in self.pending]
        exported = set(with_kv)
        samples = [
            replace(s, kv_files=(file_of(self.instance),), kv_tokens=TOKENS)
            if s.sample_id in exported
            else s
            for s in left
        ]
        return Extraction(samples, 0.25, 100 * len(exported & {s.sample_id for s in left}))

    def finish(self, sample_id: int) -> None:
        self.finished.append(sample_id)
        del self.pending[sample_id]


class Stage:
    """Instances with the samples they begin with, and the board between them."""

    def __init__(self, folder: Path, *samples: Sequence[int], nodes: str = "", relay=None) -> None:
        self.store = dist.HashStore()
        self.board = MigrationBoard(self.store, ITERATION)
        self.engines = [
            BookKeepingEngine(instance, {each: partial_sample(each) for each in own})
            for instance, own in enumerate(samples)
        ]
        self.members = [
            Member(
                engine,
                MigrationBoard(self.store, ITERATION),
                nodes or "n" * len(samples),
                relay,
                Tracer(folder, 0, enabled=False),
            )
            for engine in self.engines
        ]

    def publish(self, *moves: Move) -> None:
        destinations = tuple(sorted({move.destination for move in moves}))
        assert self.board.publish(Migration(destinations, moves, 2.0, 1.0))

    def has(self) -> list[list[int]]:
        """The unfinished samples of each instance."""
        return [sorted(engine.pending) for engine in self.engines]


MakeStage = Callable[..., Stage]


@pytest.fixture
def stage(tmp_path: Path) -> MakeStage:
    return lambda *samples, **options: Stage(tmp_path, *samples, **options)


def test_samples_are_given_and_taken(stage: MakeStage) -> None:
    job = stage([0, 1, 2], [3])
    source, destination = job.members
    job.publish(Move(0, 0, 1, "kv"), Move(2, 0, 1, "tokens"))
    destination.step()
    assert destination.expects
    assert job.has() == [[0, 1, 2], [3]]
    source.step()
    assert not source.expects
    assert job.has() == [[1], [3]]
    destination.step()
    assert not destination.expects
    assert job.has() == [[1], [0, 2, 3]]
    taken = job.engines[1].pending
    assert [taken[each].kv_files for each in (0, 2, 3)] == [(file_of(0),), (), ()]
    assert (source.counts.given, source.counts.taken) == (2, 0)
    assert (source.counts.kv_bytes, source.counts.extract_s) == (100, 0.25)
    assert (destination.counts.given, destination.counts.taken) == (0, 2)


def test_samples_are_expected_until_the_last_is_there(stage: MakeStage) -> None:
    job = stage([0], [1], [])
    job.publish(Move(0, 0, 2, "kv"), Move(1, 1, 2, "kv"))
    job.members[0].step()
    job.members[2].step()
    assert job.has() == [[], [1], [0]]
    assert job.members[2].expects
    job.members[1].step()
    job.members[2].step()
    assert job.has() == [[], [], [0, 1]]
    assert not job.members[2].expects


def test_what_was_finished_after_all_is_not_waited_for(stage: MakeStage) -> None:
    job = stage([0, 1], [])
    source, destination = job.members
    job.publish(Move(0, 0, 1, "kv"), Move(1, 0, 1, "kv"))
    job.engines[0].finish(0)
    job.engines[0].finish(1)
    destination.step()
    assert not destination.leave()
    source.step()
    assert source.leave()
    destination.step()
    assert not destination.expects
    assert destination.leave()
    assert (source.counts.given, destination.counts.taken) == (0, 0)


def test_it_leaves_only_when_its_engine_is_empty(stage: MakeStage) -> None:
    job = stage([0])
    (member,) = job.members
    member.step()
    assert not member.leave()
    assert job.board.read().left == ()
    job.engines[0].finish(0)
    member.step()
    assert member.leave()
    assert job.board.read().left == (0,)
    assert member.counts.generation_end > 0


def test_it_does_not_leave_before_it_knows_of_all_migrations(stage: MakeStage) -> None:
    job = stage([0], [])
    source, destination = job.members
    destination.step()
    job.publish(Move(0, 0, 1, "kv"))  # between the look at the board and the leaving
    assert not destination.leave()
    destination.step()
    assert not destination.leave()
    source.step()
    destination.step()
    assert job.has() == [[], [0]]
    assert source.leave()


def test_a_sample_may_come_before_word_of_its_migration(
    stage: MakeStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = stage([0], [1], [2])
    first, second, destination = job.members
    job.publish(Move(0, 0, 2, "kv"))
    receive = MigrationBoard.receive

    def after_another_migration(board: MigrationBoard, instance: int) -> object:
        monkeypatch.setattr(MigrationBoard, "receive", receive)
        job.publish(Move(1, 1, 2, "kv"), Move(2, 2, 0, "kv"))
        second.step()
        first.step()
        return receive(board, instance)

    monkeypatch.setattr(MigrationBoard, "receive", after_another_migration)
    destination.step()
    assert job.has() == [[], [], [0, 1, 2]]
    # What is to leave by that migration is not forgotten.
    job.engines[2].finish(2)
    job.engines[2].finish(1)
    job.engines[2].finish(0)
    assert not destination.leave()
    destination.step()
    first.step()
    assert all(member.leave() for member in job.members)


def test_reports_tell_what_the_engine_has(stage: MakeStage) -> None:
    job = stage([0, 1], [])
    for member in job.members:
        member.step()
    first, second = job.board.reports([0, 1])
    assert first.unfinished == ((0, TOKENS, TOKENS), (1, TOKENS, TOKENS))
    assert (first.instance, first.node, first.kv_capacity) == (0, "n", 1000)
    assert second.unfinished == ()
    job.publish(Move(1, 0, 1, "kv"))
    for member in job.members:  # at once, however short ago the last reports were
        member.step()
    first, second = job.board.reports([0, 1])
    assert [each[0] for each in first.unfinished] == [0]
    assert [each[0] for each in second.unfinished] == [1]


class BookKeepingRelay:
    def __init__(self) -> None:
        self.sent: list[tuple[int, int]] = []

    def send(self, sample: PartialSample, destination: int) -> None:
        self.sent.append((sample.sample_id, destination))

    def receive(self, sample: PartialSample, source: int) -> PartialSample:
        assert self.sent.pop(0)[0] == sample.sample_id
        return replace(sample, kv_files=(relayed_from(source),))


def test_files_are_relayed_to_other_nodes_only(stage: MakeStage) -> None:
    relay = BookKeepingRelay()
    job = stage([0, 1, 2], [], [], nodes="aab", relay=relay)
    job.publish(Move(0, 0, 1, "kv"), Move(1, 0, 2, "kv"), Move(2, 0, 2, "tokens"))
    job.members[0].step()
    assert relay.sent == [(1, 2)]
    for member in job.members[1:]:
        member.step()
    assert job.has() == [[], [0], [1, 2]]
    assert job.engines[1].pending[0].kv_files == (file_of(0),)
    assert job.engines[2].pending[1].kv_files == (relayed_from(0),)
    assert job.engines[2].pending[2].kv_files == ()


INSTANCES, SAMPLES = 4, 12


@given(st.lists(st.tuples(st.sampled_from("sfp"), st.integers(0, 1 << 20)), max_size=60))
def test_in_any_order_of_events_every_sample_is_finished_once(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int]]
) -> None:
    samples = [range(i, SAMPLES, INSTANCES) for i in range(INSTANCES)]
    job = Stage(tmp_path_factory.getbasetemp(), *samples)
    left: set[int] = set()

    def step(instance: int) -> None:
        if instance not in left:
            job.members[instance].step()
            if job.members[instance].leave():
                left.add(instance)

    def finish(instance: int, number: int) -> None:
        pending = sorted(job.engines[instance].pending)
        if pending:
            job.engines[instance].finish(pending[number % len(pending)])

    def publish(number: int) -> None:
        """As the controller: from reports, which may be old, once the last order is obeyed."""
        last = job.board.read().migrations[-1:]
        there = {(r.instance, each[0]) for r in reports() for each in r.unfinished}
        if any((move.source, move.sample_id) in there for order in last for move in order.moves):
            return
        destination = number % INSTANCES
        moves = tuple(
            Move(sample_id, source, destination, "kv")
            for source, sample_id in sorted(there)
            if source != destination and (number >> sample_id) % 2
        )
        job.board.publish(Migration((destination,), moves, 2.0, 1.0))

    def reports() -> list:
        return job.board.reports([i for i in range(INSTANCES) if i not in left])

    for event, number in events:
        if event == "s":
            step(number % INSTANCES)
        elif event == "f":
            finish(number % INSTANCES, number // INSTANCES)
        else:
            publish(number)
    for _ in range(SAMPLES + 3):
        for instance in range(INSTANCES):
            finish(instance, 0)
            step(instance)
    assert left == set(range(INSTANCES))
    assert sorted(each for engine in job.engines for each in engine.finished) == [*range(SAMPLES)]
    assert all(job.board.receive(instance) is None for instance in range(INSTANCES))


def test_what_is_not_to_come_is_dropped(stage: MakeStage, caplog: pytest.LogCaptureFixture) -> None:
    job = stage([0, 1], [3])
    source, destination = job.members
    job.publish(Move(0, 0, 1, "tokens"))
    for stray in (partial_sample(1), None):  # well-formed, and another one's
        job.board.send(1, 1, stray)
    source.step()
    job.board.send(1, 0, partial_sample(0))  # a second time
    destination.step()
    assert job.has() == [[1], [0, 3]]
    assert not destination.expects
    destination.step()
    assert len(caplog.records) == 2 and "sample 1 is not to come here" in caplog.text
