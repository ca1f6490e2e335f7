"""The fusion problem: models whose pipelines share devices; its JSON form and its validation.

Invariants of a `Problem` that was made by `parse_problem`:
- every per-stage tuple of a model has one entry per stage, and all its pipelines that many devices;
- durations are positive and finite, activations not negative, device numbers within range;
- `memory_limit` has one entry per device, `math.inf` where there is none.

Times are in whatever unit the user likes, all in the same one; so are activations.
Source: RLHFuse (NSDI '25), section 5, generalised to any number of models and to times per stage.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlhfuse.schedule.errors import ProblemError, show_name
from megatron_rlhfuse.schedule.fields import Fields, is_whole, show

LETTERS = "abcdefghijklmnopqrstuvwxyz"
"""Tokens name a model by its letter, so a problem holds at most 26 models."""

MAX_SUBTASKS = 4_000_000
"""Larger problems are refused: a plan of one would take gigabytes, and a typo is likelier."""


@dataclass(frozen=True)
class Model:
    """One model: what a micro-batch costs on each stage, and where the stages are.

    Attributes:
        name: for people and pictures
        micro_batches: micro-batches that each pipeline runs
        forward, backward: time per micro-batch and stage, [stages]
        activation: memory a micro-batch holds on a stage from the start of its forward to the end
            of its backward, [stages]
        pipelines: the device of each stage, [pipelines][stages]; several are data-parallel copies
        weight_gradient: the part of `backward` that computes weight gradients and can be run later
            as a subtask W of its own, [stages]; None leaves the backward whole. The activation is
            then held until W ends
    """

    name: str
    micro_batches: int
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    activation: tuple[float, ...]
    pipelines: tuple[tuple[int, ...], ...]
    weight_gradient: tuple[float, ...] | None = None

    @property
    def stages(self) -> int:
        return len(self.forward)

    def duration(self, kind: str, stage: int) -> float:
        """Time of one subtask of kind F, B or W on a stage."""
        if kind == "F":
            return self.forward[stage]
        weight = self.weight_gradient[stage] if self.weight_gradient is not None else 0.0
        return weight if kind == "W" else self.backward[stage] - weight

    @property
    def kinds(self) -> str:
        return "FB" if self.weight_gradient is None else "FBW"


@dataclass(frozen=True)
class Problem:
    """Models on `devices` devices; `p2p` is the transfer time between stages on two devices."""

    devices: int
    models: tuple[Model, ...]
    p2p: float = 0.0
    memory_limit: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.memory_limit:
            object.__setattr__(self, "memory_limit", (math.inf,) * self.devices)

    @property
    def subtasks(self) -> int:
        return sum(
            len(model.pipelines) * model.stages * model.micro_batches * len(model.kinds)
            for model in self.models
        )

    def work(self) -> list[float]:
        """Busy time of every device, [devices]."""
        terms: list[list[float]] = [[] for _ in range(self.devices)]
        for model in self.models:
            for pipeline in model.pipelines:
                for stage, device in enumerate(pipeline):
                    once = model.forward[stage] + model.backward[stage]
                    terms[device].append(once * model.micro_batches)
        return [math.fsum(parts) for parts in terms]


def load_problem(path: Path | str) -> Problem:
    """Reads a problem. Raises ProblemError naming the field, OSError if there is no such file."""
    return parse_problem(load_json(path))


def load_json(path: Path | str) -> Any:
    """The JSON of a file. Raises ProblemError for a file that holds none."""
    try:
        return json.loads(Path(path).read_bytes(), object_pairs_hook=_without_doubles)
    except ProblemError as error:
        raise ProblemError(str(path), str(error)) from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise ProblemError(str(path), f"not JSON: {reason}") from error


def parse_problem(data: Any) -> Problem:
    """A problem from its JSON form (the contract is in docs/planner.md).

    Raises ProblemError naming the field.
    """
    fields = Fields(data, "", {"devices", "models"}, {"p2p", "memory_limit"}, what="problem")
    devices = fields.count("devices")
    p2p = fields.number("p2p", lowest=0.0) if fields.get("p2p") is not None else 0.0
    listed = fields.get("models")
    if not isinstance(listed, list) or not 1 <= len(listed) <= len(LETTERS):
        raise ProblemError("models", f"want a list of 1 to {len(LETTERS)} models")
    models = tuple(_parse_model(item, f"models[{i}]", devices) for i, item in enumerate(listed))
    limit = fields.get("memory_limit")
    limits = (math.inf,) * devices
    if limit is not None:
        limits = fields.numbers("memory_limit", devices, "device", lowest=0.0, nullable=True)
    problem = Problem(devices, models, p2p, limits)
    if problem.subtasks > MAX_SUBTASKS:
        raise ProblemError("models", f"{problem.subtasks} subtasks, at most {MAX_SUBTASKS} can be")
    return problem


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a field given twice the last would count, unnoticed."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ProblemError(show_name(name), "stands twice")
        fields[name] = value
    return fields


def problem_to_json(problem: Problem) -> dict[str, Any]:
    """The JSON form: `parse_problem` makes an equal problem of it."""
    limits = problem.memory_limit
    return {
        "devices": problem.devices,
        "p2p": _plain(problem.p2p),
        "memory_limit": None if all(map(math.isinf, limits)) else _shorten(limits),
        "models": [_model_to_json(model) for model in problem.models],
    }


def _parse_model(data: Any, path: str, devices: int) -> Model:
    required = {"micro_batches", "forward", "backward", "activation", "pipelines"}
    fields = Fields(data, path, required, {"name", "weight_gradient"})
    name = fields.get("name", "")
    if not isinstance(name, str):
        raise ProblemError(f"{path}.name", "want a string")
    pipelines = fields.get("pipelines")
    if not isinstance(pipelines, list) or not pipelines:
        raise ProblemError(f"{path}.pipelines", "want at least one list of devices")
    for i, pipeline in enumerate(pipelines):
        _check_pipeline(pipeline, f"{path}.pipelines[{i}]", devices, pipelines[0])
    stages = len(pipelines[0])
    forward = fields.numbers("forward", stages, "stage", above=0.0)
    backward = fields.numbers("backward", stages, "stage", above=0.0)
    weight = None
    if fields.get("weight_gradient") is not None:
        weight = fields.numbers("weight_gradient", stages, "stage", above=0.0)
        if any(part >= whole for part, whole in zip(weight, backward, strict=True)):
            raise ProblemError(f"{path}.weight_gradient", "must be less than `backward`, its whole")
    return Model(
        name=name,
        micro_batches=fields.count("micro_batches"),
        forward=forward,
        backward=backward,
        activation=fields.numbers("activation", stages, "stage", lowest=0.0),
        pipelines=tuple(tuple(pipeline) for pipeline in pipelines),
        weight_gradient=weight,
    )


def _check_pipeline(pipeline: Any, path: str, devices: int, first: Any) -> None:
    if not isinstance(pipeline, list) or not pipeline:
        raise ProblemError(path, "want a list of devices, one per stage")
    if len(pipeline) != len(first):
        raise ProblemError(path, f"{len(pipeline)} stages, but the first pipeline has {len(first)}")
    for stage, device in enumerate(pipeline):
        if not is_whole(device) or not 0 <= device < devices:
            raise ProblemError(
                f"{path}[{stage}]", f"want a device from 0 to {devices - 1}, got {show(device)}"
            )


def _plain(value: float) -> float | int | None:
    """Whole numbers without a decimal point: files that people write come back as they were."""
    if math.isinf(value):
        return None
    return int(value) if value == int(value) else value


def _shorten(values: Sequence[float]) -> Any:
    if len(set(values)) == 1:
        return _plain(values[0])
    return [_plain(value) for value in values]


def _model_to_json(model: Model) -> dict[str, Any]:
    data: dict[str, Any] = {
        "name": model.name,
        "micro_batches": model.micro_batches,
        "forward": _shorten(model.forward),
        "backward": _shorten(model.backward),
        "activation": _shorten(model.activation),
        "pipelines": [list(pipeline) for pipeline in model.pipelines],
    }
    if model.weight_gradient is not None:
        data["weight_gradient"] = _shorten(model.weight_gradient)
    return data
