"""The classic schedules that a fused plan is compared with: 1F1B, interleaved, ZB-H1, Chimera.

Invariants:
- every order returned holds each subtask of its problem once, in the order that tokens imply, and
  can be executed: it never deadlocks, whatever devices the pipelines share;
- where a backward is split but the schedule knows no W, each W stands right after its B;
- `serial_...` train one model after the other: the sum of the makespans of each model alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.order import Order, Subtask, order_to_tokens, parse_order
from megatron_rlhfuse.schedule.problem import Model, Problem
from megatron_rlhfuse.schedule.streams import (
    Stream,
    add_weight_gradients,
    alternate,
    delay_weight_gradients,
    merge_streams,
    stage_1f1b,
)


def serial_1f1b(problem: Problem) -> float:
    """Time to train the models one after the other, each under 1F1B; backwards are not split.

    A model with uniform stages, one pipeline and no transfer cost takes (M + N - 1) (F + B).
    """
    return serial_timeline(merge_backward(problem), one_f_one_b).makespan


def serial_timeline(problem: Problem, schedule: Callable[[Problem], Order]) -> Timeline:
    """The models one after the other, each alone under `schedule`.

    A model starts when the one before has ended. For that flush between them the starts are later
    than `evaluate` would have them.
    """
    order: Order = [[] for _ in range(problem.devices)]
    start: list[list[float]] = [[] for _ in range(problem.devices)]
    peaks = [0.0] * problem.devices
    makespan = 0.0
    for m, alone in enumerate(_models_alone(problem)):
        timeline = evaluate(alone, schedule(alone))
        for device, row in enumerate(timeline.order):
            order[device] += [subtask._replace(model=m) for subtask in row]
            start[device] += [makespan + time for time in timeline.start[device]]
            peaks[device] = max(peaks[device], timeline.peak_activation[device])
        makespan += timeline.makespan
    return Timeline(problem, order, start, makespan, peaks)


def one_f_one_b(problem: Problem) -> Order:
    """1F1B without a flush between the models: a device runs all of model a, then all of b.

    1F1B (PipeDream-flush; Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on
    GPU Clusters Using Megatron-LM"): stage s of N warms up with min(N - s - 1, M) forwards, then
    alternates one forward and one backward. A pipeline that passes its devices round by round runs
    `interleaved_1f1b` where it can; a device shared in any other way takes what is ready first.
    """
    merged = merge_backward(problem)
    order: Order = [[] for _ in range(problem.devices)]
    for m, model in enumerate(merged.models):
        streams: list[Stream] = []
        for k, devices in enumerate(model.pipelines):
            if _can_interleave(model, devices):
                rows = interleaved_1f1b(replace(model, pipelines=(devices,)), _rounds(devices))
                streams += [
                    (device, [subtask._replace(model=m, pipeline=k) for subtask in row])
                    for device, row in zip(devices, rows, strict=False)
                ]
            else:
                streams += [
                    (device, stage_1f1b(model, m, k, stage)) for stage, device in enumerate(devices)
                ]
        for row, part in zip(order, merge_streams(merged, streams), strict=True):
            row += part
    return add_weight_gradients(problem, order)


def interleaved_1f1b(model: Model, chunks: int) -> Order:
    """Interleaved 1F1B of the first pipeline: row r is its r-th device of N = stages / chunks.

    Narayanan et al. 2021, section 2.2, in the order of Megatron-Core: device r holds the stages
    r, r + N, ...; micro-batches go in groups of N through one chunk after the other; the warm-up
    is 2 (N - r - 1) + (chunks - 1) N forwards. Uniform stages, each with F and B, take
    chunks M (F + B) + (N - 1) (F + B).

    Raises ScheduleError unless N is whole and M a multiple of it.
    """
    if chunks < 1 or model.stages % chunks:
        raise ScheduleError(f"chunks: {model.stages} stages are no multiple of {chunks}")
    ranks, total = model.stages // chunks, model.micro_batches * chunks
    if model.micro_batches % ranks:
        raise ScheduleError(
            f"micro_batches: interleaved 1F1B wants a multiple of {ranks}, the devices of the "
            f"pipeline; got {model.micro_batches}"
        )

    def subtask(kind: str, rank: int, number: int) -> Subtask:
        group, place = divmod(number, model.stages)
        chunk = place // ranks if kind == "F" else chunks - 1 - place // ranks
        return Subtask(0, 0, kind, group * ranks + place % ranks, chunk * ranks + rank)

    order: Order = []
    for rank in range(ranks):
        warm_up = min(total, 2 * (ranks - rank - 1) + (chunks - 1) * ranks)
        forward = [subtask("F", rank, number) for number in range(total)]
        backward = [subtask("B", rank, number) for number in range(total)]
        order.append(alternate(forward, backward, warm_up))
    return add_weight_gradients(Problem(ranks, (model,)), order)


def virtual_stages(problem: Problem, chunks: int) -> Problem:
    """The problem with every stage cut in `chunks` equal parts, its pipelines passed as often.

    Part c of stage s becomes stage c * stages + s on the same device, with 1 / chunks of its times
    and of its activation.
    """

    def cut(values: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(value / chunks for value in values) * chunks

    return replace(
        problem,
        models=tuple(
            replace(
                model,
                forward=cut(model.forward),
                backward=cut(model.backward),
                activation=cut(model.activation),
                pipelines=tuple(pipeline * chunks for pipeline in model.pipelines),
                weight_gradient=cut(model.weight_gradient) if model.weight_gradient else None,
            )
            for model in problem.models
        ),
    )


def serial_interleaved_1f1b(problem: Problem, chunks: int = 2) -> float | None:
    """`serial_1f1b` with every stage cut in `chunks` virtual stages, interleaved.

    A model with uniform stages takes M (F + B) + (N - 1) (F + B) / chunks. None where a model's
    micro-batches are no multiple of its stages: the schedule is not defined there.
    """
    if any(model.micro_batches % model.stages for model in problem.models):
        return None
    return serial_1f1b(virtual_stages(problem, chunks))


def serial_zb_h1(problem: Problem) -> float:
    """Time to train the models one after the other, each under ZB-H1.

    A backward without `weight_gradient` is taken to spend half of its time on that. With B the
    rest of the backward, a model with uniform stages, M >= N and W no longer than F or B takes
    M (F + B + W) + (N - 1) (F + B - W); with a longer W, (F + B - min(F, B)) stands for the last.
    """
    return serial_timeline(split_backward(problem), zb_h1).makespan


def zb_h1(problem: Problem) -> Order:
    """ZB-H1, model after model, of a problem whose backwards are all split.

    Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.2: 1F1B in which stage s delays
    its W by s micro-batches. The deeper a stage, the sooner its B come and the more W it is left
    with to fill the end; no stage holds more than N micro-batches, 1F1B's number on the first.

    Raises ScheduleError naming the model whose backward is whole.
    """
    order: Order = [[] for _ in range(problem.devices)]
    for m, model in enumerate(problem.models):
        if model.weight_gradient is None:
            raise ScheduleError(f"models[{m}].weight_gradient: ZB-H1 splits the backward")
        streams = [
            (device, delay_weight_gradients(stage_1f1b(model, m, k, stage), stage))
            for k, devices in enumerate(model.pipelines)
            for stage, device in enumerate(devices)
        ]
        for row, part in zip(order, merge_streams(problem, streams), strict=True):
            row += part
    # Stages that share a device finish their W in any order; tokens know only one.
    return parse_order(problem, order_to_tokens(order))


def chimera(problem: Problem) -> Order:
    """Chimera's order for two identical models whose pipelines run in opposite directions.

    Li & Hoefler 2021, "Chimera: Efficiently Training Large-Scale Neural Networks with
    Bidirectional Pipelines": in a unit of N / 2 micro-batches each way the one direction runs in
    the other's bubbles; units are concatenated, a unit's first forwards in the last bubbles of the
    one before. With F = B and M a multiple of N / 2 it takes (4 M + N - 2) F.

    The paper's slots, all of one length: micro-batch i of a unit runs F on stage s in slot s + 2 i
    and B in slot 2 N - 1 - s + 2 i; the next unit comes 2 N slots later. On a device the directions
    have slots of opposite parity wherever they could meet, as N is even.

    Raises ScheduleError naming what does not fit: it wants two models equal in all but their
    names, one pipeline each on all devices, the second reversed, and an even number of devices.
    """
    _check_chimera(problem)
    stages = problem.devices
    placed: list[list[tuple[int, Subtask]]] = [[] for _ in range(stages)]
    for m, model in enumerate(problem.models):
        for micro_batch in range(model.micro_batches):
            unit, i = divmod(micro_batch, stages // 2)
            for stage, device in enumerate(model.pipelines[0]):
                forward = 2 * stages * unit + 2 * i + stage
                backward = 2 * stages * unit + 2 * i + 2 * stages - 1 - stage
                placed[device] += [
                    (forward, Subtask(m, 0, "F", micro_batch, stage)),
                    (backward, Subtask(m, 0, "B", micro_batch, stage)),
                ]
    return add_weight_gradients(problem, [[each for _, each in sorted(row)] for row in placed])


def memory_bound(problem: Problem) -> float:
    """RLHFuse's memory bound: the highest activation memory of any model alone under 1F1B.

    Where no device hosts two stages of a model that is the largest min(N - s, M) * activation[s].
    """
    return max(
        max(evaluate(alone, one_f_one_b(alone)).peak_activation)
        for alone in map(merge_backward, _models_alone(problem))
    )


def merge_backward(problem: Problem) -> Problem:
    """The problem with every backward whole."""
    return replace(
        problem, models=tuple(replace(model, weight_gradient=None) for model in problem.models)
    )


def split_backward(problem: Problem) -> Problem:
    """The problem with every backward split: in halves where it was whole."""
    return replace(
        problem,
        models=tuple(
            replace(
                model,
                weight_gradient=model.weight_gradient
                or tuple(whole / 2 for whole in model.backward),
            )
            for model in problem.models
        ),
    )


def _models_alone(problem: Problem) -> Iterator[Problem]:
    for model in problem.models:
        yield Problem(problem.devices, (model,), problem.p2p)


def _rounds(devices: tuple[int, ...]) -> int:
    """How often a pipeline passes its devices if it does so round by round, else 1."""
    length = len(set(devices))
    rounds, rest = divmod(len(devices), length)
    return rounds if not rest and devices == devices[:length] * rounds else 1


def _can_interleave(model: Model, devices: tuple[int, ...]) -> bool:
    rounds = _rounds(devices)
    return rounds > 1 and model.micro_batches % (model.stages // rounds) == 0


def _check_chimera(problem: Problem) -> None:
    if len(problem.models) != 2:
        raise ScheduleError(f"models: Chimera wants two, got {len(problem.models)}")
    if problem.devices % 2:
        raise ScheduleError(f"devices: Chimera wants an even number, got {problem.devices}")
    down, up = problem.models
    for m, model in enumerate(problem.models):
        if len(model.pipelines) != 1:
            raise ScheduleError(
                f"models[{m}].pipelines: Chimera wants one, got {len(model.pipelines)}"
            )
        if sorted(model.pipelines[0]) != list(range(problem.devices)):
            raise ScheduleError(f"models[{m}].pipelines[0]: Chimera wants each device once")
    if up.pipelines[0] != down.pipelines[0][::-1]:
        raise ScheduleError("models[1].pipelines[0]: Chimera wants the first model's, reversed")
    for field in ("micro_batches", "forward", "backward", "activation", "weight_gradient"):
        if getattr(up, field) != getattr(down, field):
            raise ScheduleError(f"models[1].{field}: Chimera wants that of the first model")
