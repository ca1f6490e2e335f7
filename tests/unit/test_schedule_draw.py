"""Pictures of schedules: the trace, the figure and the page show what the timeline says."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.image import imread

from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.chrome_trace import chrome_trace
from megatron_rlhfuse.schedule.draw import MAX_ROWS, draw_timeline, save_figure
from megatron_rlhfuse.schedule.draw_html import draw_html
from megatron_rlhfuse.schedule.draw_numbers import (
    color,
    compare,
    memory_curve,
    shown_devices,
    worst_device,
)
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.order import parse_order
from megatron_rlhfuse.schedule.problem import Model, Problem
from tests.unit.schedule_strategies import executable_orders, problems

HOSTILE = "</script><script>alert('x')</script><!-- & \"$\\u"

PAIR = Problem(
    devices=2,
    models=(
        Model("actor", 2, (2.0, 2.0), (4.0, 4.0), (3.0, 3.0), ((0, 1),)),
        Model("critic", 2, (1.0, 1.0), (2.0, 2.0), (1.0, 1.0), ((1, 0),)),
    ),
    memory_limit=(8.0, 9.0),
)
# Device 1 runs the critic's forwards in the bubble before the actor arrives.
FUSED = [
    ["a0F0", "a0F1", "b0F0", "b0B0", "b0F1", "b0B1", "a0B0", "a0B1"],
    ["b0F0", "b0F1", "a0F0", "a0B0", "b0B0", "a0F1", "a0B1", "b0B1"],
]


def pair(problem: Problem = PAIR) -> list[tuple[str, Timeline]]:
    """The 1F1B schedule and a fused one."""
    return [
        ("back-to-back 1F1B", evaluate(problem, one_f_one_b(problem))),
        ("fused", evaluate(problem, parse_order(problem, FUSED))),
    ]


def wide(devices: int) -> Problem:
    """One model with a stage on each of many devices."""
    ones = (1.0,) * devices
    return Problem(devices, (Model("actor", 2, ones, ones, ones, (tuple(range(devices)),)),))


@st.composite
def timelines(draw: st.DrawFn, **kinds: Any) -> Timeline:
    problem = draw(problems(**kinds))
    return evaluate(problem, draw(executable_orders(problem)))


def titles(axes: Axes) -> str:
    return f"{axes.get_title('left')} | {axes.get_title('right')}"


def polygons(axes: Axes) -> PolyCollection:
    """The subtasks: the collection with as many colours as polygons."""
    return max(
        (each for each in axes.collections if isinstance(each, PolyCollection)),
        key=lambda each: len(each.get_facecolor()),
    )


def texts(figure: Figure) -> list[str]:
    legends = [axes.get_legend() for axes in figure.axes]
    in_legends = [text for legend in legends if legend for text in legend.get_texts()]
    return [text.get_text() for text in [*in_legends, *(t for a in figure.axes for t in a.texts)]]


def page_data(page: str) -> dict[str, Any]:
    found = re.search(r"<script type='application/json' id='data'>(.*?)</script>", page)
    assert found is not None
    return json.loads(found[1])


@given(timelines(integer_times=False))
def test_memory_curve_ends_empty_and_reaches_the_peak(timeline: Timeline) -> None:
    for device in range(timeline.problem.devices):
        curve = memory_curve(timeline, device)
        times = [time for time, _ in curve]
        assert times == sorted(set(times))
        assert times[0] == 0.0
        assert curve[-1][1] == 0.0
        assert max(value for _, value in curve) == timeline.peak_activation[device]


def test_memory_curve_of_a_schedule_worked_out_by_hand() -> None:
    ones = (1.0,)
    problem = Problem(1, (Model("m", 2, (2.0,), (3.0,), (5.0,), ((0,),), weight_gradient=ones),))
    order = parse_order(problem, [["a0F0", "a0F1", "a0B0", "a0W0", "a0B1", "a0W1"]])
    # F 0-2 and 2-4, B 4-6, W 6-7, B 7-9, W 9-10: W frees.
    assert memory_curve(evaluate(problem, order), 0) == [(0, 5), (2, 10), (7, 5), (10, 0)]


@given(timelines(integer_times=False), st.sampled_from([1e-3, 1.0, 0.37]))
def test_trace_holds_every_subtask_at_its_time(timeline: Timeline, unit_s: float) -> None:
    trace = json.loads(json.dumps(chrome_trace(timeline, unit_s), allow_nan=False))
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    by_thread: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for span in spans:
        by_thread[span["tid"]].append(span)
    for device, row in enumerate(timeline.order):
        assert [span["name"] for span in by_thread[device]] == [subtask.token for subtask in row]
        ends = [0.0]
        for position, (span, subtask) in enumerate(zip(by_thread[device], row, strict=True)):
            model = timeline.problem.models[subtask.model]
            seconds = model.duration(subtask.kind, subtask.stage) * unit_s
            assert span["dur"] == pytest.approx(seconds * 1e6, abs=2e-3)  # rounded to nanoseconds
            start_us = timeline.start[device][position] * unit_s * 1e6
            assert span["ts"] == pytest.approx(start_us, abs=1e-3)
            assert round(span["ts"] * 1e3) >= ends[-1]
            ends.append(round((span["ts"] + span["dur"]) * 1e3))
            assert span["args"]["micro_batch"] == subtask.micro_batch
            assert span["args"]["stage"] == subtask.stage


@given(timelines())
def test_trace_counts_memory_per_device_and_ends_at_zero(timeline: Timeline) -> None:
    counters: dict[str, list[float]] = defaultdict(list)
    for event in chrome_trace(timeline)["traceEvents"]:
        if event["ph"] == "C":
            counters[event["name"]].append(event["args"]["value"])
    assert len(counters) == timeline.problem.devices
    for device, peak in enumerate(timeline.peak_activation):
        values = counters[f"device {device}: activation memory"]
        assert values[-1] == 0.0
        assert max(values) == peak


def test_trace_is_named_and_sorted() -> None:
    trace = chrome_trace(pair()[1][1])
    events = trace["traceEvents"]
    timed = [event for event in events if event["ph"] != "M"]
    assert events[len(events) - len(timed) :] == timed
    assert [event["ts"] for event in timed] == sorted(event["ts"] for event in timed)
    threads = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert threads == {0: "device 0", 1: "device 1"}
    first = next(event for event in timed if event["name"] == "b0F0")
    assert first["args"] == {
        "token": "b0F0",
        "model": "critic",
        "kind": "forward",
        "micro_batch": 0,
        "pipeline": 0,
        "stage": 0,
    }
    with pytest.raises(ScheduleError, match="seconds_per_unit"):
        chrome_trace(pair()[1][1], 0.0)


def test_numbers_compare_with_the_first_schedule_and_the_bound() -> None:
    drawn = pair()
    first, fused = compare(drawn, 16.0)
    assert first.speedup is None
    assert fused.makespan == drawn[1][1].makespan == 20.0
    assert fused.speedup == pytest.approx(drawn[0][1].makespan / 20.0)
    assert fused.gap == pytest.approx(20.0 / 16.0 - 1)
    assert fused.bubbles == pytest.approx(1 - 18.0 / 20.0)  # 18 of work on either device
    assert fused.peak == max(drawn[1][1].peak_activation)
    assert compare(drawn, None)[1].gap is None


def test_figure_has_a_panel_per_schedule_and_one_of_memory() -> None:
    drawn = pair()
    figure = draw_timeline(drawn, 16.0)
    top, bottom, memory = figure.axes
    base = drawn[0][1]
    assert titles(top).startswith(f"back-to-back 1F1B | makespan {base.makespan:g} ")
    assert f"bubbles {base.bubble_fraction():.1%}" in titles(top)
    speedup = base.makespan / 20.0
    assert titles(bottom).startswith("fused | makespan 20 ")
    assert f"{speedup:.2f}\u00d7 as fast as back-to-back 1F1B" in titles(bottom)
    assert "bubbles 10.0%" in titles(bottom)
    assert f"peak memory {max(drawn[1][1].peak_activation):g}" in titles(bottom)
    assert "25.0% above the lower bound" in titles(bottom)
    assert figure.get_suptitle() == "One training step of actor and critic on 2 devices"
    assert "lower bound 16" in texts(figure)
    assert {"forward, actor", "backward, critic"} <= set(texts(figure))
    assert memory.get_ylabel() == "activation memory"
    limits = {axes.get_xlim() for axes in figure.axes}
    assert limits == {(0.0, max(20.0, base.makespan))}


def test_figure_draws_each_subtask_in_its_place_and_colour() -> None:
    _, (_, timeline) = pair()
    figure = draw_timeline([("fused", timeline)], None)
    boxes = polygons(figure.axes[0])
    expected = [
        (timeline.start[device][i], timeline.end(device, i), device, color(s.model, s.kind))
        for device, row in enumerate(timeline.order)
        for i, s in enumerate(row)
    ]
    paths, fills = boxes.get_paths(), boxes.get_facecolor()
    assert len(paths) == len(fills) == len(expected) == PAIR.subtasks
    for path, fill, (start, end, device, want) in zip(paths, fills, expected, strict=True):
        (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
        assert (left, right) == (start, end)
        assert round((low + high) / 2) == device
        assert [round(255 * part) for part in fill[:3]] == list(bytes.fromhex(want[1:]))
    numbers = [text.get_text() for text in figure.axes[0].texts]
    assert sorted(numbers) == sorted(["0", "1"] * (PAIR.subtasks // 2))


def test_figure_shows_the_device_nearest_to_its_limit() -> None:
    _, (_, timeline) = pair()
    assert timeline.peak_activation == [7.0, 5.0]
    assert worst_device(timeline) == 0
    tight = replace(timeline, problem=replace(PAIR, memory_limit=(20.0, 6.0)))
    assert worst_device(tight) == 1
    shown = texts(draw_timeline([("fused", tight)], None))
    assert "device 1, closest to its limit" in shown
    assert "its limit, 6" in shown
    unlimited = replace(timeline, problem=replace(PAIR, memory_limit=()))
    assert "device 0, the fullest" in texts(draw_timeline([("fused", unlimited)], None))


def test_figure_of_many_devices_is_bounded_and_says_so() -> None:
    problem = wide(MAX_ROWS + 16)
    figure = draw_timeline([("1F1B", evaluate(problem, one_f_one_b(problem)))], None)
    assert len(polygons(figure.axes[0]).get_paths()) == MAX_ROWS * 4
    assert "16 more devices are not shown" in figure.axes[-1].get_xlabel()
    assert figure.get_figheight() < 10


def test_devices_shown_fit_the_boxes() -> None:
    problem = wide(4)  # four subtasks a device
    drawn = [("1F1B", evaluate(problem, one_f_one_b(problem)))]
    assert [shown_devices(drawn, 48, most) for most in (1, 4, 7, 8, 99)] == [1, 1, 1, 2, 4]
    assert shown_devices(drawn, 3, 99) == 3


@settings(max_examples=10, deadline=None)
@given(timelines(max_devices=3, memory_limit=True))
def test_any_schedule_can_be_drawn(timeline: Timeline) -> None:
    figure = draw_timeline([("plan", timeline)], None)
    assert len(polygons(figure.axes[0]).get_paths()) == timeline.problem.subtasks
    assert page_data(draw_html([("plan", timeline)], None))["worst"] == worst_device(timeline)


def test_pictures_are_saved_as_their_suffix_says(tmp_path: Path) -> None:
    figure = draw_timeline(pair(), 16.0)
    save_figure(figure, tmp_path / "plan.svg")
    save_figure(figure, tmp_path / "plan.png")
    height, width, _ = imread(tmp_path / "plan.png").shape
    assert width == 1800
    assert 500 < height < 1500
    assert ElementTree.parse(tmp_path / "plan.svg").getroot().tag.endswith("svg")
    save_figure(draw_timeline(pair(), 16.0), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "plan.svg").read_bytes()
    with pytest.raises(ScheduleError, match=r"plan\.pdf"):
        save_figure(figure, tmp_path / "plan.pdf")


@pytest.mark.parametrize("name", [HOSTILE, "$a^$", "_hidden", "line\nbreak\x00", "\ud800", ""])
def test_names_are_shown_as_they_are(name: str, tmp_path: Path) -> None:
    actor, critic = PAIR.models
    drawn = pair(replace(PAIR, models=(replace(actor, name=name), critic)))
    save_figure(draw_timeline(drawn, None), tmp_path / "plan.svg")
    ElementTree.parse(tmp_path / "plan.svg")
    page = draw_html(drawn, None)
    page.encode()
    data = page_data(page)
    shown = data["models"][0]["name"]
    assert html.escape(f"forward, {shown}") in page
    cleaned = "".join(letter if letter.isprintable() else " " for letter in name) or "a"
    assert cleaned.startswith(shown.removesuffix("…"))
    assert page.count("<script") == page.count("</script>") == 2
    assert "<!--" not in page
    assert HOSTILE not in page


def test_page_holds_the_numbers_and_every_subtask() -> None:
    drawn = pair()
    page = draw_html(drawn, 16.0)
    cells = re.findall(r"<td>(.*?)</td>", page)
    base = drawn[0][1]
    assert cells[:3] == ["back-to-back 1F1B", f"{base.makespan:g}", "\u2013"]
    speedup = f"{base.makespan / 20.0:.2f}\u00d7"
    assert cells[6:12] == ["fused", "20", speedup, "10.0%", "25.0%", "7"]
    assert cells[12:14] == ["lower bound", "16"]
    assert f"fused takes 20 where back-to-back 1F1B takes {base.makespan:g}." in page
    data = page_data(page)
    for schedule, (_, timeline) in zip(data["schedules"], drawn, strict=True):
        assert schedule["makespan"] == timeline.makespan
        for device, row in enumerate(schedule["rows"]):
            assert [box[0] for box in row] == [each.token for each in timeline.order[device]]
            assert [box[4] for box in row] == timeline.start[device]
    assert data["bound"] == 16.0
    assert data["limits"] == {"0": 8.0, "1": 9.0}


def test_page_asks_no_network_for_anything() -> None:
    page = draw_html(pair(), 16.0)
    assert "default-src 'none'" in page
    assert not re.search(r"https?:|src=|href=|url\(|@import|fetch\(", page)


def test_nothing_to_draw_is_an_error() -> None:
    for draw in (draw_timeline, draw_html):
        with pytest.raises(ScheduleError, match="at least one schedule"):
            draw([], None)
