"""What the generation instances of an iteration tell each other, through the job's TCPStore.

Invariants
- whether an instance is still generating, and which samples it was given, is one value that is
  changed by compare-and-set: none leaves while samples are on their way to it, none is chosen
  after it has left;
- messages are JSON, written and read by this project's types only, every field checked. A report
  or a sample that no instance can have sent is dropped. The board itself cannot be: who goes on
  with another one than its fellows loses samples, or trains them twice. So what is no board, or
  lacks what this rank has seen on it, ends the job (BoardError);
- keys carry the iteration, and are deleted in the next one, when nobody asks any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch.distributed as dist

from megatron_rlhfuse.migration.state import Migration
from megatron_rlhfuse.rollout.board_values import (
    Board,
    Report,
    decode_board,
    decode_report,
    encode_board,
    encode_report,
)
from megatron_rlhfuse.rollout.samples import PartialSample
from megatron_rlhfuse.rollout.wire import ANYTHING, DropLog, Limits, MalformedMessageError, whole

_NUMBER_BYTES = 20
"""Of the number of a sample."""

_REMEDY = (
    "samples could be lost, so the job ends: resume from the last checkpoint, and keep strangers "
    "away from the job's ports (docs/security.md)"
)


class BoardError(RuntimeError):
    """The board of an iteration is not what the instances have written; the message says how."""


class MigrationBoard:
    """This rank's hands on the board of one iteration."""

    def __init__(self, store: dist.Store, iteration: int, limits: Limits = ANYTHING) -> None:
        """Methods that read the board raise BoardError."""
        self._store = store
        self._limits = limits
        self._drops = DropLog()
        self._prefix = f"{iteration}/tail"
        self._version = -1
        self._board = Board()

    def read(self) -> Board:
        """The board as it is now; cheap where nothing has changed."""
        version = self._store.add(self._key("version"), 0)
        if version != self._version:
            self._read(self._raw())
            self._version = version
        return self._board

    def leave(self, instance: int, known: int) -> bool:
        """Takes an instance out, unless there are more migrations than the `known` ones."""
        while True:
            raw = self._raw()
            board = self._read(raw)
            if len(board.migrations) > known:
                return False
            if self._change(raw, Board((*board.left, instance), board.migrations)):
                return True

    def publish(self, migration: Migration) -> bool:
        """Orders a migration, unless one of its instances has left in the meantime."""
        taking_part = {*migration.destinations, *(move.source for move in migration.moves)}
        while True:
            raw = self._raw()
            board = self._read(raw)
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
        self._store.set(self._key(f"report/{report.instance}"), encode_report(report))

    def reports(self, instances: Sequence[int]) -> list[Report]:
        """The latest of those instances that have told something."""
        found = []
        for instance in instances:
            key = self._key(f"report/{instance}")
            if self._store.check([key]):
                raw: bytes = self._store.get(key)
                try:
                    found.append(decode_report(raw, instance, self._limits))
                except MalformedMessageError as fault:
                    self._drops.add(key, fault, raw)
        return found

    def send(self, destination: int, sample_id: int, sample: PartialSample | None) -> None:
        """Hands a sample on; None says that the source has finished it after all."""
        message = sample.to_bytes() if sample is not None else str(sample_id).encode()
        self._store.queue_push(self._mailbox(destination), message)

    def receive(self, destination: int) -> PartialSample | int | None:
        """The next sample for an instance, the number of one that was finished after all, or None
        while nothing is there."""
        while True:
            try:
                message: bytes = self._store.queue_pop(self._mailbox(destination), False)
            except dist.QueueEmptyError:
                return None
            try:
                if len(message) < _NUMBER_BYTES and message.isdigit():
                    return whole(int(message), "the number of a sample", self._limits.samples)
                return PartialSample.from_bytes(message, self._limits)
            except MalformedMessageError as fault:
                self.refuse(destination, fault)

    def refuse(self, destination: int, fault: object) -> None:
        """Notes that what came for an instance is dropped."""
        self._drops.add(self._mailbox(destination), fault)

    def delete(self, instances: int) -> None:
        """Removes everything."""
        for name in ("version", "board"):
            self._store.delete_key(self._key(name))
        for instance in range(instances):
            mailbox = self._mailbox(instance)
            for _ in range(self._store.queue_len(mailbox)):  # the store does not delete queues
                with suppress(dist.QueueEmptyError):
                    self._store.queue_pop(mailbox, False)
            for name in ("report", "released"):
                self._store.delete_key(self._key(f"{name}/{instance}"))

    def _read(self, raw: str) -> Board:
        """A value of the board, which must hold all that was on it before."""
        try:
            board = decode_board(raw, self._limits)
        except MalformedMessageError as fault:
            raise BoardError(
                f"{self._key('board')} in the job's store is no board ({fault}); {_REMEDY}"
            ) from fault
        left, migrations = self._board.left, self._board.migrations
        if board.left[: len(left)] != left or board.migrations[: len(migrations)] != migrations:
            raise BoardError(
                f"{self._key('board')} in the job's store lacks what was on it before; {_REMEDY}"
            )
        self._board = board
        return board

    def _mailbox(self, destination: int) -> str:
        return self._key(f"samples/{destination}")

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}"

    def _raw(self) -> str:
        # Sets the empty board where there is none yet.
        value: bytes = self._store.compare_set(self._key("board"), "", encode_board(Board()))
        return value.decode(errors="replace")

    def _change(self, expected: str, board: Board) -> bool:
        wanted = encode_board(board)
        value: bytes = self._store.compare_set(self._key("board"), expected, wanted)
        if value.decode(errors="replace") != wanted:
            return False
        self._store.add(self._key("version"), 1)
        return True
