"""The queues between the stages, over a real TCPStore with a connection per consumer."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlhfuse.inference.queue import SampleQueue, StageTimeoutError
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample

ITERATION = 3
WAIT = timedelta(seconds=30)
LONG_S, SHORT_S = 30.0, 0.2


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, None, True, WAIT, wait_for_workers=False)


def consumer(store: dist.TCPStore, timeout_s: float = LONG_S) -> SampleQueue:
    """A queue on a connection of its own, as another rank has it."""
    return SampleQueue(dist.TCPStore("127.0.0.1", store.port, None, False, WAIT), timeout_s)


def sample(sample_id: int) -> Sample:
    return Sample(sample_id, (1, 2), (3, 4), (-0.5, -1.5), "stop", 2, 0, 1.0, 2.0)


def scored(sample_id: int) -> ScoredSample:
    return ScoredSample(sample(sample_id), torch.tensor([-1.0, -2.0]), None, None, 0.5)


def fill(queue: SampleQueue, total: int, iteration: int = ITERATION) -> None:
    for sample_id in range(total):
        queue.push_finished(iteration, sample(sample_id))


def test_samples_come_out_as_they_went_in(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S)
    fill(queue, 3)
    assert consumer(store).take(ITERATION, 3, 3) == [sample(0), sample(1), sample(2)]


def test_no_more_is_handed_out_than_there_is(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S)
    fill(queue, 5)
    sizes = [len(queue.take(ITERATION, 5, 3)) for _ in range(4)]
    assert sizes == [3, 2, 0, 0]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_sample_is_handed_out_exactly_once(store: dist.TCPStore, count: int) -> None:
    total, consumers = 40, 4
    start = threading.Barrier(consumers + 1)

    def consume(queue: SampleQueue) -> list[int]:
        start.wait()
        taken: list[int] = []
        while part := queue.take(ITERATION, total, count):
            taken += [item.sample_id for item in part]
        return taken

    queues = [consumer(store) for _ in range(consumers)]
    with ThreadPoolExecutor(consumers) as pool:
        results = [pool.submit(consume, queue) for queue in queues]
        start.wait()
        fill(SampleQueue(store, LONG_S), total)  # while they are waiting
        taken = [sample_id for future in results for sample_id in future.result(timeout=60)]
    assert sorted(taken) == list(range(total))


def test_iterations_do_not_mix(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S)
    fill(queue, 2, iteration=1)
    fill(queue, 1, iteration=2)
    assert queue.take(2, 1, 4) == [sample(0)]
    assert [item.sample_id for item in queue.take(1, 2, 4)] == [0, 1]


def test_wait_finished_returns_with_the_last_sample(store: dist.TCPStore) -> None:
    producer, waiter = SampleQueue(store, LONG_S), consumer(store)
    fill(producer, 2)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.wait_finished, ITERATION, 3)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        producer.push_finished(ITERATION, sample(2))
        waiting.result(timeout=30)


def test_time_out_says_what_is_missing_and_which_flag_helps(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, SHORT_S)
    fill(queue, 2)
    with pytest.raises(StageTimeoutError, match=r"generation: 2 of 8 .*--rlhfuse-stage-timeout"):
        queue.wait_finished(ITERATION, 8)
    with pytest.raises(StageTimeoutError, match=r"3/scored.*--rlhfuse-stage-timeout"):
        queue.collect(ITERATION, 1)
    queue.take(ITERATION, 8, 2)
    with pytest.raises(StageTimeoutError, match=r"3/finished.*--rlhfuse-stage-timeout"):
        queue.take(ITERATION, 8, 1)


def test_scored_samples_are_collected(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S)
    queue.push_scored(ITERATION, [scored(1), scored(0)])
    consumer(store).push_scored(ITERATION, [scored(2)])
    messages = queue.collect(ITERATION, 3)
    read = [ScoredSample.from_bytes(message) for message in messages]
    assert [item.sample for item in read] == [sample(1), sample(0), sample(2)]


def test_counts_are_of_what_is_finished_and_what_is_scored(store: dist.TCPStore) -> None:
    queue, other = SampleQueue(store, LONG_S), consumer(store)
    assert other.counts(ITERATION) == (0, 0)
    fill(queue, 5)
    assert other.counts(ITERATION) == (5, 0)
    queue.take(ITERATION, 5, 3)  # taken is not scored
    queue.push_scored(ITERATION, [scored(0), scored(1)])
    assert other.counts(ITERATION) == (5, 2)
    assert other.counts(ITERATION + 1) == (0, 0)


def test_ranks_go_on_once_an_instance_is_released(store: dist.TCPStore) -> None:
    leader, waiter = SampleQueue(store, LONG_S), consumer(store)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.wait_released, ITERATION, 1)
        leader.board(ITERATION).release(0)
        leader.board(ITERATION + 1).release(1)
        # To have left is not enough: its engine still has its memory.
        assert leader.board(ITERATION).leave(1, known=0)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        leader.board(ITERATION).release(1)
        waiting.result(timeout=30)


def test_ranks_without_work_wait_until_all_is_scored(store: dist.TCPStore) -> None:
    queue, waiter = SampleQueue(store, LONG_S), consumer(store)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.wait_scored, ITERATION, 2)
        queue.push_scored(ITERATION, [scored(0)])
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        queue.push_scored(ITERATION, [scored(1)])
        waiting.result(timeout=30)


def test_scoring_that_does_not_end_is_counted(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, SHORT_S)
    queue.push_scored(ITERATION, [scored(0)])
    with pytest.raises(StageTimeoutError, match=r"1 of 2 samples scored"):
        queue.wait_scored(ITERATION, 2)


def test_an_instance_that_does_not_leave_is_named(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, SHORT_S)
    with pytest.raises(StageTimeoutError, match=r"instance 1: .*--rlhfuse-stage-timeout"):
        queue.wait_released(ITERATION, 1)


def run_iteration(queue: SampleQueue, iteration: int, total: int = 3) -> None:
    fill(queue, total, iteration)
    queue.wait_finished(iteration, total)
    taken = queue.take(iteration, total, total)
    queue.push_scored(iteration, [scored(item.sample_id) for item in taken])
    queue.collect(iteration, total)


def test_keys_do_not_pile_up(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S)
    left = []
    for iteration in range(1, 5):
        run_iteration(queue, iteration)
        left.append(store.num_keys())
    assert left[1:] == left[1:2] * 3


def test_a_consumer_that_comes_after_the_end_goes_away_with_nothing(store: dist.TCPStore) -> None:
    # The rank that scored the last sample asks once more, perhaps after rank 0 has collected it.
    queue, late = SampleQueue(store, LONG_S), consumer(store, SHORT_S)
    run_iteration(queue, ITERATION)
    assert late.take(ITERATION, 3, 2) == []


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_foreign_bytes_are_refused_and_never_unpickled(
    store: dist.TCPStore, tmp_path: Path
) -> None:
    # The store listens on a port; anyone who reaches it can push.
    queue = SampleQueue(store, LONG_S)
    path = tmp_path / "ran"
    for message in (pickle.dumps(Trap(path)), b"\x00nonsense", b"[]", json.dumps({}).encode()):
        store.queue_push(f"{ITERATION}/finished", message)
        with pytest.raises(ValueError):
            queue.take(ITERATION, 9, 1)
    assert not path.exists()
