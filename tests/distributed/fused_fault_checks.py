"""The ranks' part of test_fused_faults.py: what a fused step does when something is wrong."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.pipeline.devices import map_devices, opposite_layout
from megatron_rlhfuse.pipeline.errors import PipelineError
from megatron_rlhfuse.pipeline.fused import FusedPipeline, FusionOptions
from megatron_rlhfuse.pipeline.groups import Layout, build_process_groups
from megatron_rlhfuse.pipeline.profile import unmeasured_problem
from megatron_rlhfuse.pipeline.rank_layouts import gather_layouts
from megatron_rlhfuse.pipeline.stage import StepInput
from megatron_rlhfuse.schedule.plan import make_plan, plan_to_json
from megatron_rlhfuse.schedule.search import greedy

RANKS = 4
"""Of a step that breaks: the last one has no business with the faulty one."""

FAULTY = 1
"""The rank that fails, in its forward of the actor's micro-batch 1."""

TIMEOUT = 2.0
COUNTS = (4, 3)
HIDDEN = 4
NAMES = ("actor", "critic")

Fault = Callable[[], None]


class Part(torch.nn.Module):
    """A stage of a model: one matrix."""

    def __init__(self) -> None:
        from megatron.core.transformer import TransformerConfig

        super().__init__()
        self.config = TransformerConfig(
            num_layers=1,
            hidden_size=HIDDEN,
            num_attention_heads=1,
            pipeline_dtype=torch.float32,
            attention_dropout=0.0,
            hidden_dropout=0.0,
        )
        self.matrix = torch.nn.Linear(HIDDEN, HIDDEN)
        self.received: Any = None

    def set_input_tensor(self, tensors: list[Any]) -> None:
        (self.received,) = tensors

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.matrix(batch if self.received is None else self.received)


class Job:
    """Actor and critic on new process groups, opposite to each other, each on all ranks."""

    def __init__(self, **options: Any) -> None:
        actor = Layout.contiguous(dist.get_world_size(), 1, dist.get_world_size())
        self.layouts = [actor, opposite_layout(actor, 1, actor.pp)]
        groups = [build_process_groups(x, n) for x, n in zip(self.layouts, NAMES, strict=True)]
        self.groups = [each.pgc for each in groups if each is not None]
        self.models = [Part(), Part()]
        self.forwards = 0
        self.pipeline = self.make_pipeline(**options)

    def make_pipeline(self, **options: Any) -> FusedPipeline:
        return FusedPipeline(
            NAMES, self.models, self.groups, FusionOptions(timeout_s=TIMEOUT, **options)
        )

    def steps(
        self, fault: Fault | None = None, counts: tuple[int, int] = COUNTS
    ) -> list[StepInput]:
        def forward_step(iterator: Iterator[tuple[int, int]], part: Part) -> Any:
            model, micro_batch = next(iterator)
            self.forwards += 1
            at_fault = dist.get_rank() == FAULTY and (model, micro_batch) == (0, 1)
            if fault is not None and at_fault:
                fault()
            output = part(torch.ones(2, 1, HIDDEN))
            return output, lambda output: (output.sum(), {"micro_batch": micro_batch})

        return [
            StepInput(forward_step, iter([(m, i) for i in range(n)]), (2,) * n, (1,) * n)
            for m, n in enumerate(counts)
        ]

    def error(self, fault: Fault | None = None) -> dict[str, Any]:
        """Of a step; `seconds` until it was raised."""
        return error_of(lambda: self.pipeline.run(self.steps(fault)))


def error_of(call: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        call()
    except Exception as error:
        found = {
            "type": type(error).__name__,
            "text": str(error),
            "notes": getattr(error, "__notes__", []),
            "seconds": time.monotonic() - began,
        }
        if isinstance(error, PipelineError):
            found |= {name: getattr(error, name) for name in ("rank", "instruction", "peer")}
        return found
    return {"type": "none"}


def ranks_that_answer() -> int:
    """Ranks of an all-reduce over the job."""
    ones = torch.ones(1)
    dist.all_reduce(ones)
    return int(ones)


# ---------------------------------------------------------------- what is refused


def check_refusals(folder: str) -> dict[str, dict[str, Any]]:
    """On two ranks: the errors for wrong plan files and wrong layouts, and what still works then.

    Of a step with every plan file also the error of a second try, how many forwards ran, where the
    plan came from, and how many ranks an all-reduce still reaches.
    """
    job = Job()
    files = plan_files(job)
    if dist.get_rank() == 0:
        for name, content in files.items():
            (Path(folder) / f"{name}.json").write_text(content)
    dist.barrier()
    found: dict[str, dict[str, Any]] = {}
    for name in [*files, "missing"]:
        job.pipeline = job.make_pipeline(plan=Path(folder) / f"{name}.json")
        job.forwards = 0
        found[name] = job.error()
        found[name] |= {"again": job.error(), "forwards": job.forwards}
        found[name]["source"] = job.pipeline.last_step and job.pipeline.last_step.source
        found[name]["answer"] = ranks_that_answer()
    found["steps"] = _steps_of_different_counts(job)
    for name, call in _disagreements(job).items():
        found[name] = error_of(call) | {"answer": ranks_that_answer()}
        found[name]["next"] = job.error()["type"]
    for name, call in _wrong_layouts(job).items():
        found[name] = error_of(call) | {"answer": ranks_that_answer()}
    return found


def _disagreements(job: Job) -> dict[str, Callable[[], Any]]:
    """Steps that the last rank wants otherwise than the others, after one that all agree on."""
    odd = dist.get_rank() == dist.get_world_size() - 1
    job.pipeline = job.make_pipeline()
    job.pipeline.run(job.steps())

    def lengths() -> None:
        steps = job.steps()
        if odd:
            steps[1] = dataclasses.replace(steps[1], sequence_lengths=(3,) * COUNTS[1])
        job.pipeline.run(steps)

    return {
        "other counts": lambda: job.pipeline.run(job.steps(counts=(4, 4) if odd else COUNTS)),
        "no micro-batch": lambda: job.pipeline.run(job.steps(counts=(4, 0) if odd else COUNTS)),
        "lengths": lengths,
        "forward only": lambda: job.pipeline.run(job.steps(), forward_only=odd),
    }


def _steps_of_different_counts(job: Job) -> dict[str, Any]:
    """The numbers of micro-batches that each step's plan is for; whether it knew what they cost."""
    job.pipeline = job.make_pipeline(profile_steps=5)
    found: dict[str, Any] = {"micro_batches": [], "measured": []}
    for counts in (COUNTS, (2, 5), COUNTS):
        job.pipeline.run(job.steps(counts=counts))
        step = job.pipeline.last_step
        assert step is not None
        found["micro_batches"].append([m.micro_batches for m in step.timeline.problem.models])
        found["measured"].append(step.is_measured)
    return found


def plan_files(job: Job) -> dict[str, str]:
    """A right plan and wrong ones, by name."""
    problem = unmeasured_problem(map_devices(NAMES, job.layouts), COUNTS)
    timeline = greedy(problem)
    right = plan_to_json(make_plan(timeline, greedy=timeline.makespan, seconds=0.0))
    deeper = Layout.contiguous(4, 1, 4)
    return {
        "right": json.dumps(right),
        "devices": _plan_for([deeper, opposite_layout(deeper, 1, 4)], COUNTS),
        "layout": _plan_for([job.layouts[0]] * 2, COUNTS),
        "swapped": _plan_for(job.layouts[::-1], COUNTS[::-1]),
        "counts": _plan_for(job.layouts, (COUNTS[0], COUNTS[1] + 1)),
        "one model": _plan_for(job.layouts[:1], COUNTS[:1]),
        "deadlock": _edited(right, _backward_before_its_forward),
        "sequence": _edited(right, _reversed_micro_batches),
        "twice": _edited(right, lambda plan: plan["order"][0].__setitem__(1, plan["order"][0][0])),
        "numbers": _edited(right, lambda plan: plan.update(makespan=plan["makespan"] / 2)),
        "not JSON": json.dumps(right)[:-20],
        "not text": "\x00\ufffe",
    }


def _plan_for(layouts: Sequence[Layout], counts: Sequence[int]) -> str:
    timeline = greedy(unmeasured_problem(map_devices(NAMES[: len(layouts)], layouts), counts))
    return json.dumps(plan_to_json(make_plan(timeline, greedy=timeline.makespan, seconds=0.0)))


def _edited(plan: dict[str, Any], edit: Callable[[dict[str, Any]], Any]) -> str:
    plan = copy.deepcopy(plan)
    edit(plan)
    return json.dumps(plan)


def _backward_before_its_forward(plan: dict[str, Any]) -> None:
    row = plan["order"][0]
    first, second = row.index("a0F1"), row.index("a0B1")
    row[first], row[second] = row[second], row[first]


def _reversed_micro_batches(plan: dict[str, Any]) -> None:
    """The actor runs its micro-batches 1, 0, 2, 3 on every device: this could be executed."""
    other = {"a0F0": "a0F1", "a0F1": "a0F0", "a0B0": "a0B1", "a0B1": "a0B0"}
    plan["order"] = [[other.get(token, token) for token in row] for row in plan["order"]]


def _wrong_layouts(job: Job) -> dict[str, Callable[[], Any]]:
    """A critic on one rank only; a critic of its own on each rank; one whose ranks cross badly."""
    single = [build_process_groups(Layout((((rank,),),)), "single") for rank in range(2)]
    tensor = build_process_groups(Layout.contiguous(2, 2, 1), "tensor")
    assert tensor is not None
    own = next(each.pgc for each in single if each is not None)
    absent = single[0].pgc if single[0] is not None else None
    actor = job.groups[0]
    return {
        "no part": lambda: gather_layouts(NAMES, [actor, absent]),
        "own model": lambda: FusedPipeline(NAMES, job.models, [actor, own]),
        "crossing": lambda: FusedPipeline(NAMES, job.models, [actor, tensor.pgc]),
    }


# ---------------------------------------------------------------- what breaks in mid-step


def check_faults() -> dict[str, Any]:
    """The error of every rank when one hangs, or fails, and of the next step of such a pipeline."""
    faults: dict[str, Fault] = {
        "hang": lambda: time.sleep(2 * TIMEOUT),
        "exception": lambda: _fail(ValueError("bad sample 17")),
    }
    found: dict[str, Any] = {}
    for name, fault in faults.items():
        job = Job()
        healthy = job.error()
        dist.barrier()
        found[name] = job.error(fault) | {"before": healthy["type"]}
        dist.barrier()
        found[name] |= {"again": job.error(), "answer": ranks_that_answer()}
    return found


def _fail(error: Exception) -> None:
    raise error


def check_kill(folder: Path) -> None:
    """A step in which a rank is killed; the others leave their errors in the folder, and live on.

    They live on so that no rank gets its error from a process that has ended, but the killed one's.
    """
    job = Job()
    assert job.error()["type"] == "none"
    dist.barrier()
    error = job.error(lambda: os.kill(os.getpid(), signal.SIGKILL))
    part = folder / f"part-{dist.get_rank()}"
    part.write_text(json.dumps(error))
    part.rename(folder / f"error-{dist.get_rank()}")
    deadline = time.monotonic() + 5 * TIMEOUT
    while time.monotonic() < deadline and len(list(folder.glob("error-*"))) < RANKS - 1:
        time.sleep(0.05)


def _main(folder: Path, rank: int) -> None:
    from megatron_rlhfuse import compat

    platform.prepare()
    compat.apply()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    check_kill(folder)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))
