"""The queues between the stages, over a real TCPStore with a connection per consumer."""

from __future__ import annotations

import pickle
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import chain
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_rlhfuse.inference.queue import SampleQueue, StageTimeoutError
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.rollout.wire import MESSAGE_BYTES, Limits

ITERATION = 3
WAIT = timedelta(seconds=30)
LONG_S, SHORT_S = 30.0, 0.2


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, None, True, WAIT, wait_for_workers=False)


def consumer(store: dist.TCPStore, timeout_s: float = LONG_S, instances: int = 1) -> SampleQueue:
    """A queue on a connection of its own, as another rank has it."""
    client = dist.TCPStore("127.0.0.1", store.port, None, False, WAIT)
    return SampleQueue(client, timeout_s, instances)


def sample(sample_id: int) -> Sample:
    return Sample(sample_id, (1, 2), (3, 4), (-0.5, -1.5), "stop", 2, 0, 1.0, 2.0)


def scored(sample_id: int) -> ScoredSample:
    return ScoredSample(sample(sample_id), torch.tensor([-1.0, -2.0]), None, None, 0.5)


def fill(queue: SampleQueue, total: int, iteration: int = ITERATION) -> None:
    for sample_id in range(total):
        queue.push_finished(iteration, sample(sample_id))


def drain(queue: SampleQueue, count: int, iteration: int = ITERATION) -> list[int]:
    """Takes until there is no more."""
    taken: list[int] = []
    while part := queue.take(iteration, count):
        taken += [item.sample_id for item in part]
    return taken


def test_samples_come_out_as_they_went_in(store: dist.TCPStore) -> None:
    fill(SampleQueue(store, LONG_S, 1), 3)
    assert consumer(store).take(ITERATION, 3) == [sample(0), sample(1), sample(2)]


def test_what_is_there_is_taken_without_waiting_for_more(store: dist.TCPStore) -> None:
    queue, other = SampleQueue(store, LONG_S, 1), consumer(store, SHORT_S)
    fill(queue, 5)
    assert [len(other.take(ITERATION, 3)) for _ in range(2)] == [3, 2]  # nothing is closed
    queue.close(ITERATION)
    assert [other.take(ITERATION, 3) for _ in range(2)] == [[], []]


@pytest.mark.parametrize("count", [1, 3, 8])
def test_every_sample_is_handed_out_exactly_once(store: dist.TCPStore, count: int) -> None:
    total, consumers = 40, 4
    start = threading.Barrier(consumers + 1)

    def consume(queue: SampleQueue) -> list[int]:
        start.wait()
        return drain(queue, count)

    queues = [consumer(store) for _ in range(consumers)]
    with ThreadPoolExecutor(consumers) as pool:
        results = [pool.submit(consume, queue) for queue in queues]
        start.wait()
        producer = SampleQueue(store, LONG_S, 1)
        fill(producer, total)  # while they are waiting
        producer.close(ITERATION)
        taken = [sample_id for future in results for sample_id in future.result(timeout=60)]
    assert sorted(taken) == list(range(total))


def test_samples_pushed_right_before_closing_are_not_lost(store: dist.TCPStore) -> None:
    instances, consumers, rounds, each = 4, 3, 25, 2
    start = threading.Barrier(instances + consumers)

    def produce(queue: SampleQueue, instance: int) -> None:
        for iteration in range(rounds):
            start.wait(30)
            for sample_id in range(instance * each, (instance + 1) * each):
                queue.push_finished(iteration, sample(sample_id))
            queue.close(iteration)

    def consume(queue: SampleQueue) -> list[list[int]]:
        taken = []
        for iteration in range(rounds):
            start.wait(30)
            taken.append(drain(queue, 2, iteration))
        return taken

    queues = [consumer(store, instances=instances) for _ in range(instances + consumers)]
    with ThreadPoolExecutor(instances + consumers) as pool:
        producers = [pool.submit(produce, queues.pop(), instance) for instance in range(instances)]
        taken = [future.result(60) for future in [pool.submit(consume, q) for q in queues]]
        for producer in producers:
            producer.result(60)
    for parts in zip(*taken, strict=True):
        assert sorted(chain(*parts)) == list(range(instances * each))


class InterruptedStore(dist.TCPStore):
    """A connection on which, before its n-th question, a sample is pushed and the queue closed."""

    def __init__(self, store: dist.TCPStore, before: int) -> None:
        super().__init__("127.0.0.1", store.port, None, False, WAIT)
        self._others, self._left = SampleQueue(store, LONG_S, 1), before

    def _count(self) -> None:
        if self._left == 0:
            self._others.push_finished(ITERATION, sample(7))
            self._others.close(ITERATION)
        self._left -= 1

    def add(self, key: str, number: int) -> int:
        self._count()
        return super().add(key, number)

    def queue_pop(self, key: str, block: bool = True) -> bytes:
        self._count()
        return super().queue_pop(key, block)


@pytest.mark.parametrize("before", range(6))
def test_a_last_sample_between_two_looks_is_taken(store: dist.TCPStore, before: int) -> None:
    queue = SampleQueue(InterruptedStore(store, before), LONG_S, 1)
    assert drain(queue, 3) == [7]


@pytest.mark.parametrize("before", range(4))
def test_a_last_sample_between_two_looks_is_waited_for(store: dist.TCPStore, before: int) -> None:
    queue = SampleQueue(InterruptedStore(store, before), SHORT_S, 1)
    with pytest.raises(StageTimeoutError, match="0 of 1 samples scored"):
        queue.wait_scored(ITERATION)


def test_all_instances_must_close(store: dist.TCPStore) -> None:
    first, second = (consumer(store, instances=2) for _ in range(2))
    taker, scorer, waiter = (consumer(store, instances=2) for _ in range(3))
    with ThreadPoolExecutor(3) as pool:
        waiting: list[Future] = [
            pool.submit(taker.take, ITERATION, 4),
            pool.submit(scorer.wait_scored, ITERATION),
            pool.submit(waiter.wait_finished, ITERATION),
        ]
        first.close(ITERATION)
        first.close(ITERATION + 1)
        for future in waiting:
            with pytest.raises(TimeoutError):
                future.result(timeout=0.1)
        second.close(ITERATION)
        assert [future.result(timeout=30) for future in waiting] == [[], None, None]


def test_iterations_do_not_mix(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S, 1)
    fill(queue, 2, iteration=1)
    fill(queue, 1, iteration=2)
    assert queue.take(2, 4) == [sample(0)]
    assert [item.sample_id for item in queue.take(1, 4)] == [0, 1]


def test_time_out_says_what_is_missing_and_which_flag_helps(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, SHORT_S, 3)
    fill(queue, 2)
    queue.close(ITERATION)
    flag = ".*--rlhfuse-stage-timeout"
    with pytest.raises(StageTimeoutError, match=f"generation: 2 of 3 instances .*generate{flag}"):
        queue.wait_finished(ITERATION)
    with pytest.raises(StageTimeoutError, match=f"inference: 0 of 2 samples scored{flag}"):
        queue.collect(ITERATION)
    queue.take(ITERATION, 2)
    with pytest.raises(StageTimeoutError, match=f"no sample arrived .2 of 3 instances .*{flag}"):
        queue.take(ITERATION, 1)
    queue.push_scored(ITERATION, [scored(0), scored(1)])
    with pytest.raises(StageTimeoutError, match=f"2 of 2 samples scored .2 of 3 inst.*{flag}"):
        queue.wait_scored(ITERATION)


def test_scored_samples_are_collected(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S, 1)
    fill(queue, 3)
    queue.close(ITERATION)
    queue.push_scored(ITERATION, [scored(1), scored(0)])
    with ThreadPoolExecutor(1) as pool:
        collecting = pool.submit(consumer(store).collect, ITERATION)
        with pytest.raises(TimeoutError):
            collecting.result(timeout=0.1)
        queue.push_scored(ITERATION, [scored(2)])
        messages = collecting.result(timeout=30)
    read = [ScoredSample.from_bytes(message) for message in messages]
    assert [item.sample for item in read] == [sample(1), sample(0), sample(2)]


def test_counts_are_of_what_is_finished_and_what_is_scored(store: dist.TCPStore) -> None:
    queue, other = SampleQueue(store, LONG_S, 1), consumer(store)
    assert other.counts(ITERATION) == (0, 0)
    fill(queue, 5)
    assert other.counts(ITERATION) == (5, 0)
    queue.take(ITERATION, 3)  # taken is not scored
    queue.push_scored(ITERATION, [scored(0), scored(1)])
    assert other.counts(ITERATION) == (5, 2)
    assert other.counts(ITERATION + 1) == (0, 0)


def test_ranks_go_on_once_an_instance_is_released(store: dist.TCPStore) -> None:
    leader, waiter = SampleQueue(store, LONG_S, 1), consumer(store)
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
    queue, waiter = SampleQueue(store, LONG_S, 1), consumer(store)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(waiter.wait_scored, ITERATION)
        fill(queue, 2)
        queue.push_scored(ITERATION, [scored(0)])
        queue.close(ITERATION)
        with pytest.raises(TimeoutError):
            waiting.result(timeout=0.1)
        queue.push_scored(ITERATION, [scored(1)])
        waiting.result(timeout=30)


def test_an_instance_that_does_not_leave_is_named(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, SHORT_S, 1)
    with pytest.raises(StageTimeoutError, match=r"instance 1: .*--rlhfuse-stage-timeout"):
        queue.wait_released(ITERATION, 1)


def test_notes_of_lengths_arrive_whole(store: dist.TCPStore) -> None:
    writers, notes = 6, 40
    reader, start = consumer(store), threading.Barrier(writers + 1)
    noted = [
        [(10 ** (note % 7), 100 * writer + note) for note in range(notes)]
        for writer in range(writers)
    ]

    def write(queue: SampleQueue, mine: list[tuple[int, int]]) -> None:
        start.wait(30)
        for tokens, prompt in mine:
            queue.note_length(ITERATION, tokens, prompt)

    assert reader.lengths(ITERATION) == []
    queues = [consumer(store) for _ in range(writers)]
    with ThreadPoolExecutor(writers) as pool:
        writing = [pool.submit(write, *each) for each in zip(queues, noted, strict=True)]
        start.wait(30)
        seen: list[tuple[int, int]] = []
        while len(seen) < writers * notes and not all(each.done() for each in writing):
            answered = reader.answered(ITERATION)
            seen, before = reader.lengths(ITERATION), seen
            assert seen[: len(before)] == before
            assert len(seen) >= answered  # what is counted can be read
    assert Counter(reader.lengths(ITERATION)) == Counter(chain(*noted))
    assert reader.answered(ITERATION) == writers * notes
    assert reader.lengths(ITERATION + 1) == []


def run_iteration(queue: SampleQueue, iteration: int) -> None:
    fill(queue, 3, iteration)
    queue.note_length(iteration, 2, 0)
    queue.close(iteration)
    queue.wait_finished(iteration)
    queue.push_scored(iteration, [scored(sample_id) for sample_id in drain(queue, 2, iteration)])
    queue.collect(iteration)


def test_nothing_is_left_of_a_deleted_iteration(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S, 1)
    run_iteration(queue, ITERATION)
    before = store.num_keys()
    run_iteration(queue, ITERATION + 2)
    assert store.num_keys() > before
    queue.delete(ITERATION + 2)
    assert store.num_keys() == before
    queue.delete(ITERATION)
    assert store.num_keys() == 0


def test_keys_do_not_pile_up(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S, 1)
    left = []
    for iteration in range(1, 5):
        run_iteration(queue, iteration)
        left.append(store.num_keys())
    assert left == left[:1] * 4


def test_a_consumer_that_comes_after_the_end_goes_away_with_nothing(store: dist.TCPStore) -> None:
    # The rank that scored the last sample asks once more, perhaps after rank 0 has collected it.
    queue, late = SampleQueue(store, LONG_S, 1), consumer(store, SHORT_S)
    run_iteration(queue, ITERATION)
    assert late.take(ITERATION, 2) == []
    late.wait_scored(ITERATION)


class Trap:
    """Unpickling this writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


STRANGE = {
    "no JSON": b"\x00nonsense",
    "no UTF-8": b"\xff\xfe",
    "no object": b"[]",
    "no fields": b"{}",
    "deep": b"[" * 50_000,
    "too large": b" " * (1 << 20),
    "NaN": sample(1).to_bytes().replace(b"-1.5", b"NaN"),
    "unknown sample": sample(4).to_bytes(),
    "unknown token": sample(1).to_bytes().replace(b"[3,4]", b"[3,100]"),
    "long": Sample(1, (1, 2), (3,) * 9, (-0.5,) * 9, "stop", 2, 0, 1.0, 2.0).to_bytes(),
}
LIMITS = Limits(samples=4, prompt_tokens=2, response_tokens=8, vocabulary=100, instances=1)


def small_job(store: dist.TCPStore, timeout_s: float = LONG_S) -> SampleQueue:
    return SampleQueue(store, timeout_s, 1, LIMITS)


def drops(caplog: pytest.LogCaptureFixture, queue: str) -> list[str]:
    """The lines of the log about a queue or key."""
    lines = [record.getMessage() for record in caplog.records]
    return [line for line in lines if f"dropped a message of {ITERATION}/{queue} " in line]


@pytest.mark.parametrize("message", STRANGE.values(), ids=STRANGE)
def test_a_strange_message_is_dropped_and_the_queue_goes_on(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture, message: bytes
) -> None:
    queue = small_job(store)
    store.queue_push(f"{ITERATION}/finished", message)
    fill(queue, 2)
    store.queue_push(f"{ITERATION}/finished", message)
    queue.close(ITERATION)
    assert drain(queue, 3) == [0, 1]
    assert len(drops(caplog, "finished")) == 2

    for data in (message, *STRANGE.values()):
        store.queue_push(f"{ITERATION}/scored", data)
    queue.push_scored(ITERATION, [scored(0), scored(1)])
    read = [ScoredSample.from_bytes(each).sample for each in queue.collect(ITERATION)]
    assert read == [sample(0), sample(1)]
    assert len(drops(caplog, "scored")) >= 8  # a flood has fewer lines than messages


def test_foreign_bytes_are_never_unpickled(store: dist.TCPStore, tmp_path: Path) -> None:
    queue = small_job(store)
    path = tmp_path / "ran"
    for name in ("finished", "scored"):
        store.queue_push(f"{ITERATION}/{name}", pickle.dumps(Trap(path)))
    fill(queue, 1)
    queue.close(ITERATION)
    assert drain(queue, 1) == [0]
    queue.push_scored(ITERATION, [scored(0)])
    assert len(queue.collect(ITERATION)) == 1
    assert not path.exists()


def test_a_sample_that_comes_again_is_dropped(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    queue = small_job(store)
    fill(queue, 2)
    for _ in range(3):
        store.queue_push(f"{ITERATION}/finished", sample(1).to_bytes())
    queue.close(ITERATION)
    assert drain(queue, 4) == [0, 1]
    assert len(drops(caplog, "finished")) == 3
    store.queue_push(f"{ITERATION}/scored", scored(0).to_bytes())
    queue.push_scored(ITERATION, [scored(0), scored(1)])
    read = [ScoredSample.from_bytes(each).sample.sample_id for each in queue.collect(ITERATION)]
    assert read == [0, 1]
    (line,) = drops(caplog, "scored")
    assert "sample 0 has been there already" in line
    fill(queue, 2, ITERATION + 1)  # the same numbers, in another iteration
    assert len(queue.take(ITERATION + 1, 4)) == 2


def test_a_time_out_comes_in_a_flood_of_strange_messages(store: dist.TCPStore) -> None:
    queue, other = small_job(store, SHORT_S), consumer(store)
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            if other._store.queue_len(f"{ITERATION}/finished") < 5000:
                other._store.queue_push(f"{ITERATION}/finished", b"nonsense")

    with ThreadPoolExecutor(1) as pool:
        flooding = pool.submit(flood)
        try:
            with pytest.raises(StageTimeoutError, match="no sample arrived"):
                queue.take(ITERATION, 1)
        finally:
            over.set()
        flooding.result(30)


def test_samples_behind_a_flood_are_not_lost(store: dist.TCPStore) -> None:
    queue = small_job(store)
    for _ in range(2500):
        store.queue_push(f"{ITERATION}/finished", b"nonsense")
    fill(queue, 3)
    queue.close(ITERATION)
    assert drain(queue, 2) == [0, 1, 2]
    queue.push_scored(ITERATION, [scored(0)])
    for _ in range(2500):
        store.queue_push(f"{ITERATION}/scored", b"nonsense")
    queue.push_scored(ITERATION, [scored(1), scored(2)])
    assert len(queue.collect(ITERATION)) == 3


def test_strange_notes_are_left_out_and_told_once(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    queue = small_job(store)
    queue.note_length(ITERATION, 5, 2)
    for text in ("x,", "1,", "1 2 3,", "9 1,", "1 4,", "\xff 1,", "3 2,"):
        store.append(f"{ITERATION}/lengths", text)  # type: ignore[attr-defined]
    queue.note_length(ITERATION, 8, 3)
    for _ in range(3):
        assert queue.lengths(ITERATION) == [(5, 2), (8, 3)]
    store.append(f"{ITERATION}/lengths", "7" * 5000)  # type: ignore[attr-defined]
    assert queue.lengths(ITERATION) == [(5, 2), (8, 3)]
    assert len(drops(caplog, "lengths")) == 7  # a prompt's second note is no fault


def test_strange_ends_are_left_out(store: dist.TCPStore) -> None:
    queue = small_job(store)
    store.append(f"{ITERATION}/ends", "nan,1e999,x,")  # type: ignore[attr-defined]
    before = time.time()
    queue.close(ITERATION)
    assert before <= queue.generation_end(ITERATION) <= time.time()
    assert before <= queue.generation_end(ITERATION + 1) <= time.time()  # nobody has said


def test_no_more_samples_are_counted_than_there_can_be(store: dist.TCPStore) -> None:
    queue = small_job(store)
    fill(queue, 4)
    queue.close(ITERATION)
    store.add(f"{ITERATION}/finished_count", 1000)
    assert queue.counts(ITERATION)[0] == 4
    queue.push_scored(ITERATION, [scored(each) for each in drain(queue, 4)])
    queue.wait_scored(ITERATION)
    assert len(queue.collect(ITERATION)) == 4


def test_a_sample_that_the_store_does_not_take_is_named(store: dist.TCPStore) -> None:
    count = MESSAGE_BYTES // 6
    large = Sample(1, (1,), (3,) * count, (-0.5,) * count, "stop", 2, 0, 1.0, 2.0)
    with pytest.raises(ValueError, match=r"sample 1 takes .* lower --rollout-max-new-tokens"):
        SampleQueue(store, LONG_S, 1).push_finished(ITERATION, large)
    assert consumer(store).counts(ITERATION) == (0, 0)


def test_generation_ends_when_the_last_instance_closes(store: dist.TCPStore) -> None:
    queue = SampleQueue(store, LONG_S, 2)
    queue.close(ITERATION)
    between = time.time()
    consumer(store, instances=2).close(ITERATION)
    assert between <= queue.generation_end(ITERATION) <= time.time()
