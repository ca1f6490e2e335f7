"""The ranks' part of test_checkpoint.py: a job that is killed, and one that resumes it."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tests.distributed.checkpoint_faults import (
    crash_before_the_tracker,
    disagreement,
    full_disk,
    refusals,
)
from tests.distributed.job_helpers import (
    StubEngine,
    changed,
    digest_of,
    make_folders,
    make_sample,
    make_scored,
    parse_job,
)

FLAGS = """
    --pipeline-model-parallel-size 2 --critic-tensor-model-parallel-size 2
    --critic-pipeline-model-parallel-size 1 --rollout-batch-size 8 --global-batch-size 4
    --micro-batch-size 2 --train-iters 4 --lr 1e-3 --lr-warmup-iters 1 --weight-decay 0.1
    --ppo-kl-target 0.5 --ppo-kl-horizon 40 --seed 3 --rlhfuse-fusion none
"""
Results = dict[str, Any]


def run_and_be_killed(folder: str) -> None:
    """Leaves a checkpoint of iteration 2, half of one of iteration 4, and its own digests."""
    root = Path(folder)
    if dist.get_rank() == 0:
        make_folders(root)
    dist.barrier()
    trainer = _start(root, "--save-interval", "2")
    digests = {}
    for iteration in trainer.iterations():
        _train(trainer, iteration)
        digests[str(iteration)] = _digest(trainer)
        if iteration == 4:
            digests |= _other_jobs(trainer, root, save=True)
            (root / f"uninterrupted-{dist.get_rank()}.json").write_text(json.dumps(digests))
            _die_while_saving()
        trainer.publish_weights(iteration)
        trainer.record(iteration)


def resume(folder: str) -> Results:
    """Goes on from what the killed job left; then what else may happen to its checkpoints."""
    from megatron_rlhfuse.training.checkpoint_folder import TRACKER

    root = Path(folder)
    left = sorted(path.name for path in (root / "checkpoints").iterdir())
    whole = (root / "checkpoints" / "iter_0000004" / "metadata.json").exists()
    trainer = _start(root, "--save-interval", "2", "--load", f"{root}/checkpoints")
    started_from, digests = trainer.start_iteration, {"2": _digest(trainer)}
    for iteration in trainer.iterations():
        _train(trainer, iteration)
        digests[str(iteration)] = _digest(trainer)
        trainer.publish_weights(iteration)
        trainer.record(iteration)
    digests |= _other_jobs(trainer, root, save=False)
    return {
        "child processes": [p.cmdline() for p in psutil.Process().children()],
        "left": left,
        "half is whole": whole,
        "started from": started_from,
        "digests": digests,
        "latest": (root / "checkpoints" / TRACKER).read_text(),
        "other layout": _other_layout(trainer),
        "refusals": refusals(trainer, root),
        "crash before the tracker": crash_before_the_tracker(trainer),
        "disagreement": disagreement(trainer),
        "full disk": full_disk(trainer),
    }


def _start(root: Path, *flags: str) -> Any:
    from megatron_rlhfuse.rollout import stage
    from megatron_rlhfuse.trainer import Trainer

    stage.GenerationEngine = StubEngine  # type: ignore[misc, assignment]
    trainer = Trainer(parse_job(root, *FLAGS.split(), "--save", f"{root}/checkpoints", *flags))
    return trainer.__enter__()


def _train(trainer: Any, iteration: int) -> None:
    prompts = trainer.next_prompts(iteration)
    trainer.generate(iteration, prompts)
    trainer.train(iteration, trainer.infer(iteration, prompts))


def _digest(trainer: Any) -> dict[str, str]:
    """Of everything a checkpoint holds, on this rank, bit for bit."""
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    digests = {
        "data": trainer.sampler.state_dict(),
        "kl": trainer.kl_controller.state_dict(),
        "steps": trainer.ppo.optimizer_steps,
        "random": [random.getstate(), np.random.get_state(), torch.get_rng_state()],
        "model-parallel random": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    for name, model in trainer.models.by_name().items():
        digests |= {f"{name} {key}": value for key, value in _model_state(model).items()}
    return {name: digest_of(value) for name, value in digests.items()}


def _model_state(model: Any) -> dict[str, Any]:
    return {
        "weights": dict(model.module.named_parameters()),
        "optimizer": model.optimizer.state_dict(),
        "scheduler": model.scheduler.state_dict(),
    }


def _die_while_saving() -> None:
    """When the tensors are on disk and rank 0 is about to seal them."""
    from megatron.core.dist_checkpointing import serialization

    def killed(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    serialization.save_config = killed


def _other_jobs(trainer: Any, root: Path, save: bool) -> dict[str, Any]:
    """Two steps with a checkpoint between them, by jobs with other flags."""
    bfloat16 = {
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "accumulate_allreduce_grads_in_fp32": True,
    }
    return {
        # bfloat16 weights and float32 masters
        "bfloat16": _two_steps(trainer, f"{root}/bfloat16", save, **bfloat16),
        # the actor's optimizer has no state yet when the checkpoint is made
        "warm-up": _two_steps(trainer, f"{root}/warm-up", save, critic_warmup_iters=1),
    }


def _two_steps(trainer: Any, folder: str, save: bool, **flags: Any) -> dict[str, str]:
    """One step, a checkpoint, one more step; without `save` the first comes from the checkpoint."""
    from megatron_rlhfuse.assembly import build_trained_models
    from megatron_rlhfuse.observe.trace import Tracer
    from megatron_rlhfuse.training.checkpoint import load_checkpoint, save_checkpoint
    from megatron_rlhfuse.training.ppo import PPO

    args = changed(trainer.args, save=folder, load=folder, **flags)
    models = build_trained_models(args)
    ppo = PPO(args, models, Tracer("unused", 0, enabled=False))
    if save:
        ppo.update(1, _experience(args), 0.1)
        save_checkpoint(args, 1, models.by_name(), {"iteration": 1})
    else:
        assert load_checkpoint(args, models.by_name()) == {"iteration": 1}
    ppo.update(2, _experience(args), 0.1)
    return {name: digest_of(_model_state(model)) for name, model in models.by_name().items()}


def _experience(args: Any) -> Any:
    from megatron_rlhfuse.training.experience import build_experience
    from megatron_rlhfuse.training.ppo import advantage_options

    samples = [make_sample(i, i) for i in range(args.rollout_batch_size)]
    scored = [make_scored(s, torch.tensor(s.log_probs), s.sample_id) for s in samples]
    return build_experience(scored, advantage_options(args), 0.1)


def _other_layout(trainer: Any) -> Results:
    """Loads the latest checkpoint into models that are cut the other way round."""
    from megatron_rlhfuse.assembly import build_trained_models
    from megatron_rlhfuse.observe.trace import Tracer
    from megatron_rlhfuse.training.checkpoint import load_checkpoint
    from megatron_rlhfuse.training.ppo import PPO

    args = changed(
        trainer.args,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=1,
        critic_tensor_model_parallel_size=1,
        critic_pipeline_model_parallel_size=1,
    )
    models = build_trained_models(args)
    progress = load_checkpoint(args, models.by_name())
    loaded = _differences(trainer.models, models)
    # Equal optimizers too: both go on, and arrive at the same place.
    trainer.ppo.update(5, _experience(args), 0.1)
    ppo = PPO(args, models, Tracer("unused", 0, enabled=False))
    ppo.update(5, _experience(args), 0.1)
    return {
        "iteration": progress["iteration"],
        "loaded": loaded,
        "trained on": _differences(trainer.models, models),
    }


def _differences(one: Any, other: Any) -> dict[str, float]:
    """COLLECTIVE. The largest difference of any weight, by model."""
    return {
        name: max(
            float((a - b).abs().max())
            for (_, a), (_, b) in zip(model.hf_weights(), again.hf_weights(), strict=True)
        )
        for (name, model), again in zip(
            one.by_name().items(), other.by_name().values(), strict=True
        )
    }
