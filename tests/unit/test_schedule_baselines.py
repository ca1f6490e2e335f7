"""The classic schedules: executable on any problem, and as fast as their papers say."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from megatron_rlhfuse.schedule.baselines import (
    chimera,
    interleaved_1f1b,
    memory_bound,
    merge_backward,
    one_f_one_b,
    serial_1f1b,
    serial_interleaved_1f1b,
    serial_zb_h1,
    split_backward,
    virtual_stages,
    zb_h1,
)
from megatron_rlhfuse.schedule.errors import ScheduleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate, predecessor
from megatron_rlhfuse.schedule.order import Order, order_to_tokens, parse_order
from megatron_rlhfuse.schedule.problem import Model, Problem, load_problem
from tests.unit.schedule_strategies import problems

EXAMPLES = Path(__file__).parents[2] / "examples" / "problems"
PUBLISHED_SERIAL = [813, 477, 309, 819, 483, 315, 708, 420, 276, 711, 423, 279]
PUBLISHED_MEMORY_BOUND = [15.6] * 6 + [26.24] * 6
COUNTS = st.integers(1, 5)
TIMES = st.integers(1, 5).map(float)


def published(number: int) -> Problem:
    return load_problem(EXAMPLES / f"published-{number:02}.json")


def uniform(
    stages: int,
    micro_batches: int,
    forward: float,
    backward: float,
    weight_gradient: float | None = None,
) -> Model:
    """Equal stages on the devices 0, 1, ...; `backward` without the weight gradient."""
    return Model(
        name="",
        micro_batches=micro_batches,
        forward=(forward,) * stages,
        backward=(backward + (weight_gradient or 0.0),) * stages,
        activation=(1.0,) * stages,
        pipelines=(tuple(range(stages)),),
        weight_gradient=(weight_gradient,) * stages if weight_gradient else None,
    )


def run(problem: Problem, order: Order) -> Timeline:
    """Times of an order that must be complete, named right by its tokens, and executable."""
    assert parse_order(problem, order_to_tokens(order)) == order
    timeline = evaluate(problem, order)
    assert timeline.makespan >= max(problem.work()) - 1e-9
    return timeline


def alone(problem: Problem) -> list[Problem]:
    return [replace(problem, models=(model,)) for model in problem.models]


@pytest.mark.parametrize("number", range(12))
def test_published_serial_1f1b_and_memory_bound(number: int) -> None:
    assert serial_1f1b(published(number)) == PUBLISHED_SERIAL[number]
    assert memory_bound(published(number)) == pytest.approx(PUBLISHED_MEMORY_BOUND[number])


def test_zb_h1_of_published_instance_11() -> None:
    assert serial_zb_h1(published(11)) == 189


@given(problems())
def test_one_f_one_b_runs_on_any_problem(problem: Problem) -> None:
    timeline = run(problem, one_f_one_b(problem))
    assert timeline.makespan <= serial_1f1b(problem) + 1e-9


@given(problems(split_backward=True))
def test_one_f_one_b_puts_w_right_after_its_b(problem: Problem) -> None:
    for row in one_f_one_b(problem):
        after = dict(pairwise(row))
        for subtask in row:
            if subtask.kind == "B":
                assert after[subtask] == subtask._replace(kind="W")


@given(problems())
def test_one_f_one_b_runs_the_models_in_turn_on_every_device(problem: Problem) -> None:
    for row in one_f_one_b(problem):
        models = [subtask.model for subtask in row]
        assert models == sorted(models)


@given(problems(max_pipelines=1, repeat_devices=False))
def test_one_f_one_b_warms_up_and_then_alternates(problem: Problem) -> None:
    """The pattern stage by stage: F ... F, then B F B F ..., then B ... B."""
    for row in one_f_one_b(problem):
        for m, model in enumerate(problem.models):
            mine = [subtask for subtask in row if subtask.model == m and subtask.kind != "W"]
            if mine:
                ahead = min(model.stages - mine[0].stage, model.micro_batches)
                steady = model.micro_batches - ahead
                kinds = "".join(subtask.kind for subtask in mine)
                assert kinds == "F" * ahead + "BF" * steady + "B" * ahead


TRANSFER_DECIDES = Problem(
    2, (Model("", 2, (2.0, 1.0), (2.0, 2.0), (1.0, 1.0), ((0, 1), (0, 1))),), p2p=1.0
)
"""Without the transfers another order would seem right."""


@example(TRANSFER_DECIDES)
@given(problems(max_models=1, repeat_devices=False, split_backward=False))
def test_a_shared_device_takes_what_can_start_first(problem: Problem) -> None:
    """Transfers counted: no pipeline's next subtask could have started before the one chosen."""
    timeline = run(problem, one_f_one_b(problem))
    ends = {
        subtask: timeline.end(device, position)
        for device, row in enumerate(timeline.order)
        for position, subtask in enumerate(row)
    }
    pipelines = problem.models[0].pipelines
    for device, row in enumerate(timeline.order):
        for position, start in enumerate(timeline.start[device]):
            free = ends[row[position - 1]] if position else 0.0
            later = reversed(row[position:])
            for each in {subtask.pipeline: subtask for subtask in later}.values():
                before = predecessor(problem, each)
                ready = 0.0
                if before is not None:
                    moved = pipelines[each.pipeline][before.stage] != device
                    ready = ends[before] + (problem.p2p if moved else 0.0)
                assert start <= max(free, ready) + 1e-9


@given(problems())
def test_serial_is_the_sum_of_the_models_alone(problem: Problem) -> None:
    assert serial_1f1b(problem) == pytest.approx(sum(serial_1f1b(each) for each in alone(problem)))
    assert serial_zb_h1(problem) == pytest.approx(
        sum(serial_zb_h1(each) for each in alone(problem))
    )
    assert serial_1f1b(problem) == serial_1f1b(merge_backward(problem))
    assert serial_zb_h1(problem) == serial_zb_h1(split_backward(problem))


@given(COUNTS, COUNTS, TIMES, TIMES)
def test_1f1b_formula(stages: int, micro_batches: int, forward: float, backward: float) -> None:
    problem = Problem(stages, (uniform(stages, micro_batches, forward, backward),))
    assert serial_1f1b(problem) == (micro_batches + stages - 1) * (forward + backward)


def test_pipelines_of_one_model_that_cross_do_not_deadlock() -> None:
    """Run one after the other on both devices, these two would wait for each other."""
    model = replace(uniform(2, 4, 1, 1), pipelines=((0, 1), (1, 0)))
    timeline = run(Problem(2, (model,)), one_f_one_b(Problem(2, (model,))))
    assert timeline.makespan < 2 * serial_1f1b(Problem(2, (uniform(2, 4, 1, 1),)))


@given(st.integers(1, 4), st.integers(2, 3), st.integers(1, 3), TIMES, TIMES)
def test_interleaved_formula(
    ranks: int, chunks: int, groups: int, forward: float, backward: float
) -> None:
    micro_batches = groups * ranks
    whole = Problem(ranks, (uniform(ranks, micro_batches, forward, backward),))
    cut = virtual_stages(whole, chunks)
    timeline = run(cut, interleaved_1f1b(cut.models[0], chunks))
    once = forward + backward
    expected = micro_batches * once + (ranks - 1) * once / chunks
    assert timeline.makespan == pytest.approx(expected)
    assert serial_interleaved_1f1b(whole, chunks) == pytest.approx(expected)
    assert one_f_one_b(cut) == timeline.order


def test_interleaved_order_of_megatron() -> None:
    """First device of 2, 2 chunks, 4 micro-batches: 2 (2 - 0 - 1) + 2 forwards of warm-up."""
    row = interleaved_1f1b(uniform(4, 4, 1, 1), chunks=2)[0]
    assert " ".join(f"{each.kind}{each.micro_batch}.{each.stage}" for each in row) == (
        "F0.0 F1.0 F0.2 F1.2 F2.0 B0.2 F3.0 B1.2 F2.2 B0.0 F3.2 B1.0 B2.2 B3.2 B2.0 B3.0"
    )


@given(problems(), st.integers(1, 3))
def test_virtual_stages_keep_the_work(problem: Problem, chunks: int) -> None:
    cut = virtual_stages(problem, chunks)
    assert cut.work() == pytest.approx(problem.work())
    assert cut.subtasks == problem.subtasks * chunks
    whole = serial_interleaved_1f1b(problem, chunks)
    divisible = all(model.micro_batches % model.stages == 0 for model in problem.models)
    assert (whole is not None) == divisible


@pytest.mark.parametrize(
    ("stages", "micro_batches", "chunks", "field"),
    [(4, 3, 2, "micro_batches"), (4, 4, 3, "chunks"), (4, 4, 0, "chunks")],
)
def test_interleaved_says_what_does_not_fit(
    stages: int, micro_batches: int, chunks: int, field: str
) -> None:
    with pytest.raises(ScheduleError, match=field):
        interleaved_1f1b(uniform(stages, micro_batches, 1, 1), chunks)


@given(problems(split_backward=True))
def test_zb_h1_runs_on_any_split_problem(problem: Problem) -> None:
    assert run(problem, zb_h1(problem)).makespan <= serial_zb_h1(problem) + 1e-9


@given(COUNTS, st.integers(0, 5), TIMES, TIMES, TIMES)
def test_zb_h1_formula(
    stages: int, more: int, forward: float, backward: float, weight: float
) -> None:
    micro_batches = stages + more
    problem = Problem(stages, (uniform(stages, micro_batches, forward, backward, weight),))
    hidden = min(forward, backward, weight)
    assert serial_zb_h1(problem) == (
        micro_batches * (forward + backward + weight) + (stages - 1) * (forward + backward - hidden)
    )


@given(problems(max_models=1, max_pipelines=1, repeat_devices=False, uniform=True))
def test_zb_h1_holds_no_more_than_1f1b(problem: Problem) -> None:
    split = split_backward(problem)
    highest = max(evaluate(split, zb_h1(split)).peak_activation)
    assert highest == pytest.approx(memory_bound(problem))


def test_zb_h1_refuses_a_whole_backward() -> None:
    models = (uniform(2, 2, 1, 1, 1), uniform(2, 2, 1, 1))
    with pytest.raises(ScheduleError, match=r"models\[1\].weight_gradient"):
        zb_h1(Problem(2, models))


def both_ways(model: Model) -> Problem:
    (pipeline,) = model.pipelines
    return Problem(model.stages, (model, replace(model, pipelines=(pipeline[::-1],))))


@given(st.integers(1, 4), st.integers(1, 4), TIMES)
def test_chimera_formula(half: int, units: int, time: float) -> None:
    """All bubbles that are left when F = B: N - 2 slots, however many units there are."""
    stages, micro_batches = 2 * half, units * half
    problem = both_ways(uniform(stages, micro_batches, time, time))
    timeline = run(problem, chimera(problem))
    assert timeline.makespan == (4 * micro_batches + stages - 2) * time
    assert max(timeline.peak_activation) <= stages


@given(st.integers(1, 4), TIMES)
def test_chimera_critical_path_of_a_unit(half: int, time: float) -> None:
    """Li & Hoefler 2021: N forwards and 2 N - 2 backwards of twice their length."""
    stages = 2 * half
    problem = both_ways(uniform(stages, half, time, 2 * time))
    assert run(problem, chimera(problem)).makespan == stages * time + (2 * stages - 2) * 2 * time


@given(
    problems(max_devices=1, max_models=1, max_stages=4, max_pipelines=1, max_micro_batches=9),
    st.randoms(use_true_random=False),
)
def test_chimera_runs_on_any_problem_that_fits(problem: Problem, rng: Random) -> None:
    model = problem.models[0]
    assume(model.stages % 2 == 0)
    devices = list(range(model.stages))
    rng.shuffle(devices)
    fitting = both_ways(replace(model, pipelines=(tuple(devices),)))
    run(fitting, chimera(fitting))


FITTING = both_ways(uniform(2, 2, 1, 1))
FIRST, SECOND = FITTING.models


@pytest.mark.parametrize(
    ("problem", "place"),
    [
        (replace(FITTING, models=(FIRST,)), "models: .* 1"),
        (both_ways(uniform(3, 2, 1, 1)), "devices: .* 3"),
        (replace(FITTING, devices=4), r"models\[0\].pipelines\[0\]: .* each device"),
        (replace(FITTING, models=(FIRST, FIRST)), r"models\[1\].pipelines\[0\]: .* reversed"),
        (
            replace(FITTING, models=(FIRST, replace(SECOND, pipelines=SECOND.pipelines * 2))),
            r"models\[1\].pipelines: .* 2",
        ),
        *(
            (replace(FITTING, models=(FIRST, replace(SECOND, **{field: value}))), field)
            for field, value in [
                ("micro_batches", 3),
                ("forward", (1.0, 2.0)),
                ("backward", (1.0, 2.0)),
                ("activation", (1.0, 2.0)),
                ("weight_gradient", (0.5, 0.5)),
            ]
        ),
    ],
)
def test_chimera_says_what_does_not_fit(problem: Problem, place: str) -> None:
    with pytest.raises(ScheduleError, match=place):
        chimera(problem)


@given(problems(max_pipelines=1, repeat_devices=False))
def test_memory_bound_formula(problem: Problem) -> None:
    assert memory_bound(problem) == pytest.approx(
        max(
            min(model.stages - stage, model.micro_batches) * model.activation[stage]
            for model in problem.models
            for stage in range(model.stages)
        )
    )


def test_memory_bound_counts_all_that_a_device_hosts() -> None:
    """Both stages on one device: the last one holds a micro-batch while the first one does."""
    model = replace(uniform(2, 3, 1, 1), pipelines=((0, 0),), activation=(1.0, 10.0))
    assert memory_bound(Problem(1, (model,))) == 11


def test_copies_on_one_device_take_turns() -> None:
    """A backward goes before the other copy's forward: one activation is held, not two."""
    model = replace(uniform(1, 3, 1, 1), pipelines=((0,), (0,)))
    assert memory_bound(Problem(1, (model,))) == 1
