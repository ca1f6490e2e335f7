"""The ranks' part of test_fused.py: a fused step against Megatron's own schedule, bit by bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import random
from argparse import Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.models import build
from megatron_rlhfuse.models.build import wrap_for_training
from megatron_rlhfuse.models.hf_config import Head
from megatron_rlhfuse.pipeline.devices import opposite_layout
from megatron_rlhfuse.pipeline.fused import FusedPipeline, FusionOptions
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.pipeline.profile import unmeasured_problem
from megatron_rlhfuse.pipeline.stage import StepInput
from megatron_rlhfuse.schedule.evaluate import evaluate, predecessor
from megatron_rlhfuse.schedule.order import Order, Subtask, subtasks_of
from megatron_rlhfuse.schedule.plan import make_plan, plan_to_json
from megatron_rlhfuse.schedule.problem import Problem
from tests.distributed.model_helpers import (
    VOCABULARY,
    Built,
    make_hf_model,
    megatron_args,
    seed_megatron,
)

MOST_STEPS = 60
RANKS = 4
OPTIONS = FusionOptions(search_seconds=0.3, profile_steps=2, timeout_s=30, record=True)

Case = tuple[tuple[int, int], tuple[int, int], tuple[int, int], dict[str, Any]]

# By name: (tensor, pipeline) of actor and critic, micro-batches of both, and what else is special.
CASES: dict[str, Case] = {
    "PP4, critic 2 x PP2": ((1, 4), (1, 2), (4, 3), {"any plan": True}),
    "PP4, critic 2 x PP2, tied": ((1, 4), (1, 2), (6, 4), {"actor": "qwen2"}),
    "PP4, critic PP4": ((1, 4), (1, 4), (5, 6), {}),
    "fewer micro-batches than stages": ((1, 4), (1, 4), (2, 1), {"actor": "qwen2"}),
    "PP2 DP2, critic PP2 DP2": ((1, 2), (1, 2), (4, 4), {}),
    "PP2 DP2, overlapped reduction": ((1, 2), (1, 2), (3, 5), {"overlap_grad_reduce": True}),
    "TP2 PP2, critic TP1 PP2 DP2": ((2, 2), (1, 2), (4, 4), {}),
    "TP2 PP2 twice, tied": ((2, 2), (2, 2), (3, 4), {"actor": "qwen2"}),
    "PP2 DP2, critic TP2 PP2": ((1, 2), (2, 2), (4, 5), {"overlap_grad_reduce": True}),
    "PP4, critic PP1 DP4": ((1, 4), (1, 1), (4, 2), {}),
    "outputs kept": ((1, 4), (1, 2), (6, 3), {"keep outputs": True}),
    "distributed optimizer": (
        (1, 2),
        (1, 2),
        (4, 4),
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    ),
    "TP2 PP2, sequence parallelism": ((2, 2), (1, 2), (4, 5), {"sequence_parallel": True}),
    "per-token loss": ((1, 2), (1, 2), (4, 3), {"per token": True, "actor": "qwen2"}),
    "aligned reduction": (
        (1, 4),
        (1, 2),
        (4, 3),
        {"overlap_grad_reduce": True, "aligned": True, "actor": "qwen2"},
    ),
    "scaled gradients": ((1, 2), (1, 2), (3, 4), {"grad scale": 1024.0}),
    "bfloat16": ((1, 4), (1, 4), (4, 4), {"bf16": True}),
    "recomputed activations": ((1, 2), (1, 2), (4, 4), {"recompute": True}),
}


def check_fused(
    folder: str, names: Sequence[str], cases: dict[str, Case] | None = None
) -> dict[str, Any]:
    """Runs cases of CASES, or others; results by name."""
    root = Path(folder)
    if dist.get_rank() == 0:
        for kind in ("llama", "qwen2"):
            make_hf_model(kind, "language", root / kind)
        make_hf_model("llama", "scalar", root / "scalar")
    dist.barrier()
    args = megatron_args()
    seed_megatron()
    return {name: _compare(root, args, *(cases or CASES)[name]) for name in names}


def _compare(
    root: Path,
    args: Namespace,
    actor: tuple[int, int],
    critic: tuple[int, int],
    counts: tuple[int, int],
    special: dict[str, Any],
) -> dict[str, Any]:
    """Every step of a pipeline's life against the stock schedule on the same models."""
    args = _with(args, special)
    layout = Layout.contiguous(dist.get_world_size(), *actor)
    models = [
        _Trained(root / special.get("actor", "llama"), "language", args, layout, special),
        _Trained(root / "scalar", "scalar", args, opposite_layout(layout, *critic), special),
    ]
    pipeline = FusedPipeline(
        ("actor", "critic"),
        [m.wrapped for m in models],
        [m.built.groups.pgc for m in models],  # type: ignore[union-attr]
        OPTIONS,
    )
    assert models[0].built.model.config.sequence_parallel == bool(special.get("sequence_parallel"))
    found: dict[str, Any] = {"wrong": [], "sources": [], "smallest": float("inf")}
    # On until a plan was searched for, and run once more; a quick machine takes more steps for it.
    for step in range(MOST_STEPS):
        if found["sources"][-2:] == ["search", "search"]:
            break
        batches = [m.batches(count, step) for m, count in zip(models, counts, strict=True)]
        expected = [m.stock(b) for m, b in zip(models, batches, strict=True)]
        for m in models:
            m.zero_grad()
        inputs = [m.step_input(b) for m, b in zip(models, batches, strict=True)]
        losses = pipeline.run(inputs)
        for model, loss, (wanted, gradients) in zip(models, losses, expected, strict=True):
            found["wrong"] += model.differences(loss, wanted, gradients)
            sums = [float(g.abs().sum()) for g in model.gradients().values()]
            found["smallest"] = min(found["smallest"], *sums)
        assert pipeline.last_step is not None
        found["sources"].append(pipeline.last_step.source)
    found["forward"] = _compare_forward(models, pipeline, counts)
    pipeline.close()
    if special.get("any plan"):
        found["wrong"] += _compare_any_plan(root, models, pipeline, counts)
    return found


def _compare_any_plan(
    root: Path, models: Sequence[_Trained], pipeline: FusedPipeline, counts: Sequence[int]
) -> list[str]:
    """What differs under plans that nobody would choose: orders drawn at random."""
    wrong = []
    problem = unmeasured_problem(pipeline.devices, counts)
    for seed in range(3):
        timeline = evaluate(problem, _random_order(problem, seed))
        plan = make_plan(timeline, greedy=timeline.makespan, seconds=0.0)
        path = root / f"random-{seed}.json"
        if dist.get_rank() == 0:
            path.write_text(json.dumps(plan_to_json(plan)))
        given = FusedPipeline(
            ("actor", "critic"),
            [m.wrapped for m in models],
            [m.built.groups.pgc for m in models],  # type: ignore[union-attr]
            FusionOptions(plan=path, timeout_s=30),
        )
        batches = [m.batches(count, seed) for m, count in zip(models, counts, strict=True)]
        expected = [m.stock(b) for m, b in zip(models, batches, strict=True)]
        for m in models:
            m.zero_grad()
        losses = given.run([m.step_input(b) for m, b in zip(models, batches, strict=True)])
        assert given.last_step is not None and given.last_step.source == "file"
        for model, loss, (wanted, gradients) in zip(models, losses, expected, strict=True):
            wrong += model.differences(loss, wanted, gradients)
    return wrong


def _random_order(problem: Problem, seed: int) -> Order:
    """An order that can be executed: whatever is ready, at random; streams stay in sequence."""
    draw = random.Random(seed)
    streams: dict[tuple[int, int, str, int], list[tuple[int, Subtask]]] = {}
    for m, model in enumerate(problem.models):
        for k in range(len(model.pipelines)):
            for device, subtask in subtasks_of(problem, m, k):
                key = (m, k, subtask.kind, subtask.stage)
                streams.setdefault(key, []).append((device, subtask))
    order: Order = [[] for _ in range(problem.devices)]
    done: set[Subtask] = set()
    while any(streams.values()):
        ready = [
            stream
            for stream in streams.values()
            if stream and predecessor(problem, stream[0][1]) in done | {None}
        ]
        device, subtask = draw.choice(ready).pop(0)
        order[device].append(subtask)
        done.add(subtask)
    return order


def _compare_forward(
    models: Sequence[_Trained], pipeline: FusedPipeline, counts: Sequence[int]
) -> bool:
    """Whether a forward-only step collects what the stock schedule collects."""
    batches = [m.batches(count, 99) for m, count in zip(models, counts, strict=True)]
    with torch.no_grad():
        expected = [m.built.run(b) for m, b in zip(models, batches, strict=True)]
        inputs = [m.step_input(b, training=False) for m, b in zip(models, batches, strict=True)]
        outputs = pipeline.run(inputs, forward_only=True)
    return all(
        torch.equal(one, other)
        for found, wanted in zip(outputs, expected, strict=True)
        for one, other in zip(found, wanted, strict=True)
    )


def _with(args: Namespace, special: dict[str, Any]) -> Namespace:
    args = copy.copy(args)
    for name in ("overlap_grad_reduce", "use_distributed_optimizer"):
        setattr(args, name, special.get(name, False))
    if special.get("bf16"):
        args.bf16, args.params_dtype = True, torch.bfloat16
    if special.get("recompute"):
        args.recompute_granularity, args.recompute_method = "full", "uniform"
        args.recompute_num_layers = 1
    return args


@contextlib.contextmanager
def _norms_of_sequence_parts() -> Iterator[None]:
    """Lets models be built with sequence parallelism where only torch's own norms are there.

    Megatron marks the weights of norms that see a part of the sequence; torch's class cannot.
    """
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    def marked(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, **rest: Any) -> Any:
        norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        norm.weight.sequence_parallel = True  # type: ignore[attr-defined]
        return norm

    with (
        mock.patch.object(WrappedTorchNorm, "__new__", marked),
        mock.patch.object(build, "_check_sizes"),
    ):
        yield


class _Trained:
    """A model wrapped for training, with batches whose lengths differ."""

    def __init__(
        self, folder: Path, head: Head, args: Namespace, layout: Layout, special: dict[str, Any]
    ) -> None:
        from megatron.core.distributed import finalize_model_grads

        self.head = head
        with contextlib.ExitStack() as stack:
            if special.get("sequence_parallel") and layout.tp > 1:
                args = copy.copy(args)
                args.sequence_parallel = True
                stack.enter_context(_norms_of_sequence_parts())
            self.built = Built(args, folder, head, layout)
        config, groups = self.built.model.config, self.built.groups
        assert groups is not None
        config.deallocate_pipeline_outputs = not special.get("keep outputs", False)
        self.wrapped = wrap_for_training(self.built.model, self.built.args, config, groups)
        config.finalize_model_grads_func = finalize_model_grads
        config.no_sync_func = self.wrapped.no_sync if args.overlap_grad_reduce else None
        config.grad_sync_func = self.wrapped.start_grad_sync if special.get("aligned") else None
        config.calculate_per_token_loss = special.get("per token", False)
        if "grad scale" in special:
            config.grad_scale_func = lambda loss: loss * special["grad scale"]
        self.replica = groups.place.data

    def batches(self, count: int, step: int) -> list[Tensor]:
        """Micro-batches of this replica: [2, length], the length differs from one to the next."""
        generator = torch.Generator().manual_seed(100 * step + 10 * self.replica + len(self.head))
        return [
            torch.randint(0, VOCABULARY, (2, 6 + 2 * ((i + step) % 4)), generator=generator).to(
                platform.device()
            )
            for i in range(count)
        ]

    def loss(self, output: Tensor, tokens: Tensor) -> Tensor:
        output = output.float()
        return (output * output.detach().sin()).mean() * (1 + tokens.float().mean() / VOCABULARY)

    def reported(self, loss: Tensor, tokens: Tensor) -> Any:
        """What a loss function returns to Megatron's schedules."""
        metrics = {"loss": float(loss.detach())}
        if self.wrapped.config.calculate_per_token_loss:
            return loss, torch.tensor(tokens.numel(), dtype=torch.int), metrics
        return loss, metrics

    def zero_grad(self) -> None:
        self.wrapped.zero_grad_buffer()

    def gradients(self) -> dict[str, Tensor]:
        return {n: p.main_grad for n, p in self.wrapped.named_parameters()}

    def stock(self, batches: Sequence[Tensor]) -> tuple[list[float], dict[str, Tensor]]:
        """Losses and gradients of Megatron's own schedule."""
        self.zero_grad()
        losses: list[float] = []

        def loss(output: Tensor, tokens: Tensor) -> Any:
            value = self.loss(output, tokens)
            losses.append(float(value.detach()))
            return self.reported(value, tokens)

        self.built.run(batches, loss, model=self.wrapped)
        return losses, {name: grad.clone() for name, grad in self.gradients().items()}

    def step_input(self, batches: Sequence[Tensor], training: bool = True) -> StepInput:
        def forward_step(iterator: Any, part: Any) -> Any:
            tokens = next(iterator)
            positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            output = part(tokens, positions, None)

            def collect(output: Tensor, non_loss_data: bool = False) -> Any:
                if non_loss_data:
                    return output.detach().clone()
                return self.reported(self.loss(output, tokens), tokens)

            return output, collect

        return StepInput(
            forward_step,
            iter(batches),
            tuple(b.shape[1] for b in batches),
            tuple(b.shape[0] for b in batches),
            collect_non_loss_data=not training,
        )

    def differences(
        self,
        reported: Sequence[dict[str, float]],
        losses: list[float],
        gradients: dict[str, Tensor],
    ) -> list[str]:
        """What is not equal bit for bit."""
        found = [] if [r["loss"] for r in reported] == losses else [f"{self.head}: losses"]
        now = self.gradients()
        assert now.keys() == gradients.keys()
        return found + [
            f"{self.head}: {name}"
            for name, grad in now.items()
            if not torch.equal(grad, gradients[name])
        ]


def all_names() -> list[list[str]]:
    """The cases in lots, a job each."""
    return [list(lot) for lot in itertools.batched(CASES, 5)]
