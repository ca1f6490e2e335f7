"""What generation instances write on their board, and how it is read: JSON, every field checked.

PURE. What no instance can have written raises MalformedMessageError.
"""

from __future__ import annotations

import json
from array import array
from dataclasses import asdict, dataclass, fields
from itertools import chain
from typing import Any, get_args

from megatron_rlhfuse.migration.state import Migration, Move, Transfer
from megatron_rlhfuse.rollout.wire import (
    MESSAGE_BYTES,
    Limits,
    MalformedMessageError,
    a_list,
    one_error,
    parse_object,
    real,
    text,
    whole,
)

_MOST_MIGRATIONS = 100_000
"""Of an iteration; each takes a look of the controller, some milliseconds."""


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


def encode_board(board: Board) -> str:
    """As one key of the store holds it."""
    return json.dumps(asdict(board), separators=(",", ":"))


@one_error
def decode_board(raw: str, limits: Limits) -> Board:
    """The inverse of `encode_board`. Raises MalformedMessageError."""
    values = parse_object(raw.encode(), MESSAGE_BYTES, _BOARD_FIELDS, "a board")
    left = tuple(
        whole(each, "left", limits.instances)
        for each in a_list(values["left"], "left", limits.instances)
    )
    if len(set(left)) < len(left):
        raise MalformedMessageError(f"an instance has left twice: {left!s:.200}")
    migrations = a_list(values["migrations"], "migrations", _MOST_MIGRATIONS)
    return Board(left, tuple(_migration(each, limits) for each in migrations))


def _migration(values: Any, limits: Limits) -> Migration:
    if not isinstance(values, dict) or values.keys() != _MIGRATION_FIELDS:
        raise MalformedMessageError(f"a migration needs {sorted(_MIGRATION_FIELDS)}")
    moves = a_list(values["moves"], "moves", limits.samples)
    destinations = a_list(values["destinations"], "destinations", limits.instances)
    return Migration(
        destinations=tuple(whole(each, "destinations", limits.instances) for each in destinations),
        moves=tuple(_move(each, limits) for each in moves),
        stage_without_s=real(values["stage_without_s"], "stage_without_s"),
        stage_with_s=real(values["stage_with_s"], "stage_with_s"),
    )


def _move(values: Any, limits: Limits) -> Move:
    sample_id, source, destination, transfer = a_list(values, "a move", 4)
    if transfer not in _TRANSFERS:
        raise MalformedMessageError(f"a sample moves with {transfer!r:.80}")
    return Move(
        whole(sample_id, "sample_id", limits.samples),
        whole(source, "source", limits.instances),
        whole(destination, "destination", limits.instances),
        transfer,
    )


def encode_report(report: Report) -> str:
    """As one key of the store holds it."""
    return json.dumps(vars(report), separators=(",", ":"))


@one_error
def decode_report(raw: bytes, instance: int, limits: Limits) -> Report:
    """What `encode_report` made of a report of this instance. Raises MalformedMessageError."""
    values = parse_object(raw, MESSAGE_BYTES, _REPORT_FIELDS, "a report")
    if whole(values["instance"], "instance", limits.instances) != instance:
        raise MalformedMessageError(f"instance {values['instance']} tells nothing in this place")
    unfinished = a_list(values["unfinished"], "unfinished", limits.samples)
    if set(map(len, unfinished)) - {3}:
        raise MalformedMessageError("unfinished: want three numbers for each sample")
    numbers = array("Q", chain.from_iterable(unfinished))  # none of them is negative
    ids, prompts, responses = numbers[0::3], numbers[1::3], numbers[2::3]
    if (
        max(ids, default=0) >= limits.samples
        or max(prompts, default=0) > limits.prompt_tokens
        or max(responses, default=0) > limits.response_tokens
        or len(set(ids)) < len(ids)
    ):
        raise MalformedMessageError("unfinished: a sample or a length that cannot be, or one twice")
    return Report(
        instance=instance,
        node=text(values["node"], "node"),
        unfinished=tuple(zip(ids, prompts, responses, strict=True)),
        kv_capacity=whole(values["kv_capacity"], "kv_capacity"),
        running=whole(values["running"], "running"),
        step_seconds=_positive(values["step_seconds"], "step_seconds"),
        step_sequences=_positive(values["step_sequences"], "step_sequences"),
        prefill_tokens=whole(values["prefill_tokens"], "prefill_tokens"),
        prefill_seconds=_positive(values["prefill_seconds"], "prefill_seconds"),
    )


def _positive(value: Any, name: str) -> float:
    """A finite number from 0."""
    if real(value, name) < 0:
        raise MalformedMessageError(f"{name} must not be negative, got {value!r:.80}")
    return float(value)


_BOARD_FIELDS = frozenset(field.name for field in fields(Board))
_REPORT_FIELDS = frozenset(field.name for field in fields(Report))
_MIGRATION_FIELDS = frozenset(field.name for field in fields(Migration))
_TRANSFERS = get_args(Transfer)
