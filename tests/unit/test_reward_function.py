"""A user's reward function: found by its path, called with names, its result checked."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_rlhfuse.inference.reward_function import (
    RewardFunctionError,
    call_reward_function,
    load_reward_function,
)

MODULE = """
def length(prompt, response, fields):
    return len(response) - fields.get("wanted", 0)

notice = "not a function"
"""


@pytest.fixture
def write_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a module where Python looks; it is forgotten after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def write(name: str, text: str) -> None:
        path = tmp_path / (name.replace(".", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    yield write  # type: ignore[misc]
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_a_function_is_found_in_a_module_of_a_package(write_module: Callable) -> None:
    write_module("my_rewards.rules", MODULE)
    function = load_reward_function("my_rewards.rules:length")
    assert call_reward_function(function, "p", "four", {"wanted": 1}) == 3.0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_package.rules:f", "no module no_such_package; put its folder on PYTHONPATH"),
        ("my_rewards.nothing:f", "no module my_rewards.nothing"),
        ("my_rewards.rules:absent", "my_rewards.rules has no function 'absent'"),
        ("my_rewards.rules:notice", "my_rewards.rules has no function 'notice'"),
    ],
)
def test_what_is_not_there_is_named_with_the_flag(
    write_module: Callable, path: str, message: str
) -> None:
    write_module("my_rewards.rules", MODULE)
    with pytest.raises(RewardFunctionError) as error:
        load_reward_function(path)
    assert f"--reward-function {path}" in str(error.value) and message in str(error.value)


def test_a_failing_import_inside_the_module_is_the_users_to_see(write_module: Callable) -> None:
    write_module("broken_rewards", "import broken_rewar")  # a name that begins like its own
    with pytest.raises(ModuleNotFoundError, match="No module named 'broken_rewar'"):
        load_reward_function("broken_rewards:f")


def test_it_is_called_by_name_with_a_copy_of_the_fields() -> None:
    seen = {}

    def function(*, prompt: str, response: str, fields: dict) -> float:
        seen.update(prompt=prompt, response=response, fields=dict(fields))
        fields["answer"] = "changed"
        return 1.5

    fields = {"answer": "42"}
    assert call_reward_function(function, "2 x 21?", "42", fields) == 1.5
    assert seen == {"prompt": "2 x 21?", "response": "42", "fields": {"answer": "42"}}
    assert fields == {"answer": "42"}


@pytest.mark.parametrize(("result", "number"), [(True, 1.0), (3, 3.0), (torch.tensor(0.5), 0.5)])
def test_anything_that_is_a_number_counts(result: object, number: float) -> None:
    assert call_reward_function(lambda **_: result, "p", "r", {}) == number  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("result", [None, "good", [1.0]])
def test_a_result_that_is_no_number_is_refused(result: object) -> None:
    with pytest.raises(RewardFunctionError, match=r"--reward-function returned .* prompt 'why\?'"):
        call_reward_function(lambda **_: result, "why?", "r", {})  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize("result", [float("nan"), float("inf"), -float("inf")])
def test_a_result_that_is_not_finite_is_refused(result: float) -> None:
    with pytest.raises(RewardFunctionError, match=r"prompt 'why\?': it must be finite"):
        call_reward_function(lambda **_: result, "why?", "r", {})


def test_an_error_of_the_function_itself_passes_through() -> None:
    def function(**_: object) -> float:
        raise KeyError("answer")

    with pytest.raises(KeyError, match="answer"):
        call_reward_function(function, "p", "r", {})
