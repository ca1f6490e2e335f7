"""Checkpoints of a whole job through Megatron's distributed checkpointing.

One folder per iteration holds actor, critic, both optimizers and schedulers, random state, the
position in the data and the KL controller.

Invariants
- A checkpoint becomes the latest when all of it is written (checkpoint_folder.py); a kill, a full
  disk or another error before that leaves the one before it.
- A file that is not what was written is found before any of it is loaded (integrity.py).
- Saving, then going on, equals loading and going on, bit for bit.
- `--load` of a folder without a checkpoint is an error, never a silent start from iteration 0.
- Another parallel layout than the one that saved may load: models and plain optimizers are cut
  anew (the distributed optimizer's state only with `--dist-ckpt-optim-fully-reshardable`). The
  random state cannot be, and nothing draws from it: dropout is refused.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import random
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_rlhfuse.pipeline.broadcast import broadcast_messages
from megatron_rlhfuse.training.checkpoint_folder import (
    CheckpointError,
    describe,
    folder_of,
    latest_checkpoint,
    latest_iteration,
    make_latest,
    remove_previous,
)
from megatron_rlhfuse.training.integrity import check_manifest, read_manifest, write_manifest
from megatron_rlhfuse.training.save_errors import SaveErrors
from megatron_rlhfuse.training.trained_model import TrainedModel

logger = logging.getLogger(__name__)


def save_checkpoint(
    args: argparse.Namespace,
    iteration: int,
    models: Mapping[str, TrainedModel],
    progress: Mapping[str, Any],
) -> Path:
    """Writes `--save`/iter_<iteration> and makes it the latest. COLLECTIVE over all ranks.

    models: by the prefix of their tensors ("actor", "critic"). progress: plain values, the same
    on every rank.

    Raises CheckpointError where it cannot be written; the latest one is then what it was before.
    """
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    root = Path(args.save)
    try:
        with SaveErrors() as errors:
            folder = _write(args, iteration, models, progress)
        if dist.get_rank() == 0:
            previous = latest_iteration(root)
            make_latest(root, iteration)
            if args.save_retain_interval and previous != iteration:
                remove_previous(root, previous, args.save_retain_interval)
    except (OSError, CheckpointingException, CheckpointException) as fault:
        logger.exception("the checkpoint of iteration %d", iteration)
        raise CheckpointError(
            f"the checkpoint of iteration {iteration} cannot be written to {root}: "
            f"{errors.describe(fault)}; {describe(root)}",
            is_own=isinstance(fault, OSError),
        ) from fault
    dist.barrier()
    return folder


def _write(
    args: argparse.Namespace,
    iteration: int,
    models: Mapping[str, TrainedModel],
    progress: Mapping[str, Any],
) -> Path:
    from megatron.core import dist_checkpointing

    folder = folder_of(Path(args.save), iteration)
    if dist.get_rank() == 0:
        # What a killed save left behind is not the latest checkpoint, so nobody needs it.
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(parents=True)
    dist.barrier()
    stepped = [name for name, model in models.items() if model.has_stepped]
    state = _sharded_state(args, models, stepped, is_loading=False, with_random=True)
    state["progress"] = dict(progress)
    state["stepped"] = stepped
    state["random_layout"] = _random_layout(models)
    state["shapes"] = {name: _shape_fields(model) for name, model in models.items()}
    dist_checkpointing.save(state, str(folder), content_metadata=_metadata(args, models))
    dist.barrier()
    write_manifest(folder)
    return folder


def load_checkpoint(args: argparse.Namespace, models: Mapping[str, TrainedModel]) -> dict[str, Any]:
    """Restores everything from the latest checkpoint under `--load`; returns its progress.

    COLLECTIVE over all ranks. Raises CheckpointError.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint import CheckpointException

    folder, manifest = _agree_on_latest(args)
    check_manifest(folder, manifest)
    try:
        stored = dist_checkpointing.load_common_state_dict(str(folder))
        _check_shapes(stored["shapes"], models, folder)
        with_random = not args.no_load_rng and stored["random_layout"] == _random_layout(models)
        stepped = [] if args.no_load_optim else stored["stepped"]
        state = _sharded_state(args, models, stepped, is_loading=True, with_random=with_random)
        state = dist_checkpointing.load(state, str(folder))
    except (CheckpointingException, KeyError, ValueError) as fault:
        raise CheckpointError(
            f"{folder} does not fit this job's models and flags: {fault}"
        ) from fault
    except CheckpointException as fault:  # torch's, of the ranks that could not read
        cause = next(iter(fault.failures.values()))[0]
        raise CheckpointError(f"{folder} cannot be read: {cause}") from fault
    for name, model in models.items():
        part = state[name]
        model.module.load_state_dict(part["model"])
        if name in stepped:
            model.optimizer.load_state_dict(part["optimizer"])
            model.has_stepped = True
        else:
            model.optimizer.reload_model_params()
        if not args.no_load_optim:
            _restore_scheduler(model, part["scheduler"], folder)
    if with_random:
        _restore_random_state(state["actor"]["random"][0])
    return dict(state["progress"])


def agree_on_load(args: argparse.Namespace) -> None:
    """Makes `--load` what it is on rank 0. COLLECTIVE.

    With --rlhfuse-auto-resume it depends on files, which a shared file system shows to some later.
    """
    told = [f"={args.load or ''}".encode()] if dist.get_rank() == 0 else None
    args.load = broadcast_messages(told, 0)[0].decode()[1:] or None


def _agree_on_latest(args: argparse.Namespace) -> tuple[Path, bytes]:
    """The latest checkpoint, and its checksums, as rank 0 sees them. COLLECTIVE."""
    told: list[bytes] | None = None
    if dist.get_rank() == 0:
        try:
            found = latest_checkpoint(args.load)
            told = [b"found", found.name.encode(), b"=" + read_manifest(found)]
        except (CheckpointError, OSError) as fault:
            told = [b"refused", str(fault).encode()]
    verdict, text, *manifest = broadcast_messages(told, 0)
    if verdict == b"refused":
        raise CheckpointError(text.decode())
    return Path(args.load) / text.decode(), manifest[0][1:]


def _sharded_state(
    args: argparse.Namespace,
    models: Mapping[str, TrainedModel],
    stepped: Collection[str],
    *,
    is_loading: bool,
    with_random: bool,
) -> dict[str, Any]:
    """stepped: the models with an optimizer state. Before its first step (an actor during the
    critic's warm-up) Adam has none, and Megatron could save nothing of it that it would accept.
    """
    from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding

    state: dict[str, Any] = {}
    for name, model in models.items():
        metadata = _metadata(args, {name: model})
        groups = model.groups.pgc
        part: dict[str, Any] = {"model": model.module.sharded_state_dict(metadata=metadata)}
        if name in stepped:
            part["optimizer"] = model.optimizer.sharded_state_dict(
                part, is_loading=is_loading, metadata=metadata
            )
        part["scheduler"] = model.scheduler.state_dict()
        if name == "actor" and with_random:
            part["random"] = _random_state(groups)
        add_prefix_for_sharding(part, f"{name}.")
        state[name] = part
    return state


def _metadata(args: argparse.Namespace, models: Mapping[str, TrainedModel]) -> dict[str, Any]:
    from megatron.training.checkpointing import _build_sharded_state_dict_metadata

    group = next(iter(models.values())).groups.pgc.dp_cp
    return _build_sharded_state_dict_metadata(args, dp_cp_group=group)


def _shape_fields(model: TrainedModel) -> dict[str, Any]:
    """The architecture as plain values, without what weights do not depend on."""
    fields = dataclasses.asdict(model.shape)
    return {k: v for k, v in fields.items() if k not in ("folder", "stored_head")}


def _check_shapes(
    stored: Mapping[str, Mapping[str, Any]], models: Mapping[str, TrainedModel], folder: Path
) -> None:
    for name, model in models.items():
        if name not in stored:
            raise CheckpointError(
                f"{folder} holds no {name}: resume with the --advantage-estimator it was made with"
            )
        for field, value in _shape_fields(model).items():
            if stored[name][field] != value:
                raise CheckpointError(
                    f"{folder} is of another {name}: its {field} is {stored[name][field]}, that of "
                    f"--{name}-model {model.shape.folder} is {value}"
                )


def _random_layout(models: Mapping[str, TrainedModel]) -> list[int]:
    """Pipeline and tensor size of the random state: the actor's."""
    layout = models["actor"].groups.layout
    return [layout.pp, layout.tp]


def _random_state(groups: Any) -> Any:
    from megatron.training.checkpointing import get_rng_state

    return get_rng_state(
        "torch_dist",
        tp_group=groups.tp,
        pp_group=groups.pp,
        dp_cp_group=groups.dp_cp,
        dp_group=groups.dp,
    )


def _restore_scheduler(model: TrainedModel, state: Mapping[str, Any], folder: Path) -> None:
    # load_state_dict adds the stored steps to those of a live scheduler.
    model.scheduler.num_steps = 0
    try:
        model.scheduler.load_state_dict(dict(state))
    except AssertionError as fault:  # Megatron's way to say that flags have changed
        raise CheckpointError(
            f"the {model.name}'s learning-rate schedule is not that of {folder} ({fault}): give "
            "the flags it was started with (--train-iters too, unless --lr-decay-iters is given), "
            "or choose with --override-opt-param-scheduler or --use-checkpoint-opt-param-scheduler"
        ) from fault


def _restore_random_state(state: Mapping[str, Any]) -> None:
    from megatron.core import tensor_parallel

    random.setstate(state["random_rng_state"])
    np.random.set_state(state["np_rng_state"])
    torch.set_rng_state(state["torch_rng_state"])
    torch.cuda.set_rng_state(state["cuda_rng_state"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["rng_tracker_states"])
