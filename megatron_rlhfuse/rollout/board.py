"""What the generation instances of an iteration tell each other, through the job's TCPStore.

Invariants
- whether an instance is still generating, and which samples it was given, is one value that is
  changed by compare-and-set: none leaves while samples are on their way to it, none is chosen
  after it has left;
- messages are JSON, written and read by this project's types only;
- keys carry the iteration, and are deleted in the next one, when nobody asks any more.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from megatron_rlhfuse.migration.state import Migration, Move
from megatron_rlhfuse.rollout.samples import PartialSample


@dataclass(frozen=True)
class Report:
    """What a generation instance tells about itself, several times a second."""

    instance: int
    node: str
    unfinished: tuple[tuple[int, int, int], ...]
    """(sample, prompt tokens, response tokens so far)"""
    kv_capacity: int
    """Tokens."""
    running: int
    step_seconds: float
    step_sequences: float
    """Mean of the latest steps; 0 before the first."""
    prefill_tokens: int
    prefill_seconds: float
    """Of this iteration so far."""


@dataclass(frozen=True)
class Board:
    """The state that all instances agree on."""

    left: tuple[int, ...] = ()
    """Instances that have no samples any more, in the order in which they left."""
    migrations: tuple[Migration, ...] = ()

    def moves(self, first: int) -> list[Move]:
        """Of all migrations from number `first` on."""
        return [move for migration in self.migrations[first:] for move in migration.moves]


class MigrationBoard:
    """This rank's hands on the board of one iteration."""

    def __init__(self, store: dist.Store, iteration: int) -> None:
        self._store = store
        self._prefix = f"{iteration}/tail"
        self._version = -1
        self._board = Board()

    def read(self) -> Board:
        """The board as it is now; cheap where nothing has changed."""
        version = self._store.add(self._key("version"), 0)
        if version != self._version:
            self._board = _decode(self._raw())
            self._version = version
        return self._board

    def leave(self, instance: int, known: int) -> bool:
        """Takes an instance out, unless there are more migrations than the `known` ones."""
        while True:
            raw = self._raw()
            board = _decode(raw)
            if len(board.migrations) > known:
                return False
            if self._change(raw, Board((*board.left, instance), board.migrations)):
                return True

    def publish(self, migration: Migration) -> bool:
        """Orders a migration, unless one of its instances has left in the meantime."""
        taking_part = {*migration.destinations, *(move.source for move in migration.moves)}
        while True:
            raw = self._raw()
            board = _decode(raw)
            if taking_part & set(board.left):
                return False
            if self._change(raw, Board(board.left, (*board.migrations, migration))):
                return True

    def release(self, instance: int) -> None:
        """Says that an instance that has left has given its memory back, too."""
        self._store.set(self._key(f"released/{instance}"), "1")

    def is_released(self, instance: int) -> bool:
        """Whether the ranks of an instance may take its memory."""
        return bool(self._store.check([self._key(f"released/{instance}")]))

    def report(self, report: Report) -> None:
        """Replaces what this instance told last."""
        self._store.set(self._key(f"report/{report.instance}"), json.dumps(asdict(report)))

    def reports(self, instances: Sequence[int]) -> list[Report]:
        """The latest of those instances that have told something."""
        found = []
        for instance in instances:
            key = self._key(f"report/{instance}")
            if self._store.check([key]):
                values = json.loads(self._store.get(key))
                values["unfinished"] = tuple(tuple(each) for each in values["unfinished"])
                found.append(Report(**values))
        return found

    def send(self, destination: int, sample_id: int, sample: PartialSample | None) -> None:
        """Hands a sample on; None says that the source has finished it after all."""
        message = sample.to_bytes() if sample is not None else str(sample_id).encode()
        self._store.queue_push(self._key(f"samples/{destination}"), message)

    def receive(self, destination: int) -> PartialSample | int | None:
        """The next sample for an instance, the number of one that was finished after all, or None
        while nothing is there."""
        try:
            message = self._store.queue_pop(self._key(f"samples/{destination}"), False)
        except dist.QueueEmptyError:
            return None
        return int(message) if message.isdigit() else PartialSample.from_bytes(message)

    def delete(self, instances: int) -> None:
        """Removes everything."""
        for name in ("version", "board"):
            self._store.delete_key(self._key(name))
        for instance in range(instances):
            while self.receive(instance) is not None:  # the store does not delete queues
                pass
            for name in ("report", "released"):
                self._store.delete_key(self._key(f"{name}/{instance}"))

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _raw(self) -> str:
        # Sets the empty board where there is none yet.
        value: bytes = self._store.compare_set(self._key("board"), "", _encode(Board()))
        return value.decode()

    def _change(self, expected: str, board: Board) -> bool:
        wanted = _encode(board)
        value: bytes = self._store.compare_set(self._key("board"), expected, wanted)
        if value.decode() != wanted:
            return False
        self._store.add(self._key("version"), 1)
        return True


def _encode(board: Board) -> str:
    return json.dumps(asdict(board), separators=(",", ":"))


def _decode(raw: str) -> Board:
    values: dict[str, Any] = json.loads(raw)
    migrations = tuple(
        Migration(
            **each
            | {
                "destinations": tuple(each["destinations"]),
                "moves": tuple(Move(*move) for move in each["moves"]),
            }
        )
        for each in values["migrations"]
    )
    return Board(tuple(values["left"]), migrations)
