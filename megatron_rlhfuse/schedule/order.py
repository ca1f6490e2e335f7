"""The order of subtasks on every device, as tokens: `a0F3` is model a, pipeline 0, forward, 3.

A token does not name the stage. A pipeline may pass a device several times (interleaved stages);
the tokens of one micro-batch and kind on a device then stand for its stages there in the order in
which they must run: ascending for F, descending for B and W.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from megatron_rlhfuse.schedule.errors import OrderError, ScheduleError, show
from megatron_rlhfuse.schedule.problem import LETTERS, Problem

Order = list[list["Subtask"]]
"""One list per device, in the order of execution."""

_TOKEN = re.compile(r"([a-z])(0|[1-9][0-9]{0,6})([FBW])(0|[1-9][0-9]{0,6})")


class Subtask(NamedTuple):
    """Forward, backward or weight gradient of a micro-batch on one stage of one pipeline."""

    model: int
    pipeline: int
    kind: str
    micro_batch: int
    stage: int

    @property
    def token(self) -> str:
        return f"{LETTERS[self.model]}{self.pipeline}{self.kind}{self.micro_batch}"


def order_to_tokens(order: Sequence[Sequence[Subtask]]) -> list[list[str]]:
    """The tokens of every device."""
    return [[subtask.token for subtask in row] for row in order]


def parse_order(problem: Problem, rows: Sequence[Sequence[str]]) -> Order:
    """Subtasks from tokens; every subtask of the problem stands there exactly once.

    Raises OrderError naming device, position and token, and ScheduleError for what is no list of
    token lists (`rows` may come from a file). Whether the order can be executed is for `evaluate`
    to say.
    """
    _check_lists(rows)
    if len(rows) != problem.devices:
        raise ScheduleError(
            f"order: {len(rows)} rows, but the problem has {problem.devices} devices"
        )
    stages = _stages_by_device(problem)
    order: Order = []
    for device, row in enumerate(rows):
        seen: dict[str, int] = defaultdict(int)
        subtasks = []
        for position, token in enumerate(row):
            match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
            if match is None:
                raise OrderError(
                    rows, device, position, "not a token; one looks like a0F3 or b1B12"
                )
            model, pipeline, kind = LETTERS.index(match[1]), int(match[2]), match[3]
            here = stages.get((device, model, pipeline))
            if model >= len(problem.models) or kind not in problem.models[model].kinds:
                what = (
                    f"kind {kind} in model {match[1]}" if model < len(problem.models) else "model"
                )
                raise OrderError(rows, device, position, f"the problem has no such {what}")
            if here is None:
                raise OrderError(rows, device, position, "this pipeline has no stage on the device")
            if int(match[4]) >= problem.models[model].micro_batches:
                raise OrderError(rows, device, position, "the problem has no such micro-batch")
            if seen[token] == len(here):
                times = "once" if len(here) == 1 else f"{len(here)} times"
                raise OrderError(rows, device, position, f"stands here more than {times}")
            stage = here[seen[token]] if kind == "F" else here[-1 - seen[token]]
            seen[token] += 1
            subtasks.append(Subtask(model, pipeline, kind, int(match[4]), stage))
        missing = _first_missing(problem, stages, device, seen)
        if missing is not None:
            raise OrderError(rows, device, None, f"{missing} is missing")
        order.append(subtasks)
    return order


def order_to_csv(rows: Sequence[Sequence[str]]) -> str:
    """One line per device, tokens between commas."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def order_from_csv(text: str) -> list[list[str]]:
    """The tokens of `order_to_csv`; spaces around them do not matter.

    Raises ScheduleError naming the line where it holds no cells between commas.
    """
    reader = csv.reader(io.StringIO(text))
    rows: list[list[str]] = []
    try:
        for row in reader:
            rows.append([cell.strip() for cell in row if cell.strip()])
    except csv.Error as error:
        reason = str(error).partition(" - ")[0]  # behind it stands advice for programmers
        raise ScheduleError(
            f"order: line {reader.line_num} (device {len(rows)}): want tokens between commas, "
            f"but: {reason}"
        ) from error
    return rows


def subtasks_of(problem: Problem, model: int, pipeline: int) -> Iterable[tuple[int, Subtask]]:
    """Every (device, subtask) of a pipeline."""
    described = problem.models[model]
    for stage, device in enumerate(described.pipelines[pipeline]):
        for kind in described.kinds:
            for micro_batch in range(described.micro_batches):
                yield device, Subtask(model, pipeline, kind, micro_batch, stage)


def _check_lists(rows: object) -> None:
    """Raises ScheduleError for anything but a list of lists."""
    if not isinstance(rows, list | tuple):
        raise ScheduleError(f"order: want a list of tokens per device, got {show(rows)}")
    for device, row in enumerate(rows):
        if not isinstance(row, list | tuple):
            raise ScheduleError(f"order: device {device}: want a list of tokens, got {show(row)}")


def _stages_by_device(problem: Problem) -> dict[tuple[int, int, int], list[int]]:
    """(device, model, pipeline) -> the stages there, ascending."""
    stages: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for m, model in enumerate(problem.models):
        for k, pipeline in enumerate(model.pipelines):
            for stage, device in enumerate(pipeline):
                stages[device, m, k].append(stage)
    return dict(stages)


def _first_missing(
    problem: Problem,
    stages: dict[tuple[int, int, int], list[int]],
    device: int,
    seen: dict[str, int],
) -> str | None:
    for (where, m, k), here in stages.items():
        if where != device:
            continue
        model = problem.models[m]
        for kind in model.kinds:
            for micro_batch in range(model.micro_batches):
                token = Subtask(m, k, kind, micro_batch, 0).token
                if seen.get(token, 0) < len(here):
                    return token
    return None
