"""What generation instances tell each other, over a real TCPStore with a connection for each."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_rlhfuse.migration.state import Migration, Move
from megatron_rlhfuse.rollout.board import BoardError, MigrationBoard
from megatron_rlhfuse.rollout.board_values import Board, Report, encode_board
from megatron_rlhfuse.rollout.samples import GenerationRequest, PartialSample
from megatron_rlhfuse.rollout.wire import Limits

ITERATION = 3
WAIT = timedelta(seconds=30)


@pytest.fixture
def store() -> Iterator[dist.TCPStore]:
    yield dist.TCPStore("127.0.0.1", 0, None, True, WAIT, wait_for_workers=False)


def board(store: dist.TCPStore, iteration: int = ITERATION) -> MigrationBoard:
    """The board on a connection of its own, as another rank has it."""
    return MigrationBoard(dist.TCPStore("127.0.0.1", store.port, None, False, WAIT), iteration)


def migration(source: int, destination: int, *sample_ids: int) -> Migration:
    moves = tuple(Move(sample_id, source, destination, "kv") for sample_id in sample_ids)
    return Migration((destination,), moves, 2.5, 0.1)


def taking_part(order: Migration) -> set[int]:
    return {*order.destinations, *(move.source for move in order.moves)}


def partial_sample(sample_id: int) -> PartialSample:
    request = GenerationRequest(sample_id, (1, 2), 7)
    return PartialSample(request, (5,), (-0.1,), b"\0\xff", 2, ("/proc/1/fd/2",), 4, 1.25)


def report(instance: int, *lengths: tuple[int, int, int]) -> Report:
    return Report(instance, "node", lengths, 1000, len(lengths), 0.01, 1.5, 30, 0.1)


def test_a_new_board_is_empty(store: dist.TCPStore) -> None:
    assert board(store).read() == Board((), ())
    assert board(store).read().moves(0) == []


def test_all_see_what_one_has_changed_exactly(store: dist.TCPStore) -> None:
    here, there = board(store), board(store)
    assert there.read() == Board()  # and has to notice that it is outdated
    orders = migration(0, 1, 4, 5), migration(2, 1, 6)
    assert here.publish(orders[0])
    assert there.read() == Board((), orders[:1])
    assert there.leave(0, known=1)
    assert here.publish(orders[1])
    assert here.read() == there.read() == Board((0,), orders)
    assert there.read().moves(0) == [*orders[0].moves, *orders[1].moves]
    assert there.read().moves(1) == list(orders[1].moves)
    assert there.read().moves(2) == []


def test_none_leaves_while_a_migration_is_unknown_to_it(store: dist.TCPStore) -> None:
    here = board(store)
    assert here.publish(migration(0, 1, 4))
    assert not here.leave(2, known=0)  # even one that has no part in it
    assert here.read().left == ()
    assert here.leave(2, known=1)
    assert here.leave(0, known=1)
    assert here.read().left == (2, 0)


@pytest.mark.parametrize("gone", [0, 1])
def test_none_that_has_left_is_chosen(store: dist.TCPStore, gone: int) -> None:
    here, there = board(store), board(store)
    assert there.leave(gone, known=0)
    assert not here.publish(migration(0, 1, 4))
    assert here.read() == there.read() == Board((gone,), ())
    assert here.publish(migration(2, 3, 4))


def test_leaving_and_migrating_at_once_never_miss_each_other(store: dist.TCPStore) -> None:
    instances = 6
    answers: list[bool] = []  # of publish
    together, all_left = threading.Barrier(instances + 1), threading.Event()

    def control() -> None:
        here, rng = board(store), random.Random(0)
        together.wait(30)
        while not all_left.is_set():
            order = migration(*rng.sample(range(instances), 2), len(answers))
            answers.append(here.publish(order))

    def live(instance: int) -> int:
        """Returns how many migrations it knew when it left."""
        here, known = board(store), 0
        together.wait(30)
        while len(answers) < 8 * (instance + 1):  # one leaves after the other, amid migrations
            known = len(here.read().migrations)
        while not here.leave(instance, known):
            known = len(here.read().migrations)
        return known

    with ThreadPoolExecutor(instances + 1) as threads:
        controller = threads.submit(control)
        known = list(threads.map(live, range(instances)))
        all_left.set()
        controller.result(60)

    final = board(store).read()
    assert len(final.migrations) == sum(answers) >= 8
    assert sorted(final.left) == list(range(instances))
    for instance in range(instances):
        after = final.migrations[known[instance] :]
        assert all(instance not in taking_part(order) for order in after)


def test_reports_are_the_latest_of_each(store: dist.TCPStore) -> None:
    here, there = board(store), board(store)
    assert here.reports([0, 1]) == []
    here.report(report(0, (4, 10, 3), (5, 12, 0)))
    there.report(report(1))
    here.report(report(0, (4, 10, 7)))
    assert there.reports([0, 1, 2]) == [report(0, (4, 10, 7)), report(1)]
    assert there.reports([1]) == [report(1)]


def test_samples_arrive_once_in_order_where_they_are_sent(store: dist.TCPStore) -> None:
    here, there = board(store), board(store)
    here.send(1, 4, partial_sample(4))
    here.send(1, 5, None)
    here.send(2, 6, partial_sample(6))
    assert [there.receive(1) for _ in range(3)] == [partial_sample(4), 5, None]
    assert [there.receive(2) for _ in range(2)] == [partial_sample(6), None]
    assert there.receive(0) is None


def test_iterations_have_nothing_in_common(store: dist.TCPStore) -> None:
    here, next_one = board(store), board(store, ITERATION + 1)
    here.publish(migration(0, 1, 4))
    here.leave(2, known=1)
    here.report(report(0))
    here.send(1, 5, None)
    assert next_one.read() == Board()
    assert next_one.reports([0]) == []
    assert next_one.receive(1) is None


def test_deleting_an_iteration_leaves_nothing_of_it_and_all_of_others(store: dist.TCPStore) -> None:
    next_one = board(store, ITERATION + 1)
    next_one.publish(migration(2, 3, 8))
    keys = store.num_keys()
    here = board(store)
    assert here.publish(migration(0, 1, 4))
    assert here.leave(2, known=1)
    for instance in range(3):
        here.report(report(instance))
    here.send(1, 4, partial_sample(4))
    assert here.receive(1) == partial_sample(4)
    assert store.num_keys() > keys
    here.delete(3)
    assert store.num_keys() == keys
    assert next_one.read().moves(0) == list(migration(2, 3, 8).moves)


def in_a_small_job(store: dist.TCPStore) -> MigrationBoard:
    return MigrationBoard(store, ITERATION, Limits(samples=8, response_tokens=9, instances=3))


@pytest.mark.parametrize(
    "strange",
    [
        b"",
        b"\xff",
        b"9" * 19,
        b"8",
        b"-1",
        b"9" * 5000,
        b"{}",
        partial_sample(8).to_bytes(),
        partial_sample(4).to_bytes().replace(b"/proc/1/fd/2", b"/etc/passwd/"),
    ],
)
def test_a_strange_sample_is_dropped(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture, strange: bytes
) -> None:
    here = in_a_small_job(store)
    store.queue_push(f"{ITERATION}/tail/samples/1", strange)
    here.send(1, 4, partial_sample(4))
    store.queue_push(f"{ITERATION}/tail/samples/1", strange)
    here.send(1, 5, None)
    assert [here.receive(1) for _ in range(3)] == [partial_sample(4), 5, None]
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2 and all(f"{ITERATION}/tail/samples/1" in line for line in lines)


def test_a_strange_report_is_dropped_and_told_once(
    store: dist.TCPStore, caplog: pytest.LogCaptureFixture
) -> None:
    here = in_a_small_job(store)
    here.report(report(0, (4, 10, 3)))
    for strange in ("", "[]", '{"instance": 1}', "\x00"):
        store.set(f"{ITERATION}/tail/report/1", strange)
        for _ in range(3):
            assert here.reports([0, 1]) == [report(0, (4, 10, 3))]
    assert len(caplog.records) == 4
    here.report(report(1))
    assert here.reports([0, 1]) == [report(0, (4, 10, 3)), report(1)]


ACTIONS: dict[str, Callable[[MigrationBoard], object]] = {
    "read": lambda here: here.read(),
    "leave": lambda here: here.leave(2, known=1),
    "publish": lambda here: here.publish(migration(0, 1, 5)),
}


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "lacks what was on it before"),
        ("nonsense", "is no board"),
        ('{"left":[],"migrations":[{}]}', "is no board .a migration needs"),
        (encode_board(Board()), "lacks what was on it before"),
        (encode_board(Board((0,), (migration(2, 1, 4),))), "lacks what was on it before"),
    ],
)
def test_a_board_that_somebody_else_has_changed_ends_the_job(
    store: dist.TCPStore,
    action: Callable[[MigrationBoard], object],
    value: str,
    message: str,
) -> None:
    # Whoever went on with it would lose samples, or have them twice.
    here = in_a_small_job(store)
    assert here.publish(migration(0, 1, 4))
    here.read()
    store.set(f"{ITERATION}/tail/board", value)
    store.add(f"{ITERATION}/tail/version", 1)
    with pytest.raises(BoardError, match=f"{ITERATION}/tail/board .*{message}.*docs/security.md"):
        action(here)
