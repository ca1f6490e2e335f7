"""A training stage of a cluster under every schedule: times, bubbles, memory.

Fused schedules come from the search, the others from `baselines`; all are timed by the reference
evaluator. One group of the placement stands for all: they run the same schedule at the same time.
Gradient reduction and optimizer step are left out: fusion does not change them.

Unit of times: ms, of memory: GB, per GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_rlhfuse.schedule import baselines
from megatron_rlhfuse.schedule.bounds import lower_bound
from megatron_rlhfuse.schedule.cluster import Cluster
from megatron_rlhfuse.schedule.cluster_problem import plan_cluster
from megatron_rlhfuse.schedule.errors import InfeasibleError
from megatron_rlhfuse.schedule.estimate import split_layers
from megatron_rlhfuse.schedule.evaluate import ROUNDING, Timeline, evaluate
from megatron_rlhfuse.schedule.layout import Placement
from megatron_rlhfuse.schedule.presets import TransformerShape
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.search import Progress, greedy, search

SERIAL, SEARCHED = "serial 1F1B", "searched fused"
SPLIT = "fused, split backward"
BACK_TO_BACK, GREEDY = "back-to-back 1F1B", "greedy fused"
INTERLEAVED, ZB_H1 = "serial interleaved 1F1B", "serial ZB-H1"


@dataclass(frozen=True)
class Run:
    """A mini-batch under one schedule.

    Attributes:
        peak: highest activation memory of every device, [devices]
    """

    time: float
    peak: tuple[float, ...]


@dataclass(frozen=True)
class Simulation:
    """Every schedule of one cluster.

    Attributes:
        runs: by the schedule's name; a schedule that is not defined here, or not feasible, is
            missing and `missing` says why
        lower_bound: no fused schedule takes less time; what cuts stages or splits the backward may
    """

    cluster: Cluster
    placement: Placement
    problem: Problem
    runs: dict[str, Run]
    missing: dict[str, str]
    lower_bound: float

    def bubble_fraction(self, time: float) -> float:
        """Idle share of the devices in a mini-batch that takes `time`."""
        return 1.0 - sum(self.problem.work()) / (self.problem.devices * time)

    def speed_up(self, time: float) -> float:
        """Over training one model after the other under 1F1B."""
        return self.runs[SERIAL].time / time

    def stage_seconds(self, time: float) -> float:
        """A whole training stage whose mini-batches take `time` ms."""
        return self.cluster.mini_batches * time / 1e3

    def fits(self, run: Run) -> bool:
        """Whether no GPU runs out of memory."""
        return all(
            peak <= limit * (1 + ROUNDING)
            for peak, limit in zip(run.peak, self.problem.memory_limit, strict=True)
        )

    def fullest_device(self, run: Run) -> int:
        """The device with the least memory left."""
        limits = self.problem.memory_limit
        return min(
            range(self.problem.devices), key=lambda device: limits[device] - run.peak[device]
        )

    @property
    def best_fused(self) -> Run | None:
        """The shorter of the fused schedules."""
        fused = [self.runs[name] for name in (SEARCHED, GREEDY) if name in self.runs]
        return min(fused, key=lambda run: run.time, default=None)


def simulate(
    cluster: Cluster,
    *,
    seconds: float | None = None,
    iterations: int | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Simulation:
    """Runs a mini-batch of `cluster` under every schedule; each search takes up to `seconds`.

    Two are searched: with whole backwards, and split in halves for input and weight gradients.
    The rest of the arguments are those of `search`.

    Raises ProblemError where the models cannot be laid out or do not fit the memory.
    """

    def found(problem: Problem) -> Timeline:
        return search(
            problem,
            seconds=seconds,
            iterations=iterations,
            threads=threads,
            seed=seed,
            progress=progress,
        ).timeline

    placement, problem = plan_cluster(cluster)
    runs, missing = _serial_runs(problem)
    merged = evaluate(problem, baselines.one_f_one_b(problem))
    runs[BACK_TO_BACK] = _run(merged)
    fused: dict[str, Callable[[], Timeline]] = {
        GREEDY: lambda: greedy(problem),
        SEARCHED: lambda: found(problem),
        SPLIT: lambda: found(baselines.split_backward(problem)),
    }
    for name, make in fused.items():
        try:
            runs[name] = _run(make())
        except InfeasibleError as error:
            missing[name] = str(error)
    return Simulation(cluster, placement, problem, runs, missing, lower_bound(problem))


def notes(simulation: Simulation) -> list[str]:
    """What a reader of the numbers must know: the memory first, then what is missing."""
    lines = [_memory_note(simulation)]
    lines += [f"{name}: {reason}" for name, reason in simulation.missing.items()]
    for model in simulation.cluster.models:
        if isinstance(model.source, TransformerShape):
            layers = set(split_layers(model.source.layers, model.parallelism.pp))
            if len(layers) > 1:
                lines.append(
                    f"{model.role}: {model.source.layers} layers on {model.parallelism.pp} stages "
                    f"are {min(layers)} or {max(layers)} each; a training run wants equal stages"
                )
    lines.append(
        "times leave out gradient reduction and optimizer step, the same in every schedule"
    )
    return lines


def to_json(simulation: Simulation) -> dict[str, Any]:
    """Every number of the table, by schedule, and the sizes it follows from."""
    return {
        "gpus": simulation.cluster.gpus,
        "groups": simulation.placement.groups,
        "devices": simulation.placement.devices,
        "gpus_per_device": simulation.placement.ranks_per_device,
        "p2p_ms": simulation.problem.p2p,
        "memory_limit_gb": list(simulation.problem.memory_limit),
        "lower_bound_ms": simulation.lower_bound,
        "schedules": {
            name: {
                "mini_batch_ms": run.time,
                "training_stage_s": simulation.stage_seconds(run.time),
                "bubble_fraction": simulation.bubble_fraction(run.time),
                "peak_activation_gb": list(run.peak),
                "fits": simulation.fits(run),
                "speed_up": simulation.speed_up(run.time),
            }
            for name, run in simulation.runs.items()
        },
        "notes": notes(simulation),
    }


def _serial_runs(problem: Problem) -> tuple[dict[str, Run], dict[str, str]]:
    """One model after the other, under each of the classic schedules."""
    serial = baselines.serial_timeline
    runs = {
        SERIAL: _run(serial(problem, baselines.one_f_one_b)),
        ZB_H1: _run(serial(baselines.split_backward(problem), baselines.zb_h1)),
    }
    missing = {}
    if any(model.micro_batches % model.stages for model in problem.models):
        missing[INTERLEAVED] = "wants micro-batches per pipeline that are a multiple of the stages"
    else:
        virtual = baselines.virtual_stages(problem, chunks=2)
        runs[INTERLEAVED] = _run(serial(virtual, baselines.one_f_one_b))
    return runs, missing


def _run(timeline: Timeline) -> Run:
    return Run(timeline.makespan, tuple(timeline.peak_activation))


def _memory_note(simulation: Simulation) -> str:
    run = simulation.best_fused
    if run is None:
        return "memory: DOES NOT FIT: no fused schedule was found that keeps to the limit"
    device = simulation.fullest_device(run)
    peak, limit = run.peak[device], simulation.problem.memory_limit[device]
    verdict = "fits" if simulation.fits(run) else "DOES NOT FIT"
    return (
        f"memory: {verdict}: the fused schedule keeps up to {peak:.1f} GB of activations, "
        f"{limit:.1f} GB are left for them on the fullest GPU"
    )
