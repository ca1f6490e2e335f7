"""Orders and their evaluation: tokens, times, memory, deadlocks, and errors that show the place."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.errors import OrderError, ScheduleError
from megatron_rlhfuse.schedule.evaluate import evaluate, predecessor
from megatron_rlhfuse.schedule.order import (
    Order,
    Subtask,
    order_from_csv,
    order_to_csv,
    order_to_tokens,
    parse_order,
    subtasks_of,
)
from megatron_rlhfuse.schedule.problem import Model, Problem
from tests.unit.schedule_strategies import executable_orders, problems

TOLERANCE = 1e-9


@st.composite
def ordered(draw: st.DrawFn, **options: Any) -> tuple[Problem, Order]:
    """A problem and an order of it that can be executed."""
    problem = draw(problems(max_micro_batches=3, max_stages=3, **options))
    return problem, draw(executable_orders(problem))


def rows(text: str) -> list[list[str]]:
    """An order as people write it: a line per device."""
    return [line.split() for line in text.strip().splitlines()]


def model(pipelines: tuple[tuple[int, ...], ...], micro_batches: int = 2, **fields: Any) -> Model:
    """Forward 1, backward 2, activation 1 on every stage."""
    stages = len(pipelines[0])
    values = {"forward": 1.0, "backward": 2.0, "activation": 1.0, **fields}
    per_stage = {name: (value,) * stages for name, value in values.items()}
    return Model(name="", micro_batches=micro_batches, pipelines=pipelines, **per_stage)


ONE_STAGE_PER_DEVICE = Problem(2, (model(((0, 1),)),))
TWICE_ON_ONE_DEVICE = Problem(1, (model(((0, 0),), micro_batches=1),))
SPLIT = Problem(1, (model(((0,),), weight_gradient=0.5),))


@given(ordered())
def test_token_and_csv_round_trip(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    tokens = order_to_tokens(order)
    assert parse_order(problem, tokens) == order
    assert order_from_csv(order_to_csv(tokens)) == tokens


@given(ordered())
def test_an_order_holds_every_subtask_on_its_device(drawn: tuple[Problem, Order]) -> None:
    problem, order = drawn
    expected = {
        pair
        for m, described in enumerate(problem.models)
        for k in range(len(described.pipelines))
        for pair in subtasks_of(problem, m, k)
    }
    assert len(expected) == problem.subtasks == sum(map(len, order))
    assert {(device, each) for device, row in enumerate(order) for each in row} == expected


def test_tokens_with_spaces_and_empty_rows() -> None:
    assert order_from_csv("a0F0 , a0B0\n\nb1F12,\n") == [["a0F0", "a0B0"], [], ["b1F12"]]


@given(ordered(integer_times=False))
def test_times_satisfy_the_definition(drawn: tuple[Problem, Order]) -> None:
    """Every start is the later of the two things it waits for, and of nothing else."""
    problem, order = drawn
    timeline = evaluate(problem, order)
    ends = {
        subtask: timeline.end(device, position)
        for device, row in enumerate(order)
        for position, subtask in enumerate(row)
    }
    for device, row in enumerate(order):
        for position, subtask in enumerate(row):
            waits = [0.0]
            if position:
                waits.append(ends[row[position - 1]])
            before = predecessor(problem, subtask)
            if before is not None:
                pipeline = problem.models[subtask.model].pipelines[subtask.pipeline]
                local = pipeline[before.stage] == device
                waits.append(ends[before] + (0.0 if local else problem.p2p))
            assert timeline.start[device][position] == pytest.approx(max(waits))
    assert timeline.makespan == max(ends.values())
    assert timeline.makespan >= max(problem.work()) - TOLERANCE
    assert 0 <= timeline.bubble_fraction() + TOLERANCE <= 1 + TOLERANCE


@given(ordered())
def test_peak_is_the_most_that_is_held_at_any_start(drawn: tuple[Problem, Order]) -> None:
    """Counted anew from the times: a micro-batch is held from its F's start to its last part."""
    problem, order = drawn
    timeline = evaluate(problem, order)
    for device, row in enumerate(order):
        starts, ends = {}, {}
        for position, subtask in enumerate(row):
            starts[subtask] = timeline.start[device][position]
            ends[subtask] = timeline.end(device, position)
        held_from_to = [
            (
                starts[each],
                ends[each._replace(kind=problem.models[each.model].kinds[-1])],
                problem.models[each.model].activation[each.stage],
            )
            for each in row
            if each.kind == "F"
        ]
        peak = max(
            (
                sum(size for first, last, size in held_from_to if first <= now < last)
                for now, _, _ in held_from_to
            ),
            default=0.0,
        )
        assert timeline.peak_activation[device] == pytest.approx(peak)


def test_times_of_a_small_pipeline() -> None:
    problem = replace(ONE_STAGE_PER_DEVICE, p2p=0.5)
    order = parse_order(problem, rows("a0F0 a0F1 a0B0 a0B1\na0F0 a0B0 a0F1 a0B1"))
    timeline = evaluate(problem, order)
    assert timeline.start == [[0, 1, 5, 8], [1.5, 2.5, 4.5, 5.5]]
    assert timeline.makespan == 10
    assert timeline.peak_activation == [2, 1]
    assert timeline.bubble_fraction() == pytest.approx(1 - 12 / 20)


def test_interleaved_tokens_stand_for_stages_in_turn() -> None:
    """The same token twice: F goes up the stages, B comes down; no transfer within a device."""
    problem = replace(TWICE_ON_ONE_DEVICE, p2p=9.0)
    order = parse_order(problem, rows("a0F0 a0F0 a0B0 a0B0"))
    assert [subtask.stage for subtask in order[0]] == [0, 1, 1, 0]
    assert evaluate(problem, order).makespan == 6


def test_w_holds_the_activation() -> None:
    late = evaluate(SPLIT, parse_order(SPLIT, rows("a0F0 a0B0 a0F1 a0B1 a0W0 a0W1")))
    early = evaluate(SPLIT, parse_order(SPLIT, rows("a0F0 a0B0 a0W0 a0F1 a0B1 a0W1")))
    assert (late.peak_activation, early.peak_activation) == ([2], [1])
    assert late.start == [[0, 1, 2.5, 3.5, 5, 5.5]]
    assert late.makespan == early.makespan == 6


def test_w_of_interleaved_stages_comes_down_too() -> None:
    problem = Problem(1, (model(((0, 0),), micro_batches=1, weight_gradient=0.5),))
    order = parse_order(problem, rows("a0F0 a0F0 a0B0 a0B0 a0W0 a0W0"))
    assert [subtask.stage for subtask in order[0]] == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize(
    ("problem", "text", "device", "position", "message"),
    [
        (ONE_STAGE_PER_DEVICE, "a0F0 x\n", 0, 1, "not a token"),
        (ONE_STAGE_PER_DEVICE, "a0F0 a0F01\n", 0, 1, "not a token"),
        (ONE_STAGE_PER_DEVICE, "A0F0\n", 0, 0, "not a token"),
        (ONE_STAGE_PER_DEVICE, "a0F1\u0663\n", 0, 0, "not a token"),
        (ONE_STAGE_PER_DEVICE, "a\u0661F0\n", 0, 0, "not a token"),
        (ONE_STAGE_PER_DEVICE, "b0F0\n", 0, 0, "no such model"),
        (ONE_STAGE_PER_DEVICE, "a0F0 a0W0\n", 0, 1, "no such kind W in model a"),
        (ONE_STAGE_PER_DEVICE, "a1F0\n", 0, 0, "no stage on the device"),
        (ONE_STAGE_PER_DEVICE, "a0F2\n", 0, 0, "no such micro-batch"),
        (ONE_STAGE_PER_DEVICE, "a0F0 a0F0\n", 0, 1, "more than once"),
        (TWICE_ON_ONE_DEVICE, "a0F0 a0F0 a0F0", 0, 2, "more than 2 times"),
        (ONE_STAGE_PER_DEVICE, "a0F0 a0F1 a0B0\n", 0, None, "a0B1 is missing"),
        (ONE_STAGE_PER_DEVICE, "a0F0 a0F1 a0B0 a0B1\na0F0", 1, None, "a0F1 is missing"),
        (TWICE_ON_ONE_DEVICE, "a0F0 a0F0 a0B0", 0, None, "a0B0 is missing"),
        (SPLIT, "a0F0 a0B0 a0F1 a0B1 a0W1", 0, None, "a0W0 is missing"),
    ],
)
def test_errors_name_the_place(
    problem: Problem, text: str, device: int, position: int | None, message: str
) -> None:
    order = rows(text)
    order += [[] for _ in range(problem.devices - len(order))]
    with pytest.raises(OrderError, match=message) as caught:
        parse_order(problem, order)
    assert (caught.value.device, caught.value.position) == (device, position)
    assert str(caught.value).startswith(f"device {device}")
    assert "\n" not in str(caught.value)
    if position is not None:
        assert f"position {position} ({order[device][position]})" in str(caught.value)
        assert f"[{order[device][position]}]" in caught.value.grid


def test_the_number_of_rows_must_be_that_of_the_devices() -> None:
    with pytest.raises(ScheduleError, match="1 rows, but the problem has 2 devices"):
        parse_order(ONE_STAGE_PER_DEVICE, [[]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (3, "order: want a list of tokens per device, got 3"),
        ("ab", "order: want a list of tokens per device, got 'ab'"),
        ({"a": 1, "b": 2}, "order: want a list of tokens per device, got dict"),
        ([[], None], "order: device 1: want a list of tokens, got None"),
        ([["a0F0"], "a0F0"], "order: device 1: want a list of tokens, got 'a0F0'"),
        ([[], {"a0F0": 1}], "order: device 1: want a list of tokens, got dict"),
        ([["a0F0", None], [7]], "device 0, position 1 (None): not a token"),
        ([[["a0F0"]], []], "device 0, position 0 (list): not a token"),
        ([[10**5000], []], "device 0, position 0 (a number of thousands of digits): not a token"),
    ],
)
def test_what_is_no_list_of_token_lists_is_refused(rows: Any, message: str) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_order(ONE_STAGE_PER_DEVICE, rows)
    assert str(caught.value).startswith(message)


AWKWARD = ["", " ", "a0F0\n", "\r\x1b[31m", "\u2028", "\ud800", "x" * 10_000, "\n" * 10_000]


@pytest.mark.parametrize("token", AWKWARD)
def test_a_message_is_one_short_line_whatever_the_token(token: str) -> None:
    with pytest.raises(OrderError, match="not a token") as caught:
        parse_order(ONE_STAGE_PER_DEVICE, [["a0F0", token], [token]])
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 150
    assert len(caught.value.grid.splitlines()) == 3
    assert max(map(len, caught.value.grid.splitlines())) < 80
    assert caught.value.grid.replace("\n", "").isprintable()


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=8))
def test_anything_is_an_order_or_a_schedule_error_of_one_line(data: Any) -> None:
    with pytest.raises(ScheduleError) as caught:
        parse_order(ONE_STAGE_PER_DEVICE, data)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a0F0\na0\rF0\n", r"line 2 \(device 1\)"),
        ("a0F0\ra0B0\n", r"line 1 \(device 0\)"),
        ("\n\n" + "x" * 200_000, r"line 3 \(device 2\)"),
        ('a0F0\n"' + "a0F0\n" * 50_000, r"line \d+ \(device 1\)"),
    ],
)
def test_a_file_that_is_no_csv_is_refused_with_the_line(text: str, place: str) -> None:
    with pytest.raises(
        ScheduleError, match=f"order: {place}: want tokens between commas"
    ) as caught:
        order_from_csv(text)
    assert str(caught.value).isprintable()


@given(st.text(alphabet='a0F,"\r\n \x00') | st.text())
def test_any_text_is_rows_of_cells_or_a_schedule_error(text: str) -> None:
    try:
        assert all(cell.strip() == cell != "" for row in order_from_csv(text) for cell in row)
    except ScheduleError as error:
        assert str(error).startswith("order: line ")
        assert str(error).isprintable()


def test_lines_may_end_as_on_windows() -> None:
    assert order_from_csv("a0F0,a0B0\r\nb1F12\r\n") == [["a0F0", "a0B0"], ["b1F12"]]


def test_the_grid_shows_the_neighbourhood() -> None:
    order = [[f"a0F{i}" for i in range(20)], ["a0B7"]]
    grid = OrderError(order, 0, 10, "wrong").grid.splitlines()
    assert grid[0].split() == ["position", "6", "7", "8", "9", "10", "11", "12", "13", "14"]
    assert grid[1].startswith("> device 0")
    shown = grid[1].removeprefix("> device 0").split()
    assert shown == [f"[a0F{i}]" if i == 10 else f"a0F{i}" for i in range(6, 15)]
    assert grid[2].split() == ["device", "1"]


@given(st.data())
def test_the_grid_reaches_four_cells_and_devices_from_the_fault(data: st.DataObject) -> None:
    """Every cell is told apart by its token; nothing but the neighbourhood is drawn."""
    lengths = data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any))
    order = [[f"a{d}F{i}" for i in range(n)] for d, n in enumerate(lengths)]
    device = data.draw(st.sampled_from([d for d, n in enumerate(lengths) if n]))
    position = data.draw(st.integers(0, lengths[device] - 1))
    head, *body = OrderError(order, device, position, "wrong").grid.splitlines()
    rows = [d for d in range(len(order)) if abs(d - device) <= 4]
    longest = max(lengths[d] for d in rows)
    columns = [i for i in range(longest) if abs(i - position) <= 4]
    assert head.split() == ["position", *map(str, columns)]
    assert len(body) == len(rows)
    for d, line in zip(rows, body, strict=True):
        assert line.startswith(f"{'>' if d == device else ' '} device {d} ".rstrip())
        for i in columns:
            if i < lengths[d]:
                start = f"{head} ".index(f" {i} ")
                cell = f"[a{d}F{i}]" if (d, i) == (device, position) else f" a{d}F{i}"
                assert line[start:].startswith(cell)


@pytest.mark.parametrize(("device", "shown"), [(0, (0, 4)), (40, (36, 44)), (63, (59, 63))])
def test_the_grid_of_a_large_order_fits_a_terminal(device: int, shown: tuple[int, int]) -> None:
    order = [[f"c{k}{kind}{i}" for i in range(500) for kind in "FB" for k in (10, 11)]] * 64
    lines = OrderError(order, device, 1999, "wrong").grid.splitlines()
    assert lines[0].split() == ["position", *map(str, range(1995, 2000))]
    first, last = shown
    assert [int(line[9:12]) for line in lines[1:]] == list(range(first, last + 1))
    middle = OrderError(order, device, 1000, "wrong").grid.splitlines()
    assert middle[0].split() == ["position", *map(str, range(996, 1005))]
    assert max(map(len, lines + middle)) <= 120


def test_the_grid_of_a_row_at_fault_shows_its_beginning() -> None:
    grid = OrderError([["a0F0"], [f"a0F{i}" for i in range(9)]], 1, None, "wrong").grid
    assert [line.split() for line in grid.splitlines()] == [
        ["position", "0", "1", "2", "3", "4"],
        ["device", "0", "a0F0"],
        [">", "device", "1", *(f"a0F{i}" for i in range(5))],
    ]


@given(ordered(), st.data())
def test_any_change_of_a_token_is_refused(
    drawn: tuple[Problem, Order], data: st.DataObject
) -> None:
    problem, order = drawn
    tokens = order_to_tokens(order)
    device = data.draw(st.sampled_from([d for d, row in enumerate(tokens) if row]))
    position = data.draw(st.integers(0, len(tokens[device]) - 1))
    original = tokens[device][position]
    tokens[device][position] = data.draw(
        st.from_regex(r"[a-d][0-3][FBW][0-5]", fullmatch=True) | st.text(max_size=5)
    )
    if tokens[device][position] == original:
        assert parse_order(problem, tokens) == order
        return
    with pytest.raises(OrderError) as caught:
        parse_order(problem, tokens)
    assert caught.value.device == device


@pytest.mark.parametrize(
    ("problem", "text", "parts"),
    [
        (
            ONE_STAGE_PER_DEVICE,
            "a0F0 a0F1 a0B1 a0B0\na0F0 a0B0 a0B1 a0F1",
            ["a0B1 on device 1 waits for a0F1 on device 1, position 3"],
        ),
        (
            ONE_STAGE_PER_DEVICE,
            "a0F0 a0B0 a0F1 a0B1\na0F0 a0F1 a0B0 a0B1",
            [
                "a0B0 on device 0 waits for a0B0 on device 1, position 2",
                "a0F1 on device 1 waits for a0F1 on device 0, position 2",
            ],
        ),
        (
            SPLIT,
            "a0F0 a0W0 a0B0 a0F1 a0B1 a0W1",
            ["a0W0 on device 0 waits for a0B0 on device 0, position 2"],
        ),
    ],
)
def test_a_deadlock_names_who_waits_for_whom(problem: Problem, text: str, parts: list[str]) -> None:
    with pytest.raises(OrderError, match="a deadlock") as caught:
        evaluate(problem, parse_order(problem, rows(text)))
    for part in parts:
        assert part in str(caught.value)
    assert str(caught.value).count("waits for") == len(parts)
    device, position = caught.value.device, caught.value.position
    assert position is not None
    assert f"[{rows(text)[device][position]}]" in caught.value.grid


@given(ordered(), st.randoms(use_true_random=False))
def test_a_shuffled_order_is_executed_or_called_a_deadlock(
    drawn: tuple[Problem, Order], rng: Any
) -> None:
    """Against an independent answer: whether the graph of all that waits has a circle."""
    problem, order = drawn
    for row in order:
        rng.shuffle(row)
    left = [list(row) for row in order]
    done: set[Subtask] = set()
    while True:
        heads = [row for row in left if row and predecessor(problem, row[0]) in done | {None}]
        if not heads:
            break
        done.add(heads[0].pop(0))
    if any(left):
        with pytest.raises(OrderError, match="a deadlock"):
            evaluate(problem, order)
    else:
        assert evaluate(problem, order).makespan >= max(problem.work()) - TOLERANCE
