"""The fusion problem's JSON: round trips, and an error that names the field for anything else."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.errors import ProblemError
from megatron_rlhfuse.schedule.problem import (
    MAX_SUBTASKS,
    Model,
    Problem,
    load_json,
    load_problem,
    parse_problem,
    problem_to_json,
)
from tests.unit.schedule_strategies import problems

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "problems").glob("published-*.json"))

VALID: dict[str, Any] = {
    "devices": 3,
    "p2p": 0.5,
    "memory_limit": [4, None, 8],
    "models": [
        {
            "name": "actor",
            "micro_batches": 4,
            "forward": [1, 2],
            "backward": 4,
            "weight_gradient": 2,
            "activation": 1.5,
            "pipelines": [[0, 1], [2, 1]],
        },
        {"micro_batches": 1, "forward": 1, "backward": 2, "activation": 0, "pipelines": [[2]]},
    ],
}

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([*VALID, *VALID["models"][0]]) | st.text(max_size=3), inner, max_size=5
        )
    ),
    max_leaves=12,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a JSON value, its own included."""
    inside = value.items() if isinstance(value, dict) else enumerate(value)
    found = [path]
    if isinstance(value, dict | list):
        for key, item in inside:
            found += places(item, (*path, key)) if isinstance(item, dict | list) else [(*path, key)]
    return found


def changed(path: tuple[Any, ...], value: Any) -> Any:
    """VALID with another value at `path`."""
    if not path:
        return value
    data = copy.deepcopy(VALID)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return data


def without(*path: Any) -> Any:
    data = copy.deepcopy(VALID)
    holder = data
    for key in path[:-1]:
        holder = holder[key]
    del holder[path[-1]]
    return data


def assert_meaningful(problem: Problem) -> None:
    """The invariants in the header of problem.py."""
    assert len(problem.memory_limit) == problem.devices
    assert all(limit >= 0 for limit in problem.memory_limit)
    assert problem.p2p >= 0
    for model in problem.models:
        per_stage = [model.forward, model.backward, model.activation]
        per_stage += [model.weight_gradient] if model.weight_gradient else []
        assert all(len(values) == model.stages for values in per_stage)
        assert all(len(pipeline) == model.stages for pipeline in model.pipelines)
        assert all(0 <= d < problem.devices for pipeline in model.pipelines for d in pipeline)
        assert all(map(math.isfinite, model.activation))
        for stage in range(model.stages):
            durations = [model.duration(kind, stage) for kind in model.kinds]
            assert all(0 < duration < math.inf for duration in durations)
            once = model.forward[stage] + model.backward[stage]
            assert math.isclose(sum(durations), once)


@given(problems(memory_limit=True, integer_times=False))
def test_json_round_trip(problem: Problem) -> None:
    assert parse_problem(json.loads(json.dumps(problem_to_json(problem)))) == problem
    assert_meaningful(problem)  # what the other tests draw is what a file can hold


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_come_back_as_they_were(path: Path) -> None:
    assert problem_to_json(load_problem(path)) == json.loads(path.read_text())


def test_every_field_is_read() -> None:
    problem = parse_problem(VALID)
    assert problem == Problem(
        devices=3,
        p2p=0.5,
        memory_limit=(4.0, math.inf, 8.0),
        models=(
            Model("actor", 4, (1, 2), (4, 4), (1.5, 1.5), ((0, 1), (2, 1)), (2, 2)),
            Model("", 1, (1,), (2,), (0,), ((2,),)),
        ),
    )
    assert problem.subtasks == 2 * 2 * 4 * 3 + 2
    assert problem.work() == [4 * 5, 2 * 4 * 6, 4 * 5 + 3]


def test_what_may_be_left_out() -> None:
    data = {key: VALID[key] for key in ("devices", "models")}
    assert parse_problem(data) == parse_problem({**data, "p2p": None, "memory_limit": None})
    assert parse_problem(data).memory_limit == (math.inf,) * 3
    assert parse_problem({**data, "memory_limit": 7}).memory_limit == (7, 7, 7)


@given(json_values)
def test_any_json_is_a_problem_or_a_problem_error(data: Any) -> None:
    try:
        assert_meaningful(parse_problem(data))
    except ProblemError as error:
        assert str(error).startswith(f"{error.field}: ")
        assert str(error).isprintable()


@given(st.sampled_from(places(VALID)), json_values)
def test_any_change_is_a_problem_or_names_the_field(path: tuple[Any, ...], value: Any) -> None:
    try:
        assert_meaningful(parse_problem(changed(path, value)))
    except ProblemError as error:
        assert str(error).startswith(f"{error.field}: ")
        if path:
            # Fewer devices show in the fields that want one value per device or name one.
            wide = ("devices", "memory_limit", "models")
            assert error.field.startswith(wide if path[0] == "devices" else path[0])


@given(st.binary(max_size=20) | json_values.map(lambda data: json.dumps(data).encode()))
def test_any_file_is_a_problem_or_a_problem_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "problem.json"
    path.write_bytes(content)
    try:
        assert_meaningful(load_problem(path))
    except ProblemError as error:
        assert str(error).startswith(f"{error.field}: ")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5_000])
def test_a_file_without_json_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "problem.json"
    path.write_bytes(content)
    with pytest.raises(ProblemError, match=r"problem\.json: not JSON: ") as caught:
        load_problem(path)
    assert "\n" not in str(caught.value)


MODEL = "models", 0


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ([], "problem"),
        (changed(("models", 0), 3), "models[0]"),
        (without("devices"), "devices"),
        (without("models"), "models"),
        (without(*MODEL, "forward"), "models[0].forward"),
        (without(*MODEL, "pipelines"), "models[0].pipelines"),
        ({**VALID, "device": 3}, "device"),
        (changed((*MODEL, "microbatches"), 4), "models[0].microbatches"),
        (changed(("devices",), 0), "devices"),
        (changed(("devices",), True), "devices"),
        (changed(("devices",), 3.0), "devices"),
        (changed(("devices",), 2), "models[0].pipelines[1][0]"),
        (changed(("p2p",), -1), "p2p"),
        (changed(("p2p",), math.nan), "p2p"),
        (changed(("memory_limit",), [1, 2]), "memory_limit"),
        (changed(("memory_limit", 1), -1), "memory_limit[1]"),
        (changed(("memory_limit",), "8"), "memory_limit"),
        (changed(("models",), []), "models"),
        (changed(("models",), [VALID["models"][1]] * 27), "models"),
        (changed((*MODEL, "name"), 1), "models[0].name"),
        (changed((*MODEL, "micro_batches"), 0), "models[0].micro_batches"),
        (changed((*MODEL, "micro_batches"), MAX_SUBTASKS), "models"),
        (changed((*MODEL, "forward"), 0), "models[0].forward"),
        (changed((*MODEL, "forward"), [1, 2, 3]), "models[0].forward"),
        (changed((*MODEL, "forward"), [1, None]), "models[0].forward[1]"),
        (changed((*MODEL, "backward"), True), "models[0].backward"),
        (changed((*MODEL, "backward"), math.inf), "models[0].backward"),
        (changed((*MODEL, "backward"), 10**400), "models[0].backward"),
        (changed((*MODEL, "activation"), -0.5), "models[0].activation"),
        (changed((*MODEL, "weight_gradient"), 4), "models[0].weight_gradient"),
        (changed((*MODEL, "weight_gradient"), 0), "models[0].weight_gradient"),
        (changed((*MODEL, "pipelines"), []), "models[0].pipelines"),
        (changed((*MODEL, "pipelines", 1), []), "models[0].pipelines[1]"),
        (changed((*MODEL, "pipelines", 1), [0]), "models[0].pipelines[1]"),
        (changed((*MODEL, "pipelines", 1), [0, 3]), "models[0].pipelines[1][1]"),
        (changed((*MODEL, "pipelines", 1), [0, -1]), "models[0].pipelines[1][1]"),
        (changed(("models", 1, "pipelines"), [2]), "models[1].pipelines[0]"),
    ],
)
def test_the_field_at_fault_is_named(data: Any, field: str) -> None:
    with pytest.raises(ProblemError) as caught:
        parse_problem(data)
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert "\n" not in str(caught.value)


def test_a_misspelt_field_is_told_what_there_is() -> None:
    with pytest.raises(ProblemError, match="there are devices, memory_limit, models, p2p"):
        parse_problem({**VALID, "device": 3})


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ("", "''"),
        (" ", "' '"),
        (" devices", "' devices'"),
        ("p2p\n", r"'p2p\n'"),
        ("\x1b[31m", r"'\x1b[31m'"),
        ("\u2028\ud800", r"'\u2028\ud800'"),
        ("x" * 10_000, f"'{'x' * 36}..."),
        ("\n" * 10_000, f"'{chr(92)}n"),
        (3, "3"),
    ],
)
def test_an_unknown_field_is_named_in_a_short_line(field: Any, shown: str) -> None:
    for place, data in (("", {**VALID}), ("models[0].", {**VALID["models"][0]})):
        data[field] = 1
        with pytest.raises(ProblemError, match="unknown field") as caught:
            parse_problem(changed(MODEL, data) if place else data)
        assert caught.value.field.startswith(f"{place}{shown}")
        assert str(caught.value).startswith(f"{caught.value.field}: ")
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "value",
    ["\n" * 10_000, "\x1b\u2028", 10**5000, {"\n": 1}],
    ids=["long", "unprintable", "huge", "object"],
)
@pytest.mark.parametrize("path", [("devices",), ("p2p",), (*MODEL, "forward", 0)])
def test_a_value_at_fault_is_shown_in_a_short_line(path: tuple[Any, ...], value: Any) -> None:
    with pytest.raises(ProblemError, match="got ") as caught:
        parse_problem(changed(path, value))
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 150


def test_a_file_whose_name_breaks_lines_is_named_in_one(tmp_path: Path) -> None:
    path = tmp_path / "a\nb.json"
    path.write_text("{")
    with pytest.raises(ProblemError, match=r"a\\nb\.json: not JSON") as caught:
        load_problem(path)
    assert str(caught.value).startswith(f"{caught.value.field}: ")
    assert str(caught.value).isprintable()


def test_a_field_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "problem.json"
    path.write_text('{"devices": 4, "devices": 8, "models": []}')
    with pytest.raises(ProblemError, match="devices: stands twice") as caught:
        load_json(path)
    assert caught.value.field == str(path)
