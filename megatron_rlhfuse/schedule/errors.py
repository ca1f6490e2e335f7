"""What can be wrong with a problem or an order; every message is one line that names the place."""

from __future__ import annotations

from collections.abc import Sequence

GRID_REACH = 4
"""Cells shown on either side of the faulty one."""


class ScheduleError(ValueError):
    """A problem, an order or a request that makes no schedule."""


class ProblemError(ScheduleError):
    """A field of a problem is missing, of the wrong type or out of range.

    Attributes:
        field: the path of the field, such as `models[1].pipelines[0]`
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class InfeasibleError(ScheduleError):
    """The memory limit admits no schedule, or none was found under it."""


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
            place += f", position {position}"
            if position < len(order[device]):
                place += f" ({order[device][position]})"
        super().__init__(f"{place}: {message}")
        self.device = device
        self.position = position
        self.grid = draw_grid(order, device, position)


def draw_grid(order: Sequence[Sequence[str]], device: int, position: int | None) -> str:
    """The rows of `order` around a cell, which stands in brackets."""
    center = position if position is not None else 0
    first = max(0, center - GRID_REACH)
    longest = max((len(row) for row in order), default=0)
    columns = range(first, min(longest, center + GRID_REACH + 1))
    cells = [
        [
            f"[{text}]" if (row, column) == (device, position) else f" {text} "
            for column in columns
            for text in [order[row][column] if column < len(order[row]) else ""]
        ]
        for row in range(len(order))
    ]
    head = [f" {column} " for column in columns]
    widths = [
        max(len(row[i]) for row in [head, *cells]) for i in range(len(head))
    ]  # one width per column
    lines = [("position", head)] + [
        (f"{'>' if row == device else ' '} device {row}", cells[row]) for row in range(len(order))
    ]
    label = max(len(text) for text, _ in lines)
    return "\n".join(
        f"{text:{label}} " + " ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True))
        for text, row in lines
    )
