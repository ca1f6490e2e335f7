"""The ranks' part of test_fused_training.py: PPO's updates with fused steps and without."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed.job_helpers import changed, make_folders, parse_job
from tests.distributed.model_helpers import seed_megatron
from tests.distributed.training_checks import TrainingJob, in_layout, make_experience
from tests.distributed.training_reference import FLAGS, Reference, Results

# Actor's and critic's tensor and pipeline sizes on four ranks, and what else differs from FLAGS.
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, object]]] = {
    "PP4, critic 2 x PP2": ((1, 4), (1, 2), {}),
    "PP4, critic PP4": ((1, 4), (1, 4), {"critic_micro_batch_size": 4}),
    "PP4, critic DP4": ((1, 4), (1, 1), {"critic_micro_batch_size": 1}),
    "PP2 DP2, critic PP2 DP2": ((1, 2), (1, 2), {}),
    "PP2 DP2, overlapped reduction": ((1, 2), (1, 2), {"overlap_grad_reduce": True}),
    "TP2 PP2, critic PP2 DP2": ((2, 2), (1, 2), {}),
    "TP2 PP2, critic TP2 PP2": ((2, 2), (2, 2), {"micro_batch_size": 4}),
    "PP2 DP2, critic TP2 PP2": ((1, 2), (2, 2), {}),
    # The samples' log-probabilities are far from the actor's, so the first step exceeds any.
    "early stop": ((1, 2), (1, 2), {"ppo_early_stop_kl": 1e-9}),
    "critic warm-up": ((1, 4), (1, 2), {"critic_warmup_iters": 1}),
    "bfloat16": (
        (1, 4),
        (1, 2),
        {
            "bf16": True,
            "params_dtype": torch.bfloat16,
            "accumulate_allreduce_grads_in_fp32": True,
        },
    ),
    "PP4, packed": ((1, 4), (1, 2), {"rlhfuse_pack_sequences": True}),
    # Tokens: the numbers of micro-batches follow the samples' lengths, so they differ by step.
    "PP4, critic 2 x PP2, tokens": (
        (1, 4),
        (1, 2),
        {"micro_batch_tokens": 30, "critic_micro_batch_tokens": 44},
    ),
    "PP2 DP2, packed tokens": (
        (1, 2),
        (1, 2),
        {
            "micro_batch_tokens": 30,
            "critic_micro_batch_tokens": 44,
            "rlhfuse_pack_sequences": True,
        },
    ),
}
SEARCHED = [
    name
    for name, (_, _, changes) in CASES.items()
    if name not in ("early stop", "critic warm-up") and "micro_batch_tokens" not in changes
]
"""The cases with enough fused steps, of the same numbers of micro-batches, to come to the plan
that was searched for."""

CHECKPOINTS: dict[str, tuple[tuple[int, int], tuple[int, int]]] = {
    "PP4, critic 2 x PP2": ((1, 4), (1, 2)),
    "TP2 PP2, critic PP2 DP2": ((2, 2), (1, 2)),
}


def check_fused_training(folder: str, names: Sequence[str]) -> Results:
    """Two iterations of every case, by both kinds of job."""
    args, experiences = _prepare(folder, actor="qwen2")  # tied embeddings, biases
    return {name: _compare(args, experiences, *CASES[name]) for name in names}


def check_checkpoints(folder: str) -> Results:
    """By layout and by whether the job that saved was fused: what differs in the end."""
    # Untied: where Megatron saves tied ones it asks its global state, which is not here.
    args, experiences = _prepare(folder, actor="llama")
    return {
        name: {
            f"saved {'fused' if fused else 'unfused'}": _cross(
                in_layout(args, *layouts), experiences, f"{folder}/{number}-{fused}", fused
            )
            for fused in (True, False)
        }
        for number, (name, layouts) in enumerate(CHECKPOINTS.items())
    }


def _prepare(folder: str, actor: str) -> tuple[Namespace, list[Any]]:
    root = Path(folder)
    if dist.get_rank() == 0:
        make_folders(root, actor)
    dist.barrier()
    fusion = "--rlhfuse-fusion intra --rlhfuse-plan-seconds 0.05 --rlhfuse-plan-cache none"
    args = parse_job(root, *FLAGS.split(), *fusion.split())
    seed_megatron()
    reference = Reference(args)
    return args, [make_experience(args, reference, iteration) for iteration in (1, 2)]


class _AnyJob(TrainingJob):
    """A job that trains fused if its arguments say so."""

    def __init__(self, args: Namespace) -> None:
        from megatron_rlhfuse.observe.trace import Tracer
        from megatron_rlhfuse.training.fused_training import FusedTraining
        from megatron_rlhfuse.training.ppo import PPO

        super().__init__(args)
        self.fused: FusedTraining | None = None
        self.times: list[dict[str, float | str]] = []  # metrics of fused steps, by iteration
        if args.fuses_training:
            tracer = Tracer("unused", 0, enabled=False)
            self.fused = FusedTraining.build(args, self.models, tracer)
            self.ppo = PPO(args, self.models, tracer, self.fused)

    def update(self, iteration: int, experience: Any) -> Results:
        from megatron_rlhfuse.training.fused_training import reduce_times

        found = super().update(iteration, experience)
        if self.fused is not None:
            self.times.append(reduce_times(self.fused.take_times()))
        return found

    def close(self) -> None:
        if self.fused is not None:
            self.fused.close()


def _compare(
    args: Namespace,
    experiences: list[Any],
    actor: tuple[int, int],
    critic: tuple[int, int],
    changes: dict[str, object],
) -> Results:
    args = in_layout(args, actor, critic, **changes)
    found: Results = {}
    weights = []
    for kind in ("unfused", "fused"):
        job = _AnyJob(changed(args, fuses_training=kind == "fused"))
        start = job.weights()
        found[kind] = [job.update(i, e) for i, e in enumerate(experiences, start=1)]
        found[f"{kind} stopped"] = job.stopped_early
        weights.append(job.weights())
        found["times"] = job.times
        job.close()
    found["different"] = _different(*weights)
    found["unchanged"] = [name for name in start if torch.equal(start[name], weights[1][name])]
    return found


def _different(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    """The tensors that are not equal bit for bit."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def _cross(args: Namespace, experiences: list[Any], folder: str, fused: bool) -> Results:
    """Saves a job after one iteration and goes on from there with the other kind of job."""
    from megatron_rlhfuse.training.checkpoint import load_checkpoint, save_checkpoint

    args = changed(args, save=folder, load=folder)
    first = _AnyJob(changed(args, fuses_training=fused))
    first.update(1, experiences[0])
    save_checkpoint(first.models.actor.args, 1, first.models.by_name(), {"iteration": 1})
    second = _AnyJob(changed(args, fuses_training=not fused))
    progress = load_checkpoint(second.models.actor.args, second.models.by_name())
    loaded = _different(first.weights(), second.weights())
    updates = [job.update(2, experiences[1]) for job in (first, second)]
    ended = _different(first.weights(), second.weights())
    for job in (first, second):
        job.close()
    return {"progress": progress, "loaded": loaded, "ended": ended, "updates": updates}
