"""A user's Python function as a source of reward: `--reward-function package.module:name`."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from typing import Any

RewardFunction = Callable[..., float]


class RewardFunctionError(ValueError):
    """The function cannot be found, or returned something that is no finite number."""


def load_reward_function(path: str) -> RewardFunction:
    """Imports `package.module:name`; the module is looked up as Python does, PYTHONPATH included.

    Raises RewardFunctionError naming the flag where there is no such module or function.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as fault:
        # An import that fails inside the user's module is theirs to see in full.
        if fault.name is None or not f"{module_name}.".startswith(f"{fault.name}."):
            raise
        raise RewardFunctionError(
            f"--reward-function {path}: there is no module {fault.name}; put its folder on "
            "PYTHONPATH"
        ) from fault
    function = getattr(module, name, None)
    if not callable(function):
        raise RewardFunctionError(
            f"--reward-function {path}: {module_name} has no function {name!r}"
        )
    return function


def call_reward_function(
    function: RewardFunction, prompt: str, response: str, fields: Mapping[str, Any]
) -> float:
    """The score of one response.

    prompt: the text of the prompt as the actor read it; response: decoded without special tokens;
    fields: all other fields of the prompt's line. Raises RewardFunctionError unless the result is
    a finite number.
    """
    score = function(prompt=prompt, response=response, fields=dict(fields))
    try:
        value = float(score)
    except (TypeError, ValueError) as fault:
        raise RewardFunctionError(
            f"--reward-function returned {score!r} for prompt {prompt!r}: it must return a number"
        ) from fault
    if not math.isfinite(value):
        raise RewardFunctionError(
            f"--reward-function returned {value} for prompt {prompt!r}: it must be finite"
        )
    return value
