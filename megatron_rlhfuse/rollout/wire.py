"""What a message between ranks may be, and the checks on reading one.

Messages go through a store that listens on a port: whoever reaches it can push anything. A message
is read into this project's types, with every field checked, or it is dropped.

Invariants
- whatever the bytes are, reading them raises nothing but MalformedMessageError;
- nothing is allocated from a number in a message: sizes follow from the bytes that are there;
- a check of a long field is one pass in C: reading JSON takes ten times as long.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
from array import array
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 8 << 20
"""The most that torch's store takes; it closes the connection of who sends more."""

_LOGGED = 8
"""Dropped messages of one kind that have a line each; later ones have one when they double."""

_REMEMBERED = 1000
"""Values of keys that were dropped, and told."""

_ALL_ERRORS = (ValueError, TypeError, KeyError, OverflowError, RecursionError)


class MalformedMessageError(ValueError):
    """Bytes that no rank of this job can have sent; says what is wrong with them."""


@dataclass(frozen=True)
class Limits:
    """What messages of a job can hold. The defaults are for where nothing is known."""

    samples: int = 1 << 32
    """Of an iteration: sample ids lie below."""
    prompt_tokens: int = 1 << 24
    response_tokens: int = 1 << 24
    vocabulary: int = 1 << 32
    """Token ids lie below."""
    instances: int = 1 << 20
    """Numbers of generation instances lie below."""
    has_reference: bool | None = None
    """Whether scored samples bring log-probabilities of a reference model; None: perhaps."""
    has_values: bool | None = None
    """Whether they bring values of a critic."""

    @property
    def sample_bytes(self) -> int:
        """Of a finished or partial sample: numbers as JSON writes them, and all else."""
        token, log_prob, others = 12, 26, 128 << 10
        tokens = token * (self.prompt_tokens + self.response_tokens)
        return min(MESSAGE_BYTES, tokens + log_prob * self.response_tokens + others)


ANYTHING = Limits()


def one_error[**P, T](read: Callable[P, T]) -> Callable[P, T]:
    """Turns whatever is raised by bytes that are read into MalformedMessageError."""

    @functools.wraps(read)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return read(*args, **kwargs)
        except MalformedMessageError:
            raise
        except _ALL_ERRORS as error:
            raise MalformedMessageError(f"{error!s:.300}") from error

    return checked


def parse_object(data: bytes, most: int, names: Collection[str], what: str) -> dict[str, Any]:
    """A JSON object with exactly these fields, in at most so many bytes of UTF-8."""
    if len(data) > most:
        raise MalformedMessageError(f"{what} of {len(data)} bytes; at most {most} are possible")
    values = _DECODER.decode(data.decode())
    if not isinstance(values, dict) or values.keys() != set(names):
        raise MalformedMessageError(f"{what} needs the fields {sorted(names)}, got {data[:200]!r}")
    return values


def tokens(values: Any, name: str, most: int, vocabulary: int) -> tuple[int, ...]:
    """A list of token ids."""
    count = len(a_list(values, name, most))
    # The type of its elements is checked by the array, and that none is negative.
    if count and int(np.frombuffer(array("I", values), dtype=np.uint32).max()) >= vocabulary:
        raise MalformedMessageError(f"{name}: a token id is not below {vocabulary}")
    return tuple(values)


def numbers(values: Any, name: str, most: int) -> tuple[float, ...]:
    """A list of finite numbers."""
    total = sum(a_list(values, name, most))
    # Finite numbers may add up to infinity.
    if not math.isfinite(total) and not all(map(math.isfinite, values)):
        raise MalformedMessageError(f"{name}: not all are finite numbers")
    return tuple(values)


def a_list(values: Any, name: str, most: int) -> list[Any]:
    """A list of at most so many elements."""
    if not isinstance(values, list) or len(values) > most:
        raise MalformedMessageError(f"{name} must be a list of at most {most}, got {values!r:.80}")
    return values


def whole(value: Any, name: str, below: int = 1 << 63) -> int:
    """A whole number from 0, below a limit."""
    if type(value) is not int or not 0 <= value < below:  # True is an int, too
        raise MalformedMessageError(
            f"{name} must be a whole number below {below}, got {value!r:.80}"
        )
    return value


def real(value: Any, name: str) -> float:
    """A finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise MalformedMessageError(f"{name} must be a finite number, got {value!r:.80}")
    return float(value)


def text(value: Any, name: str, most: int = 256) -> str:
    """A short string."""
    if not isinstance(value, str) or len(value) > most:
        raise MalformedMessageError(f"{name} must be a string of at most {most}, got {value!r:.80}")
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise MalformedMessageError(f"{name} is no number")


# NaN and Infinity are no JSON, but Python reads them.
_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class DropLog:
    """Says in the log what was dropped. A flood of messages must not become one of lines."""

    def __init__(self) -> None:
        self._dropped: Counter[str] = Counter()
        self._said: set[tuple[str, bytes]] = set()

    @property
    def total(self) -> int:
        """Messages that were dropped so far."""
        return self._dropped.total()

    def add(self, place: str, fault: object, content: bytes | None = None) -> None:
        """place: the queue or key that the message came from; content: of a key, whose value is
        read again and again, what is to be told only once."""
        if content is not None:
            said = place, hashlib.blake2b(content, digest_size=8).digest()
            if said in self._said or len(self._said) > _REMEMBERED:
                return
            self._said.add(said)
        self._dropped[place] += 1
        count = self._dropped[place]
        if count <= _LOGGED or count & (count - 1) == 0:
            logger.warning(
                "dropped a message of %s that no rank can have sent (%d so far): %.300s",
                place,
                count,
                fault,
            )
