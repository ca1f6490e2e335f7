"""The ranks' part of test_training.py: PPO's updates in many layouts."""

from __future__ import annotations

import itertools
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.job_helpers import (
    changed,
    make_folders,
    make_sample,
    make_scored,
    parse_job,
)
from tests.distributed.model_helpers import seed_megatron
from tests.distributed.training_reference import (
    BATCH,
    FLAGS,
    KL_COEFFICIENT,
    MINI_BATCH,
    Reference,
    Results,
    select,
)

# Actor's and critic's tensor and pipeline sizes, and what else differs from FLAGS.
CASES: dict[str, tuple[tuple[int, int], tuple[int, int], dict[str, object]]] = {
    "PP2 DP2, critic TP2 DP2": ((1, 2), (2, 1), {}),
    "TP2 DP2, critic PP2 DP2": ((2, 1), (1, 2), {}),
    "TP2 PP2, critic PP4": ((2, 2), (1, 4), {"critic_micro_batch_size": 1}),
    "DP4": ((1, 1), (1, 1), {"micro_batch_size": 1, "critic_micro_batch_size": 4}),
    "DP4, other micro-batches, overlapped reduction": (
        (1, 1),
        (1, 1),
        {"micro_batch_size": 4, "critic_micro_batch_size": 1, "overlap_grad_reduce": True},
    ),
    "DP4, samples in order": ((1, 1), (1, 1), {"rlhfuse_dispatch": "in-order"}),
    "PP2 DP2, packed": ((1, 2), (2, 1), {"rlhfuse_pack_sequences": True}),
    "TP2 DP2, tokens": (
        (2, 1),
        (1, 2),
        {"micro_batch_tokens": 30, "critic_micro_batch_tokens": 44},
    ),
    "TP2 DP2, packed tokens, recomputed activations": (
        (2, 1),
        (1, 1),
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "micro_batch_tokens": 30,
            "critic_micro_batch_tokens": 44,
            "rlhfuse_pack_sequences": True,
        },
    ),
    "PP4, recomputed activations": (
        (1, 4),
        (1, 1),
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    ),
}
LONG_CASE = "PP2 DP2, critic TP2 DP2"  # runs two iterations, the others one


def check_training(folder: str) -> Results:
    root = Path(folder)
    if dist.get_rank() == 0:
        make_folders(root, actor="qwen2")  # tied embeddings, biases
    dist.barrier()
    args = parse_job(root, *FLAGS.split())
    seed_megatron()
    reference = Reference(args)
    experiences = [make_experience(args, reference, iteration) for iteration in (1, 2)]
    if dist.get_rank() == 0:  # which alone has something to compare with
        reference.run(experiences)
    cases = {}
    for name, (actor, critic, changes) in CASES.items():
        job = TrainingJob(in_layout(args, actor, critic, **changes))
        count = 2 if name == LONG_CASE else 1
        updates = [job.update(i, e) for i, e in enumerate(experiences[:count], start=1)]
        errors = reference.errors(job.weights(), count) if dist.get_rank() == 0 else job.drain()
        cases[name] = {"updates": updates, "errors": errors, "parts": job.parts()}
    rows = _first_mini_batch(args)
    return {
        "expected": reference.updates,
        "cases": cases,
        "early stop": _early_stop(args, experiences),
        "warm-up": _critic_warmup(args, experiences),
        "sgd": _sgd(args, select(experiences[0], rows)),
        "bfloat16": _bfloat16(args, select(experiences[0], rows)),
    }


def _first_mini_batch(args: Namespace) -> Tensor:
    from megatron_rlhfuse.training.experience import mini_batches

    return mini_batches(BATCH, MINI_BATCH, 1, zlib.crc32(f"{args.seed} 1".encode()))[0][0]


def make_experience(args: Namespace, reference: Reference, iteration: int) -> Any:
    """A rollout batch of random tokens, scored by something near the actor."""
    from megatron_rlhfuse.training.experience import build_experience
    from megatron_rlhfuse.training.ppo import advantage_options

    scored = []
    for sample_id in range(BATCH):
        seed = 1000 * iteration + sample_id
        sample = make_sample(sample_id, seed)
        with torch.no_grad():
            log_probs, _ = reference.policy([(list(sample.prompt), list(sample.response))])
        scored.append(make_scored(sample, log_probs[0], seed))
    return build_experience(scored, advantage_options(args), KL_COEFFICIENT)


def in_layout(
    args: Namespace, actor: tuple[int, int], critic: tuple[int, int], **changes: object
) -> Namespace:
    return changed(
        args,
        tensor_model_parallel_size=actor[0],
        pipeline_model_parallel_size=actor[1],
        critic_tensor_model_parallel_size=critic[0],
        critic_pipeline_model_parallel_size=critic[1],
        **changes,
    )


class TrainingJob:
    """Models and PPO of one case."""

    def __init__(self, args: Namespace) -> None:
        from megatron_rlhfuse.assembly import build_trained_models
        from megatron_rlhfuse.observe.trace import Tracer
        from megatron_rlhfuse.training.ppo import PPO

        self.models = build_trained_models(args)
        self.ppo = PPO(args, self.models, Tracer("unused", 0, enabled=False))
        self.stopped_early = False

    def update(self, iteration: int, experience: Any) -> Results:
        """Metrics, gradient norm and learning rate of every step."""
        updates = self.ppo.update(iteration, experience, KL_COEFFICIENT)
        self.stopped_early = updates.stopped_early
        return {
            name: [
                {"grad_norm": s.grad_norm, "learning_rate": s.learning_rate, **s.metrics}
                for s in steps
            ]
            for name, steps in (("actor", updates.actor), ("critic", updates.critic))
        }

    def parts(self) -> dict[str, tuple[list[int], float]]:
        """By model: this rank's stage and tensor part, and a sum of the weights it holds."""
        found = {}
        for name, model in self.models.by_name().items():
            place = model.groups.place
            total = sum(float(p.double().sum()) for p in model.module.parameters())
            found[name] = ([place.stage, place.tensor], total)
        return found

    def drain(self) -> dict[str, Any]:
        """Takes part in another rank's `weights`."""
        self.weights()
        return {}

    def weights(self) -> dict[str, Tensor]:
        """COLLECTIVE. All weights by model and Hugging Face name."""
        return {
            f"{model}.{name}": tensor
            for model, trained in self.models.by_name().items()
            for name, tensor in trained.hf_weights()
        }


def _early_stop(args: Namespace, experiences: list[Any]) -> Results:
    """The samples' log-probabilities are far from the actor's, so the first step exceeds any."""
    job = TrainingJob(in_layout(args, (1, 2), (1, 1), ppo_early_stop_kl=1e-9))
    updates = [job.update(i, e) for i, e in enumerate(experiences, start=1)]
    return {"updates": updates, "stopped": job.stopped_early, "steps": job.ppo.optimizer_steps}


def _critic_warmup(args: Namespace, experiences: list[Any]) -> Results:
    job = TrainingJob(in_layout(args, (2, 1), (1, 1), critic_warmup_iters=1))
    history = [job.weights()]
    updates = []
    for iteration, experience in enumerate(experiences, start=1):
        updates.append(job.update(iteration, experience))
        history.append(job.weights())
    same = [
        {
            model: all(torch.equal(a[n], b[n]) for n in a if n.startswith(model))
            for model in ("actor", "critic")
        }
        for a, b in itertools.pairwise(history)
    ]
    return {"same": same, "actor steps": [update["actor"] for update in updates]}


def _sgd(args: Namespace, experience: Any) -> dict[str, float]:
    """One plain step is the learning rate times the clipped gradient: no factor can hide."""
    args = in_layout(
        args,
        (1, 2),
        (2, 1),
        optimizer="sgd",
        sgd_momentum=0.0,
        weight_decay=0.0,
        critic_weight_decay=0.0,
        start_weight_decay=0.0,
        end_weight_decay=0.0,
        ppo_epochs=1,
    )
    job = TrainingJob(args)
    before = job.weights()
    job.update(1, experience)
    after = job.weights()
    lengths = {}
    for model in ("actor", "critic"):
        moved = sum(float((after[n] - before[n]).norm() ** 2) for n in after if n.startswith(model))
        lengths[model] = moved**0.5
    return lengths


def _bfloat16(args: Namespace, experience: Any) -> Results:
    """The gradient norm of the first step, with float32 master weights behind bfloat16 ones."""
    args = in_layout(
        args,
        (1, 2),
        (2, 1),
        bf16=True,
        params_dtype=torch.bfloat16,
        accumulate_allreduce_grads_in_fp32=True,
        ppo_epochs=1,
    )
    job = TrainingJob(args)
    update = job.update(1, experience)
    return {
        "dtypes": sorted({str(p.dtype) for p in job.models.actor.module.parameters()}),
        "norms": {name: update[name][0]["grad_norm"] for name in ("actor", "critic")},
    }
