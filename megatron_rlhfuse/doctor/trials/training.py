"""A training step of a tiny GPT in Megatron, built, loaded and driven as a job does it."""

from __future__ import annotations

import math
import os
import socket
import sys
from pathlib import Path
from typing import Any

LARGEST_KNOWN_LOSS = 0.1
"""Of the model on what it knows; without its weights it would be log(64) = 4.2."""


def run(folder: Path) -> str:
    """Loss on what the model knows, then a step on what it does not know."""
    from megatron_rlhfuse import platform
    from megatron_rlhfuse.doctor.trials import tiny_model

    tiny_model.write(folder / "model")
    model = _model(folder / "model")
    import torch

    device = platform.device()
    known = torch.arange(4, 40, device=device)[None]
    (before,) = model.run(_forward_step, [known], forward_only=True)
    if not float(before) < LARGEST_KNOWN_LOSS:
        raise RuntimeError(f"a model that counts has a loss of {float(before):g} on counting")
    result = model.step(_forward_step, [known.flip(1)], ("loss",))
    loss = result.metrics["loss"]
    if not math.isfinite(loss) or not math.isfinite(result.grad_norm) or not result.applied:
        raise RuntimeError(f"loss {loss:g}, gradient {result.grad_norm:g}: not finite")
    if result.grad_norm == 0:
        raise RuntimeError("the gradient is 0")
    return f"a step on {device.type}: loss {loss:.2f}, gradient norm {result.grad_norm:.2f}"


def _model(folder: Path) -> Any:
    from megatron_rlhfuse import compat, platform

    platform.prepare()
    compat.apply()
    args = _arguments(folder)
    from megatron.training.initialize import initialize_megatron

    from megatron_rlhfuse.models.hf_config import apply_shape, read_shape
    from megatron_rlhfuse.pipeline.groups import Layout, build_process_groups
    from megatron_rlhfuse.training.trained_model import TrainedModel

    initialize_megatron(allow_no_cuda=True)
    groups = build_process_groups(Layout.contiguous(1, tensor=1, pipeline=1), "tiny")
    assert groups is not None
    shape = read_shape(folder, "language")
    args = apply_shape(args, shape, tensor_parallel=1, pipeline_parallel=1)
    return TrainedModel("tiny", args, shape, str(folder), "language", groups, 1)


def _arguments(folder: Path) -> Any:
    """Validated arguments of a job of one rank; Megatron reads the world from the environment."""
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_rlhfuse import compat, platform
    from megatron_rlhfuse.arguments import add_rlhfuse_arguments
    from megatron_rlhfuse.doctor.trials import tiny_model

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    length = tiny_model.LENGTH
    flags = f"--num-layers {tiny_model.LAYERS} --hidden-size {tiny_model.HIDDEN}"
    flags += f" --num-attention-heads {tiny_model.HEADS} --seq-length {length}"
    flags += f" --max-position-embeddings {length} --micro-batch-size 1 --train-iters 1"
    flags += " --lr 1e-3 --rerun-mode disabled"
    flags += " --bf16" if platform.has_cuda() else ""
    sys.argv = ["doctor", *flags.split()]
    args = parse_args(extra_args_provider=add_rlhfuse_arguments)
    for name, value in (compat.default_flags() | platform.default_flags()).items():
        setattr(args, name, value)
    validate_args(args)
    set_global_variables(args, build_tokenizer=False)
    return args


def _forward_step(iterator: Any, model: Any) -> Any:
    import torch

    tokens = next(iterator)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    output = model(tokens, positions, None)

    def loss(output: Any, non_loss_data: bool = False) -> Any:
        logits = output[:, :-1].float().flatten(0, 1)
        value = torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten())
        return value if non_loss_data else (value, {"loss": value.detach()})

    return output, loss
