"""Random valid scheduling problems, for the property tests of everything that plans schedules."""

from __future__ import annotations

from random import Random

from hypothesis import strategies as st

from megatron_rlhfuse.schedule.evaluate import predecessor
from megatron_rlhfuse.schedule.order import Order, Subtask
from megatron_rlhfuse.schedule.problem import Model, Problem


def times(integer_times: bool = True, largest: int = 9) -> st.SearchStrategy[float]:
    """Durations above zero: whole numbers, or anything from 1/16 on."""
    if integer_times:
        return st.integers(1, largest).map(float)
    return st.floats(0.0625, largest)


@st.composite
def models(
    draw: st.DrawFn,
    devices: int,
    *,
    max_stages: int = 4,
    max_pipelines: int = 2,
    max_micro_batches: int = 4,
    integer_times: bool = True,
    uniform: bool = False,
    repeat_devices: bool = True,
    split_backward: bool | None = None,
) -> Model:
    """One model on `devices` devices.

    Args:
        uniform: the same times and activation on every stage
        repeat_devices: a pipeline may pass a device several times
        split_backward: whether the model has W subtasks; None leaves it to chance
    """
    if repeat_devices:
        stages = draw(st.integers(1, max_stages))
    else:
        stages = draw(st.integers(1, min(max_stages, devices)))
    pipeline = st.lists(
        st.integers(0, devices - 1),
        min_size=stages,
        max_size=stages,
        unique=not repeat_devices,
    ).map(tuple)
    time = times(integer_times)

    def per_stage(value: st.SearchStrategy[float]) -> tuple[float, ...]:
        if uniform:
            return (draw(value),) * stages
        return tuple(draw(value) for _ in range(stages))

    split = draw(st.booleans()) if split_backward is None else split_backward
    forward = per_stage(time)
    input_gradient = per_stage(time)
    weight_gradient = per_stage(time) if split else None
    rest = weight_gradient or (0.0,) * stages
    return Model(
        name=draw(st.sampled_from(["actor", "critic", ""])),
        micro_batches=draw(st.integers(1, max_micro_batches)),
        forward=forward,
        backward=tuple(b + w for b, w in zip(input_gradient, rest, strict=True)),
        activation=per_stage(st.integers(0, 4).map(float)),
        pipelines=tuple(draw(st.lists(pipeline, min_size=1, max_size=max_pipelines))),
        weight_gradient=weight_gradient,
    )


@st.composite
def problems(
    draw: st.DrawFn,
    *,
    max_devices: int = 4,
    max_models: int = 3,
    max_micro_batches: int = 4,
    max_stages: int = 4,
    max_pipelines: int = 2,
    integer_times: bool = True,
    uniform: bool = False,
    repeat_devices: bool = True,
    split_backward: bool | None = None,
    p2p: bool = True,
    memory_limit: bool = False,
) -> Problem:
    """Problems that `parse_problem` would accept; the arguments of `models`, and

    Args:
        p2p: a transfer may take time
        memory_limit: a device may have a limit: one that lets a micro-batch of every stage pass
    """
    devices = draw(st.integers(1, max_devices))
    drawn = draw(
        st.lists(
            models(
                devices,
                max_stages=max_stages,
                max_pipelines=max_pipelines,
                max_micro_batches=max_micro_batches,
                integer_times=integer_times,
                uniform=uniform,
                repeat_devices=repeat_devices,
                split_backward=split_backward,
            ),
            min_size=1,
            max_size=max_models,
        )
    )
    transfer = draw(st.just(0.0) | times(integer_times, largest=3)) if p2p else 0.0
    limits: tuple[float, ...] = ()
    if memory_limit:
        # One micro-batch of everything a device hosts at once: running them one by one always fits.
        needed = [0.0] * devices
        for model in drawn:
            for pipeline in model.pipelines:
                for stage, device in enumerate(pipeline):
                    needed[device] += model.activation[stage]
        spare = st.just(float("inf")) | st.integers(0, 8).map(float)
        limits = tuple(size + draw(spare) for size in needed)
    return Problem(devices, tuple(drawn), transfer, limits)


@st.composite
def executable_orders(draw: st.DrawFn, problem: Problem) -> Order:
    """Any order of `problem` that can be executed: its subtasks in a random topological order.

    Tokens do not name stages, so the W of one micro-batch on a device come as its B do.
    """
    order: Order = [[] for _ in range(problem.devices)]
    chains = [
        _chain(model, m, k, micro_batch)
        for m, model in enumerate(problem.models)
        for k in range(len(model.pipelines))
        for micro_batch in range(model.micro_batches)
    ]
    while chains:
        chain = draw(st.sampled_from(chains))
        subtask = chain.pop(0)
        model = problem.models[subtask.model]
        order[model.pipelines[subtask.pipeline][subtask.stage]].append(subtask)
        if subtask.kind == "B" and "W" in model.kinds:
            # Its W runs at any later turn, behind the W of the stages above.
            after = max((i + 1 for i, each in enumerate(chain) if each.kind == "W"), default=0)
            chain.insert(draw(st.integers(after, len(chain))), subtask._replace(kind="W"))
        if not chain:
            chains = [each for each in chains if each]
    return order


@st.composite
def orders_in_sequence(draw: st.DrawFn, problem: Problem) -> Order:
    """An executable order in which every stage takes its micro-batches in sequence, F as well as B.

    For problems without W. A stage may go on for a while before another one has its turn: all
    forwards at once are as likely as a fine mixture. One seed stands for the hundreds of choices.
    """
    rng = Random(draw(st.integers(0, 2**32 - 1)))
    stay = draw(st.sampled_from([0.0, 0.5, 0.9, 1.0]))
    streams = [
        [Subtask(m, k, kind, micro_batch, stage) for micro_batch in range(model.micro_batches)]
        for m, model in enumerate(problem.models)
        for k in range(len(model.pipelines))
        for stage in range(model.stages)
        for kind in "FB"
    ]
    order: Order = [[] for _ in range(problem.devices)]
    done: set[Subtask | None] = {None}
    stream = streams[0]
    while streams:
        ready = [each for each in streams if predecessor(problem, each[0]) in done]
        if not any(each is stream for each in ready) or rng.random() >= stay:
            stream = rng.choice(ready)
        subtask = stream.pop(0)
        pipeline = problem.models[subtask.model].pipelines[subtask.pipeline]
        order[pipeline[subtask.stage]].append(subtask)
        done.add(subtask)
        streams = [each for each in streams if each]
    return order


def _chain(model: Model, m: int, pipeline: int, micro_batch: int) -> list[Subtask]:
    """F and B of one micro-batch in the order of their dependencies."""
    up = range(model.stages)
    return [Subtask(m, pipeline, "F", micro_batch, stage) for stage in up] + [
        Subtask(m, pipeline, "B", micro_batch, stage) for stage in reversed(up)
    ]
