"""The JSON description of a cluster and of the two models trained on it, for `rlhfuse simulate`.

A model is given by exactly one of `preset` (a name), `shape` (its sizes), `config` (a Hugging Face
model folder) and `measured` (times and memory of its stages). From measured numbers nothing is
estimated, so they work for any model; `p2p` must then be given too. Errors name the field.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast

from megatron_rlhfuse.schedule.errors import ProblemError
from megatron_rlhfuse.schedule.estimate import (
    DEFAULT_LINK_EFFICIENCY,
    DEFAULT_MFU,
    RECOMPUTATIONS,
    Recomputation,
    Training,
)
from megatron_rlhfuse.schedule.fields import Fields
from megatron_rlhfuse.schedule.layout import (
    Parallelism,
    StageCosts,
)
from megatron_rlhfuse.schedule.presets import GPUS, SHAPES, Gpu, TransformerShape
from megatron_rlhfuse.schedule.problem import load_json

ROLES = ("actor", "critic")

MAX_GPUS = 100_000
"""More are refused: no such cluster exists, a typo is likelier."""

_SOURCES = ("preset", "shape", "config", "measured")

LEAST = 1e-3
"""Of speeds, sizes and shares: far below any machine's, far above what overflows."""


@dataclass(frozen=True)
class ClusterModel:
    """One model of a cluster.

    Attributes:
        label: what it is, such as "llama-13b"
        source: its shape, or the costs that were measured
    """

    role: str
    label: str
    parallelism: Parallelism
    source: TransformerShape | StageCosts


@dataclass(frozen=True)
class Cluster:
    """A cluster, two models and how they are trained.

    Attributes:
        mini_batch_size: samples of one PPO mini-batch, over all replicas
        mini_batches: of one training stage
        p2p: transfer time between two stages, ms; None to estimate it
    """

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    training: Training
    mini_batch_size: int
    mini_batches: int
    models: tuple[ClusterModel, ClusterModel]
    p2p: float | None = None

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


def load_cluster(path: Path | str) -> Cluster:
    """Reads a description; `config` is relative to its folder.

    Raises ProblemError naming the field, OSError if there is no such file.
    """
    return parse_cluster(load_json(path), Path(path).parent)


def parse_cluster(data: Any, folder: Path) -> Cluster:
    """A cluster from its JSON form. Raises ProblemError naming the field."""
    required = {"nodes", "gpus_per_node", "gpu", "sequence_length", "micro_batch_size"}
    required |= {"mini_batch_size", "mini_batches", *ROLES}
    options = {"recomputation", "sequence_parallel", "flash_attention", "distributed_optimizer"}
    options |= {"mfu", "link_efficiency", "p2p"}
    read = Fields(data, "", required, options, what="cluster")
    nodes, gpus_per_node = read.count("nodes"), read.count("gpus_per_node")
    if nodes * gpus_per_node > MAX_GPUS:
        raise ProblemError("nodes", f"{nodes * gpus_per_node} GPUs, at most {MAX_GPUS} can be")
    training = Training(
        sequence_length=read.count("sequence_length"),
        micro_batch_size=read.count("micro_batch_size"),
        recomputation=cast(Recomputation, read.choice("recomputation", RECOMPUTATIONS, "none")),
        sequence_parallel=read.flag("sequence_parallel", True),
        flash_attention=read.flag("flash_attention", True),
        distributed_optimizer=read.flag("distributed_optimizer", False),
        mfu=_share(read, "mfu", DEFAULT_MFU),
        link_efficiency=_share(read, "link_efficiency", DEFAULT_LINK_EFFICIENCY),
    )
    samples = read.count("mini_batch_size")
    if samples % training.micro_batch_size:
        raise ProblemError(
            "micro_batch_size",
            f"want a divisor of mini_batch_size {samples}, got {training.micro_batch_size}",
        )
    actor, critic = (_parse_model(read.get(role), role, gpus_per_node, folder) for role in ROLES)
    p2p = read.number("p2p", lowest=0.0) if read.get("p2p") is not None else None
    for model in (actor, critic):
        _check_world(model, nodes * gpus_per_node)
        if p2p is None and isinstance(model.source, StageCosts):
            raise ProblemError("p2p", f"missing; {model.role}.measured does not tell it")
    return Cluster(
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        gpu=_parse_gpu(read),
        training=training,
        mini_batch_size=samples,
        mini_batches=read.count("mini_batches"),
        models=(actor, critic),
        p2p=p2p,
    )


def _parse_gpu(read: Fields) -> Gpu:
    given = read.get("gpu")
    if not isinstance(given, dict):
        return GPUS[read.choice("gpu", GPUS)]
    names = {each.name for each in fields(Gpu)} - {"name"}
    own = Fields(given, "gpu", names, {"name"})
    numbers = {name: own.number(name, lowest=LEAST) for name in sorted(names)}
    return Gpu(name=own.text("name", "own GPU"), **numbers)


def _parse_model(data: Any, role: str, gpus_per_node: int, folder: Path) -> ClusterModel:
    read = Fields(data, role, {"tp", "pp", "dp"}, set(_SOURCES))
    sizes = Parallelism(read.count("tp"), read.count("pp"), read.count("dp"))
    if gpus_per_node % sizes.tp:
        raise ProblemError(
            f"{role}.tp",
            f"want a divisor of gpus_per_node {gpus_per_node}, so that a tensor-parallel group "
            f"stays inside its node; got {sizes.tp}",
        )
    given = [name for name in _SOURCES if read.get(name) is not None]
    if len(given) != 1:
        named = f"got {' and '.join(given)}" if given else "got none"
        raise ProblemError(role, f"want exactly one of {', '.join(_SOURCES)}; {named}")
    if given[0] == "measured":
        return ClusterModel(role, "measured", sizes, _parse_measured(read, sizes.pp))
    if given[0] == "preset":
        label = read.choice("preset", SHAPES)
        shape = SHAPES[label]
    elif given[0] == "shape":
        label, shape = "own shape", _parse_shape(read)
    else:
        config = folder / read.text("config")
        label, shape = config.name, _read_config(config, role)
    shape = replace(shape, scalar_head=role == "critic")
    _check_cut(shape, sizes, role)
    return ClusterModel(role, label, sizes, shape)


def _parse_measured(read: Fields, stages: int) -> StageCosts:
    own = Fields(
        read.get("measured"),
        read.path("measured"),
        {"forward", "backward", "activation", "resident"},
        set(),
    )
    return StageCosts(
        forward=own.numbers("forward", stages, "stage", above=0.0),
        backward=own.numbers("backward", stages, "stage", above=0.0),
        activation=own.numbers("activation", stages, "stage", lowest=0.0),
        resident=own.numbers("resident", stages, "stage", lowest=0.0),
    )


def _parse_shape(read: Fields) -> TransformerShape:
    required = {"layers", "hidden", "ffn_hidden", "heads", "vocab"}
    optional = {"query_groups", "head_dim", "gated", "tied"}
    own = Fields(read.get("shape"), read.path("shape"), required, optional)
    heads, hidden = own.count("heads"), own.count("hidden")
    groups = own.count("query_groups") if own.get("query_groups") is not None else heads
    if own.get("head_dim") is not None:
        head_dim = own.count("head_dim")
    elif hidden % heads:
        raise ProblemError(own.path("heads"), f"{heads} heads do not divide hidden {hidden}")
    else:
        head_dim = hidden // heads
    return TransformerShape(
        layers=own.count("layers"),
        hidden=hidden,
        ffn_hidden=own.count("ffn_hidden"),
        heads=heads,
        query_groups=groups,
        head_dim=head_dim,
        vocab=own.count("vocab"),
        gated=own.flag("gated", True),
        tied=own.flag("tied", False),
    )


def _read_config(config: Path, role: str) -> TransformerShape:
    from megatron_rlhfuse.models.hf_config import read_shape

    try:
        shape = read_shape(config, "scalar" if role == "critic" else "language")
    except Exception as error:  # transformers raises whatever a malformed file leads it to
        reason = " ".join(f"{error}".split())
        if not isinstance(error, ValueError | OSError):
            reason = f"{config}/config.json is malformed: {type(error).__name__}: {reason}"
        raise ProblemError(f"{role}.config", reason) from error
    return TransformerShape(
        layers=shape.num_layers,
        hidden=shape.hidden_size,
        ffn_hidden=shape.ffn_hidden_size,
        heads=shape.num_attention_heads,
        query_groups=shape.num_query_groups,
        head_dim=shape.head_dim,
        vocab=shape.vocab_size,
        tied=shape.tied_embeddings,
    )


def _check_cut(shape: TransformerShape, sizes: Parallelism, role: str) -> None:
    """Whether the model is one, and whether tensor and pipeline parallelism can cut it."""
    for what, size in vars(shape).items():
        if not isinstance(size, bool) and size < 1:
            raise ProblemError(role, f"the model's {what} is {size}")
    if shape.heads % shape.query_groups:
        raise ProblemError(
            role, f"the model's {shape.heads} heads do not divide over {shape.query_groups} groups"
        )
    if sizes.pp > shape.layers:
        raise ProblemError(f"{role}.pp", f"{sizes.pp} stages, but only {shape.layers} layers")
    for what in ("heads", "query_groups", "ffn_hidden"):
        count = getattr(shape, what)
        if count % sizes.tp:
            raise ProblemError(
                f"{role}.tp",
                f"want a divisor of the model's {what} {count}, got {sizes.tp}; "
                f"{math.gcd(count, sizes.tp)} would do for it",
            )


def _check_world(model: ClusterModel, gpus: int) -> None:
    sizes = model.parallelism
    if sizes.world_size != gpus:
        fitting, rest = divmod(gpus, sizes.tp * sizes.pp)
        remedy = f"; dp {fitting} would" if fitting and not rest else ""
        raise ProblemError(
            f"{model.role}.dp",
            f"{sizes} = {sizes.world_size} must take all {gpus} GPUs of the cluster{remedy}",
        )


def _share(read: Fields, name: str, default: float) -> float:
    if read.get(name) is None:
        return default
    value = read.number(name, lowest=LEAST)
    if value > 1:
        raise ProblemError(name, f"want a share up to 1, got {value:g}")
    return value
