"""When the controller orders a migration, with a board and reports that the test writes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch.distributed as dist

from megatron_rlhfuse.migration.lengths import LengthHistory
from megatron_rlhfuse.migration.meter import RateMeter
from megatron_rlhfuse.migration.planner import MigrationOptions
from megatron_rlhfuse.migration.state import Migration
from megatron_rlhfuse.rollout import controller as controller_module
from megatron_rlhfuse.rollout.board import Board, MigrationBoard, Report
from megatron_rlhfuse.rollout.controller import MigrationController, Rollout

SAMPLES, THRESHOLD = 8, 0.5
MAX_TOKENS = 100
ROLLOUT = Rollout(
    instances=2,
    samples=SAMPLES,
    samples_per_prompt=1,
    prompt_tokens=10.0,
    max_num_seqs=8,
    kv_capacity=1000,
)


class WatchedBoard(MigrationBoard):
    """Counts the looks at it."""

    looks = 0

    def reports(self, instances: object) -> list[Report]:
        self.looks += 1
        return super().reports(instances)


class Stage:
    """What a controller watches: samples 0 to 7, the even ones on instance 0."""

    def __init__(self) -> None:
        self.board = WatchedBoard(dist.HashStore(), 1)
        self.finished = 0
        self.unfinished = {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}
        self.report()

    def counts(self) -> tuple[int, int]:
        return self.finished, 0

    def finish(self, *sample_ids: int) -> None:
        for own in self.unfinished.values():
            own[:] = [each for each in own if each not in sample_ids]
        self.report()
        self.finished += len(sample_ids)

    def obey(self, order: Migration) -> None:
        for move in order.moves:
            self.unfinished[move.source].remove(move.sample_id)
            self.unfinished[move.destination].append(move.sample_id)
        self.report()

    def report(self) -> None:
        for instance, own in self.unfinished.items():
            lengths = tuple((each, 10, 20) for each in own)
            # Steps as long for few samples as for many: merging the tail costs nothing.
            self.board.report(Report(instance, "n", lengths, 1000, len(own), 0.01, 4.0, 40, 0.1))

    def be_looked_at(self) -> None:
        """Waits until the controller has seen what is there, and decided."""
        seen = self.board.looks
        until(lambda: self.board.looks >= seen + 2)

    @property
    def ordered(self) -> tuple[Migration, ...]:
        return self.board.read().migrations


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(controller_module, "LOOK_S", 0.02)
    return Stage()


@pytest.fixture
def make() -> Iterator[Callable[..., MigrationController]]:
    """Makes controllers, which are stopped at the end."""
    made: list[MigrationController] = []

    def controller(
        threshold: float = THRESHOLD, auto: bool = False, rebalance: bool = False
    ) -> MigrationController:
        meter = RateMeter(kv_bytes_per_token=1024.0)
        meter.inference(samples=10, seconds=1.0)  # a freed instance is worth something
        options = MigrationOptions(
            threshold, MAX_TOKENS, transfer="tokens", batch_capacity=8, rebalance=rebalance
        )
        made.append(MigrationController(options, auto, meter, LengthHistory(MAX_TOKENS)))
        return made[-1]

    yield controller
    for each in made:
        each.stop()


Make = Callable[..., MigrationController]


def test_the_tail_is_ordered_to_migrate_once_at_the_threshold(stage: Stage, make: Make) -> None:
    controller = make()
    controller.start(ROLLOUT, stage.board, stage.counts)
    stage.finish(4, 6, 7)
    stage.be_looked_at()
    assert stage.ordered == ()  # five of eight
    stage.finish(2, 5)
    until(lambda: bool(stage.ordered))
    (order,) = stage.ordered
    assert order.destinations == (1,)
    assert [(m.sample_id, m.source, m.destination) for m in order.moves] == [(0, 0, 1)]
    assert order.stage_with_s < order.stage_without_s
    stage.obey(order)
    stage.finish(1)
    stage.be_looked_at()
    assert stage.ordered == (order,)
    stage.finish(0, 3)
    decision = controller.finish([20] * SAMPLES)
    assert decision.migrations == [order]
    assert decision.threshold == THRESHOLD
    assert decision.migrated_at_s is not None
    assert decision.predicted_s is not None and decision.predicted_serial_s is not None


def test_threshold_zero_migrates_nothing(stage: Stage, make: Make) -> None:
    controller = make(threshold=0.0)
    controller.start(ROLLOUT, stage.board, stage.counts)
    for sample_id in range(SAMPLES):
        stage.be_looked_at()
        stage.finish(sample_id)
    decision = controller.finish([20] * SAMPLES)
    assert stage.ordered == ()
    assert decision.migrations == [] and decision.migrated_at_s is None


def test_the_threshold_is_chosen_from_what_was_measured(stage: Stage, make: Make) -> None:
    controller = make(threshold=0.0, auto=True)
    for iteration in range(2):  # the first has only a prior of lengths
        controller.start(ROLLOUT, stage.board, stage.counts)
        until(lambda: controller.decision.predicted_s is not None)
        stage.finished = SAMPLES
        decision = controller.finish([4] * 6 + [MAX_TOKENS] * 2)
        stage.finished = 0
        assert iteration == 0 or decision.threshold > 0
    assert decision.predicted_s < decision.predicted_serial_s


def test_a_controller_that_comes_too_late_changes_nothing(stage: Stage, make: Make) -> None:
    controller = make()
    stage.finish(2, 4, 5, 6, 7)
    # Both look as if they had samples, but one has left since.
    assert stage.board.leave(0, known=0)
    stage.board.read = lambda: Board()  # type: ignore[method-assign]
    controller.start(ROLLOUT, stage.board, stage.counts)
    stage.be_looked_at()
    del stage.board.read  # type: ignore[attr-defined]
    stage.be_looked_at()
    assert stage.ordered == ()
    stage.finished = SAMPLES
    assert controller.finish([20] * SAMPLES).migrations == []


def test_all_is_over_before_the_controller_looks(stage: Stage, make: Make) -> None:
    for instance in stage.unfinished:
        stage.board.leave(instance, known=0)
    stage.finish(*range(SAMPLES))
    controller = make()
    controller.start(ROLLOUT, stage.board, stage.counts)
    assert controller.finish([20] * SAMPLES).migrations == []
    assert stage.ordered == ()


def test_the_next_order_waits_until_the_last_is_obeyed(stage: Stage, make: Make) -> None:
    controller = make(rebalance=True)
    controller.start(ROLLOUT, stage.board, stage.counts)
    stage.be_looked_at()
    stage.finish(2, 4, 5, 6)
    until(lambda: bool(stage.ordered))
    assert len(stage.ordered) == 1
    # The source has not heard of it yet: sample 0 must not be sent twice.
    stage.finish(3, 7)
    stage.be_looked_at()
    assert len(stage.ordered) == 1
    stage.finished = SAMPLES
    controller.finish([20] * SAMPLES)


def test_a_failure_in_the_thread_is_raised_at_the_end(stage: Stage, make: Make) -> None:
    asked = threading.Event()

    def lost() -> tuple[int, int]:
        asked.set()
        raise ConnectionError("the store is gone")

    controller = make()
    controller.start(ROLLOUT, stage.board, lost)
    assert asked.wait(30.0)
    with pytest.raises(ConnectionError, match="the store is gone"):
        controller.finish([20] * SAMPLES)


def test_stopping_ends_the_watch_and_may_be_repeated(stage: Stage, make: Make) -> None:
    controller = make()
    controller.stop()
    controller.start(ROLLOUT, stage.board, stage.counts)
    stage.be_looked_at()
    controller.stop()
    controller.stop()
    looks = stage.board.looks
    time.sleep(0.1)
    assert stage.board.looks == looks
