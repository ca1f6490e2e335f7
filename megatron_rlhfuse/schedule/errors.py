"""What can be wrong with a problem or an order.

Invariants:
- a message is one line of printable characters that names the place, whatever a user's file holds;
- of a user's token, name or value it shows at most `LONGEST` characters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

LONGEST = 40
"""Characters of a value that a message shows."""

LONGEST_CELL = 16
"""Characters of a token that a grid shows, where nine stand on a line."""

GRID_REACH = 4
"""Cells, and devices, shown on either side of the faulty one."""


class ScheduleError(ValueError):
    """A problem, an order or a request that makes no schedule."""

    def __init__(self, message: str) -> None:
        super().__init__(escape(message))


class ProblemError(ScheduleError):
    """A field of a problem is missing, of the wrong type or out of range.

    Attributes:
        field: the path of the field, such as `models[1].pipelines[0]`
        reason: the rest of the message
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = escape(field)
        self.reason = message


class InfeasibleError(ScheduleError):
    """The memory limit admits no schedule, or none was found under it."""


class LoweringError(ScheduleError):
    """The programs of the devices cannot be executed; says where.

    Attributes:
        device, position: the instruction at fault
    """

    def __init__(self, device: int, position: int, message: str) -> None:
        super().__init__(f"device {device}, position {position}: {message}")
        self.device = device
        self.position = position


class OrderError(ScheduleError):
    """A device's list of subtasks is wrong; says where.

    Attributes:
        device, position: the cell at fault; position is None where a whole row is
        grid: the neighbourhood of that cell, a row per device, the cell in brackets
    """

    def __init__(
        self, order: Sequence[Sequence[str]], device: int, position: int | None, message: str
    ) -> None:
        place = f"device {device}"
        if position is not None:
            place += f", position {position} ({show_name(order[device][position])})"
        super().__init__(f"{place}: {message}")
        self.device = device
        self.position = position
        self.grid = draw_grid(order, device, position)


def draw_grid(order: Sequence[Sequence[str]], device: int, position: int | None) -> str:
    """The cells of `order` around one, which stands in brackets; it fits a terminal.

    Without a position, the beginning of the device's row.
    """
    rows = _around(device, len(order))
    columns = _around(position or 0, max(len(order[row]) for row in rows))
    table = [["position", *(f" {column} " for column in columns)]]
    for row in rows:
        cells = [f"{'>' if row == device else ' '} device {row}"]
        for column in columns:
            text = show_name(order[row][column], LONGEST_CELL) if column < len(order[row]) else ""
            cells.append(f"[{text}]" if (row, column) == (device, position) else f" {text} ")
        table.append(cells)
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        " ".join(f"{cell:{width}}" for cell, width in zip(cells, widths, strict=True)).rstrip()
        for cells in table
    )


def show(value: object, longest: int = LONGEST) -> str:
    """A value as one short line for a message; of lists and objects the type alone."""
    if isinstance(value, list | Mapping):
        return type(value).__name__
    try:
        text = escape(repr(value))
    except ValueError:  # Python prints no integer of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def show_name(value: object, longest: int = LONGEST) -> str:
    """A token or the name of a field for a message: bare where a reader sees what it is."""
    if not isinstance(value, str) or not value.isprintable() or value != value.strip():
        return show(value, longest)
    return value if 0 < len(value) <= longest else show(value, longest)


def escape(text: str) -> str:
    """The text with every character that cannot be printed, line ends among them, as an escape."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in text)


def _around(center: int, count: int) -> range:
    """The numbers below `count` that are at most GRID_REACH away from `center`."""
    return range(max(0, center - GRID_REACH), min(count, center + GRID_REACH + 1))
