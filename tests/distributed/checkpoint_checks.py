"""The ranks' part of test_checkpoint.py: a job that is killed, and one that resumes it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from tests.distributed.job_helpers import (
    StubEngine,
    changed,
    digest_of,
    make_folders,
    make_sample,
    make_scored,
    parse_job,
)
from tests.distributed.model_helpers import make_hf_model

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
        "refusals": _refusals(trainer, root),
        "crash before the tracker": _crash_before_the_tracker(trainer),
        "disagreement": _disagreement(trainer),
        "full disk": _full_disk(trainer),
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


def _refusals(trainer: Any, root: Path) -> dict[str, str]:
    """What is said of checkpoints that do not fit, by what is wrong."""
    from megatron_rlhfuse.assembly import build_trained_models
    from megatron_rlhfuse.models.hf_config import read_shape
    from megatron_rlhfuse.training.checkpoint import save_checkpoint
    from megatron_rlhfuse.training.checkpoint_folder import TRACKER

    models = trainer.models.by_name()
    if dist.get_rank() == 0:
        make_hf_model("qwen3", "language", root / "other-actor")
        (root / "empty").mkdir()
        for name, text in (("dangling", "7\n"), ("garbled", "two\n")):
            (root / name).mkdir()
            (root / name / TRACKER).write_text(text)
        (root / "torn" / "iter_0000002").mkdir(parents=True)
        (root / "torn" / TRACKER).write_text("2\n")
        shutil.copytree(root / "checkpoints", root / "truncated")
        for name in ("flipped", "lost", "no sums", "older"):
            shutil.copytree(root / "checkpoints", root / name)
        for data in (root / "truncated" / "iter_0000004").glob("*.distcp"):
            os.truncate(data, 100)
        _flip_a_byte(root / "flipped" / "iter_0000004" / "__1_0.distcp")
        (root / "lost" / "iter_0000004" / "__0_0.distcp").unlink()
        (root / "no sums" / "iter_0000004" / "integrity.json").write_text('{"files": {"a": 1}}')
        (root / "older" / "iter_0000004" / "integrity.json").unlink()
    save_checkpoint(
        changed(trainer.args, save=f"{root}/without-critic"), 1, {"actor": models["actor"]}, {}
    )
    dist.barrier()
    other = build_trained_models(
        changed(
            trainer.args,
            actor_model=f"{root}/other-actor",
            actor_shape=read_shape(root / "other-actor", "language"),
        )
    )
    alone = changed(trainer.args, lr_decay_iters=9)
    return {
        "no folder": _refusal(trainer.args, models, root / "nowhere"),
        "no tracker": _refusal(trainer.args, models, root / "empty"),
        "dangling tracker": _refusal(trainer.args, models, root / "dangling"),
        "garbled tracker": _refusal(trainer.args, models, root / "garbled"),
        "truncated": _refusal(trainer.args, models, root / "truncated"),
        "flipped byte": _refusal(trainer.args, models, root / "flipped"),
        "lost file": _refusal(trainer.args, models, root / "lost"),
        "sums unreadable": _refusal(trainer.args, models, root / "no sums"),
        "without sums": _refusal(trainer.args, models, root / "older"),
        "no critic": _refusal(trainer.args, models, root / "without-critic"),
        "torn": _refusal(trainer.args, models, root / "torn"),
        "another model": _refusal(trainer.args, other.by_name(), root / "checkpoints"),
        "another schedule": _refusal(
            alone, build_trained_models(alone).by_name(), root / "checkpoints"
        ),
    }


def _flip_a_byte(path: Path) -> None:
    """In the middle of the file: among the numbers of a tensor, which nothing else would notice."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def _disagreement(trainer: Any) -> dict[str, str]:
    """What is loaded where rank 1 sees another --load and another checkpoint than rank 0."""
    from megatron_rlhfuse.training import checkpoint

    args = changed(trainer.args, load=trainer.args.save if dist.get_rank() == 0 else None)
    checkpoint.agree_on_load(args)
    latest = checkpoint.latest_checkpoint
    if dist.get_rank() == 1:
        checkpoint.latest_checkpoint = lambda root: Path(root) / "iter_0000002"
    try:
        progress = checkpoint.load_checkpoint(args, trainer.models.by_name())
    finally:
        checkpoint.latest_checkpoint = latest
    return {"load": Path(args.load).name, "iteration": progress["iteration"]}


def _refusal(args: Any, models: Any, folder: Path) -> str:
    from megatron_rlhfuse.training.checkpoint import load_checkpoint
    from megatron_rlhfuse.training.checkpoint_folder import CheckpointError

    try:
        load_checkpoint(changed(args, load=str(folder)), models)
    except CheckpointError as error:
        return str(error)
    return "accepted"


def _crash_before_the_tracker(trainer: Any) -> str:
    """Saves iteration 6 up to the last moment; returns which checkpoint is the latest then."""
    from megatron_rlhfuse.training import checkpoint

    class CrashError(Exception):
        pass

    write_manifest = checkpoint.write_manifest

    def write_and_crash(folder: Path) -> None:
        write_manifest(folder)
        raise CrashError

    args, models = trainer.args, trainer.models.by_name()
    checkpoint.write_manifest = write_and_crash
    try:
        checkpoint.save_checkpoint(args, 6, models, {"iteration": 6})
    except CrashError:
        return checkpoint.latest_checkpoint(args.save).name
    finally:
        checkpoint.write_manifest = write_manifest
    return "no crash"


def _full_disk(trainer: Any) -> Results:
    """A save during which one rank finds no room, what is left of it, and the next one."""
    from megatron_rlhfuse import last_words
    from megatron_rlhfuse import trainer as trainer_module
    from megatron_rlhfuse.training.checkpoint_folder import latest_checkpoint

    said: list[str] = []
    last_words.complain = said.append
    trainer_module._TIDYING_S = 0.0  # the ranks of this test go on
    fsync = os.fsync

    def no_room(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if dist.get_rank() == 1:
        os.fsync = no_room
    try:
        trainer._save(8)
        status = None
    except SystemExit as end:
        status = end.code
    finally:
        os.fsync = fsync
    dist.barrier()
    root = trainer.args.save
    left = sorted(each.name for each in Path(root).glob("iter_*8"))
    latest = latest_checkpoint(root).name
    dist.barrier()
    trainer._save(8)
    return {
        "said": said,
        "status": status,
        "left": left,
        "latest": latest,
        "then": latest_checkpoint(root).name,
    }
