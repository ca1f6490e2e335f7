"""Fields of JSON objects that people write, read with checks that name the place.

Every error is a ProblemError with the path of the field, such as `models[1].forward[0]`. A field
that is not known is refused: a misspelt one must not pass for a default.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from megatron_rlhfuse.schedule.errors import ProblemError, show, show_name

MAX_COUNT = 4_000_000
"""Larger counts are refused: no file needs one, and a typo is likelier."""

HIGHEST = 1e15
"""Up to here a float holds every whole number."""


class Fields:
    """The fields of one JSON object, read with checks that name the path."""

    def __init__(
        self, data: Any, path: str, required: set[str], optional: set[str], *, what: str = ""
    ) -> None:
        """Args: `what` names the object in messages where its path is empty."""
        where = path or what
        if not isinstance(data, Mapping):
            raise ProblemError(where, f"want a JSON object, got {show(data)}")
        self._data = data
        self._prefix = f"{path}." if path else ""
        for name in data:
            if name not in required | optional:
                known = ", ".join(sorted(required | optional))
                raise ProblemError(self.path(show_name(name)), f"unknown field; there are {known}")
        for name in sorted(required):
            if name not in data:
                raise ProblemError(self.path(name), "missing")

    def path(self, name: str) -> str:
        """The path of a field, for messages."""
        return f"{self._prefix}{name}"

    def get(self, name: str, default: Any = None) -> Any:
        return self._data.get(name, default)

    def count(self, name: str) -> int:
        value = self._data[name]
        if not is_whole(value) or not 1 <= value <= MAX_COUNT:
            raise ProblemError(
                self.path(name),
                f"want a whole number from 1 to {MAX_COUNT}, got {show(value)}",
            )
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._data.get(name, default)
        if not isinstance(value, bool):
            raise ProblemError(self.path(name), f"want true or false, got {show(value)}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        value = self._data.get(name, default)
        if not isinstance(value, str) or not value.isprintable():
            raise ProblemError(self.path(name), f"want a line of text, got {show(value)}")
        return value

    def choice(self, name: str, known: Iterable[str], default: str | None = None) -> str:
        """One of the words `known`."""
        value, words = self._data.get(name, default), list(known)
        if value not in words:
            raise ProblemError(
                self.path(name), f"want one of {', '.join(words)}; got {show(value)}"
            )
        return value

    def number(
        self,
        name: str,
        *,
        lowest: float = -math.inf,
        above: float = -math.inf,
        highest: float = HIGHEST,
    ) -> float:
        return _number(self._data[name], self.path(name), lowest, above, highest)

    def numbers(
        self,
        name: str,
        length: int,
        unit: str,
        *,
        lowest: float = -math.inf,
        above: float = -math.inf,
        highest: float = HIGHEST,
        nullable: bool = False,
    ) -> tuple[float, ...]:
        """One number for all, or a list of `length` (nullable: null there is no limit)."""
        value, path = self._data[name], self.path(name)
        if not isinstance(value, list):
            return (_number(value, path, lowest, above, highest),) * length
        if len(value) != length:
            raise ProblemError(
                path, f"want a number, or one per {unit} ({length}); got {len(value)}"
            )
        return tuple(
            math.inf
            if nullable and item is None
            else _number(item, f"{path}[{i}]", lowest, above, highest)
            for i, item in enumerate(value)
        )


def _number(value: Any, path: str, lowest: float, above: float, highest: float) -> float:
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if good and isinstance(value, int) and abs(value) > 10**300:
        good = False  # no float
    if not good or not math.isfinite(value) or not (lowest <= value <= highest and value > above):
        least = f"above {above:g}" if above > -math.inf else f"of at least {lowest:g}"
        most = f" and at most {highest:g}" if highest < math.inf else ""
        raise ProblemError(path, f"want a number {least}{most}, got {show(value)}")
    return float(value)


def is_whole(value: Any) -> bool:
    """Whether it is an integer; JSON's true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)
