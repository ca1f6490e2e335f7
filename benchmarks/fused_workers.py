"""The ranks' part of fused_pipeline.py: what is run and timed. It measures; the other file judges.

A timed run begins on all ranks at one instant, and both ways, fused and Megatron's own, run the
same models through the same process groups, by turns. Clocks of ranks are compared, so all ranks
must be on one machine.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from fused_models import HIDDEN, Sleeper, Trained, gpt, seed, sleep_step

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.pipeline.devices import opposite_layout
from megatron_rlhfuse.pipeline.fused import FusedPipeline, FusionOptions, StepReport
from megatron_rlhfuse.pipeline.groups import Layout, ModelGroups, build_process_groups
from megatron_rlhfuse.pipeline.links import build_links, measure_transfer
from megatron_rlhfuse.pipeline.profile import Costs, gather_costs, make_problem, median_costs
from megatron_rlhfuse.pipeline.profile import step_costs as costs_of
from megatron_rlhfuse.rollout.lifetime import die_with_parent
from megatron_rlhfuse.schedule.baselines import serial_1f1b
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.plan import Plan, load_plan, make_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import Problem, load_problem
from megatron_rlhfuse.schedule.search import search

ACTIVATION_BYTES = 16 * 1024
"""Of an emulated stage, per unit of the plan's activation memory."""

START_DELAY_S = 0.02
"""From agreeing on an instant to that instant: longer than the slowest rank takes to hear of it."""

WARM_UPS = 2
"""After the first fused step its plan is lowered once more, for the times measured in it."""

TIMEOUT_S = 60.0


def emulate(
    problem_file: str,
    plan_file: str,
    unit_s: float,
    message_kib: int,
    search_seconds: float,
    repeats: int,
) -> dict[str, Any]:
    """A problem's plan with stages that sleep; see --emulate."""
    problem = load_problem(problem_file)
    models = problem.models
    first = Layout.contiguous(dist.get_world_size(), 1, models[0].stages)
    trained = []
    for model, layout in zip(
        models, (first, opposite_layout(first, 1, models[1].stages)), strict=True
    ):
        groups = _groups(layout, model.name)
        stage = groups.place.stage
        sleeper = Sleeper(
            groups,
            message_kib,  # a token is a KiB
            model.forward[stage] * unit_s,
            model.backward[stage] * unit_s,
            round(model.activation[stage] * ACTIVATION_BYTES),
        )
        trained.append(Trained(sleeper, groups, model.micro_batches, message_kib, sleep_step))

    plan = _plan_with_transfers(problem, trained, plan_file, unit_s, message_kib, search_seconds)
    timeline = plan.timeline

    def last_end() -> float:
        return max(each.model.ended for each in trained)

    pipeline = _pipeline(trained, FusionOptions(plan=plan_file, timeout_s=TIMEOUT_S))
    fused, serial = _alternate(
        lambda: _fused(pipeline, trained),
        lambda: _serial(trained),
        repeats,
        end=last_end,
    )
    return {
        "transfer_ms": timeline.problem.p2p * unit_s * 1e3,
        "planned": timeline.makespan * unit_s,
        "planned_serial": plan.serial_1f1b * unit_s,
        "fused": [wall for wall, _ in fused],
        "serial": [wall for wall, _ in serial],
        "peak_error": _peak_error(trained, plan_file, timeline, ACTIVATION_BYTES),
    }


def _plan_with_transfers(
    problem: Problem,
    trained: Sequence[Trained],
    plan_file: str,
    unit_s: float,
    message_kib: int,
    search_seconds: float,
) -> Plan:
    """A plan for the problem with the time that a transfer takes here, as a job would make it."""
    seconds = 0.0
    for each in trained:
        links = build_links(each.groups.layout, each.groups.name, timedelta(seconds=TIMEOUT_S))
        seconds = max(seconds, measure_transfer(links, message_kib * HIDDEN, torch.float32))
    slowest = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    if dist.get_rank() == 0:
        priced = replace(problem, p2p=float(slowest) / unit_s)
        found = search(priced, seconds=search_seconds)
        plan = make_plan(found.timeline, greedy=found.greedy, seconds=found.seconds)
        Path(plan_file).write_text(json.dumps(plan_to_json(plan)))
    dist.barrier()
    return load_plan(plan_file)


def real(folder: str, micro_batches: int, length: int, layers: int, repeats: int) -> dict[str, Any]:
    """Two GPT models that plan by themselves; see --real."""
    world = dist.get_world_size()
    first = Layout.contiguous(world, 1, world)
    trained = [
        gpt(_groups(layout, name), micro_batches, length, layers)
        for name, layout in (("actor", first), ("critic", opposite_layout(first, 1, world)))
    ]
    pipeline = _pipeline(
        trained, FusionOptions(search_seconds=1.0, record=True, timeout_s=TIMEOUT_S)
    )
    timeline = _settle(pipeline, trained)
    steps: list[Costs] = []

    def fused_step() -> None:
        _fused(pipeline, trained)
        steps.append(costs_of(_report(pipeline).spans, len(trained), [0] * len(trained)))

    fused, serial = _alternate(
        fused_step,
        lambda: _serial(trained),
        repeats,
        prepare=lambda: [each.model.zero_grad_buffer() for each in trained],
    )
    # The same order with what its subtasks took in these very runs.
    counts = [each.micro_batches for each in trained]
    costs, transfer = gather_costs(pipeline.devices, median_costs(steps), timeline.problem.p2p)
    loaded = make_problem(pipeline.devices, counts, costs, transfer, float("inf"))
    plan_file = Path(folder) / "settled.json"
    if dist.get_rank() == 0:
        plan = make_plan(timeline, greedy=timeline.makespan, seconds=0.0)
        plan_file.write_text(json.dumps(plan_to_json(plan)))
    dist.barrier()
    return {
        "source": _report(pipeline).source,
        "planned": timeline.makespan,
        "planned_serial": serial_1f1b(timeline.problem),
        "planned_under_load": evaluate(loaded, timeline.order).makespan,
        "planned_serial_under_load": serial_1f1b(loaded),
        "fused": [wall for wall, _ in fused],
        "serial": [wall for wall, _ in serial],
        "peak_error": _peak_error(trained, str(plan_file), timeline, 1),
    }


def overhead(plan_file: str, message_kib: int, repeats: int) -> dict[str, Any]:
    """The 1F1B of a model that computes nothing; see --overhead."""
    (model,) = load_plan(plan_file).timeline.problem.models
    groups = _groups(Layout.contiguous(dist.get_world_size(), 1, model.stages), model.name)
    sleeper = Sleeper(groups, message_kib, 0.0, 0.0, 0)
    trained = Trained(sleeper, groups, model.micro_batches, message_kib, sleep_step)
    pipeline = _pipeline([trained], FusionOptions(plan=plan_file, timeout_s=TIMEOUT_S))
    ours, stock = _alternate(lambda: _fused(pipeline, [trained]), trained.stock, repeats)
    return {"executor": ours, "megatron": stock, "subtasks": 2 * model.micro_batches}


def _groups(layout: Layout, name: str) -> ModelGroups:
    groups = build_process_groups(layout, name)
    assert groups is not None, "every rank has a part of every model"
    return groups


def _pipeline(trained: Sequence[Trained], options: FusionOptions) -> FusedPipeline:
    return FusedPipeline(
        [each.groups.name for each in trained],
        [each.model for each in trained],
        [each.groups.pgc for each in trained],
        options,
    )


def _fused(pipeline: FusedPipeline, trained: Sequence[Trained]) -> None:
    pipeline.run([each.step_input() for each in trained])


def _serial(trained: Sequence[Trained]) -> None:
    for each in trained:
        each.stock()


def _report(pipeline: FusedPipeline) -> StepReport:
    assert pipeline.last_step is not None
    return pipeline.last_step


def _settle(pipeline: FusedPipeline, trained: Sequence[Trained]) -> Timeline:
    """Trains until the plan is final."""
    for step in range(20):
        _fused(pipeline, trained)
        report = _report(pipeline)
        _say(f"step {step}: {report.source}, {report.makespan * 1e3:.0f} ms")
        if report.source == "search" or (report.source == "1f1b" and step > 8):
            return report.timeline
        if step > pipeline.options.profile_steps:
            time.sleep(0.5)  # what the search needs more than the steps do
    raise RuntimeError("the search for a plan has not ended")


def _peak_error(
    trained: Sequence[Trained], plan_file: str, timeline: Timeline, unit: float
) -> float:
    """Largest relative error of a rank's peak of activation memory, metered in a run of its own."""
    metered = _pipeline(trained, FusionOptions(plan=plan_file, meter=True, timeout_s=TIMEOUT_S))
    _fused(metered, trained)
    report = _report(metered)
    assert report.peak_activation is not None
    planned = timeline.peak_activation[report.device] * unit
    error = torch.tensor([abs(report.peak_activation - planned) / planned])
    dist.all_reduce(error, dist.ReduceOp.MAX)
    return float(error)


Times = list[tuple[float, float]]
"""Of every run: seconds from the common start to the end of the last rank; CPU seconds of all."""


def _alternate(
    fused: Callable[[], object],
    serial: Callable[[], object],
    repeats: int,
    end: Callable[[], float] = time.perf_counter,
    prepare: Callable[[], object] = lambda: None,
) -> tuple[Times, Times]:
    """Times two ways by turns. `end`: when the work on this rank ended."""
    times: tuple[Times, Times] = ([], [])
    gc.freeze()  # or each collection goes through all imported modules
    for turn in range(-WARM_UPS, repeats):
        for run, taken in zip((fused, serial), times, strict=True):
            prepare()
            took = _together(run, end)
            if turn >= 0:
                taken.append(took)
        if turn >= 0 and turn % max(1, repeats // 5) == 0:
            walls = [statistics.median(wall for wall, _ in taken) for taken in times]
            _say(f"run {turn + 1} of {repeats}: {walls[0] * 1e3:.1f}, {walls[1] * 1e3:.1f} ms")
    return times


def _together(work: Callable[[], object], end: Callable[[], float]) -> tuple[float, float]:
    """Runs something on all ranks from one instant on. COLLECTIVE."""
    gc.collect()
    dist.barrier()  # all have collected
    instant = torch.tensor([time.perf_counter() + START_DELAY_S], dtype=torch.float64)
    dist.broadcast(instant, 0)
    start = float(instant)
    time.sleep(max(0.0, start - time.perf_counter()))
    cpu = time.process_time()
    work()
    cpu = time.process_time() - cpu
    taken = torch.tensor([[end() - start, cpu]], dtype=torch.float64)
    rows = [torch.empty_like(taken) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, taken)
    table = torch.cat(rows)
    return float(table[:, 0].max()), float(table[:, 1].sum())


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def main() -> None:
    """Calls the functions that calls.json lists, in turn; rank 0 leaves what they return."""
    die_with_parent()
    _sleep_precisely()
    logging.getLogger("megatron").setLevel(logging.ERROR)
    folder = Path(sys.argv[1])
    platform.prepare()
    compat.apply()
    platform.set_up_rank(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend(), timeout=timedelta(seconds=TIMEOUT_S))
    seed()
    gc.disable()
    calls = json.loads((folder / "calls.json").read_text())
    results = {name: globals()[name](**arguments) for name, arguments in calls.items()}
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def _sleep_precisely() -> None:
    """Lets sleeps end to the nanosecond that the kernel can do, not 50 microseconds late."""
    pr_set_timerslack = 29
    if ctypes.CDLL(None, use_errno=True).prctl(pr_set_timerslack, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_TIMERSLACK)")


if __name__ == "__main__":
    main()
