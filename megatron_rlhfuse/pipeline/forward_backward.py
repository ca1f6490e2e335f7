"""`fused_forward_backward`: one call in the place of two of Megatron's `forward_backward_func`.

The same arguments, in lists of two, the same losses and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.utils import get_attr_wrapped_model

from megatron_rlhfuse.pipeline.fused import FusedPipeline, FusionOptions, StepReport
from megatron_rlhfuse.pipeline.stage import StepInput

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


def fused_forward_backward(
    *,
    forward_step_func: Sequence[Callable[..., Any]],
    data_iterator: Sequence[Iterator[Any] | None],
    model: Sequence[torch.nn.Module | Sequence[torch.nn.Module]],
    num_microbatches: Sequence[int],
    seq_length: Sequence[int | Sequence[int]],
    micro_batch_size: Sequence[int | Sequence[int]],
    decoder_seq_length: None = None,
    forward_only: bool = False,
    collect_non_loss_data: bool = False,
    first_val_step: bool | None = None,
    adjust_tensor_shapes_fn: None = None,
    p2p_communicator: Any = None,
    pg_collection: Sequence[ProcessGroupCollection] | None = None,
    force_all_reduce: bool = False,
    options: FusionOptions | None = None,
) -> list[list[Any]]:
    """Forward and backward of two models in one fused pipeline; COLLECTIVE over the job's ranks.

    The keywords are those of Megatron-Core's `forward_backward_func`, with a list of two where a
    model has its own: same meaning, same losses, same gradients as two calls of the stock function
    one after the other. `seq_length` and `micro_batch_size` may be lists themselves, one number per
    micro-batch: stages exchange no shapes, also where `variable_seq_lengths` is set.

    Args:
        pg_collection: of every model; by default those that the models were built with
        p2p_communicator: ignored; the transfers are those of the plan
        options: of the pipeline; those of the first call with these models count

    Returns the losses of both models, as the stock function returns those of one.
    Raises ValueError for arguments that do not fit, LayoutError, PlanMismatchError, PipelineError.
    """
    if decoder_seq_length is not None or adjust_tensor_shapes_fn is not None:
        raise ValueError("decoder_seq_length and adjust_tensor_shapes_fn: leave them out")
    count = len(model) if isinstance(model, list | tuple) else 2
    arguments = {
        "model": model,
        "forward_step_func": forward_step_func,
        "data_iterator": data_iterator,
        "num_microbatches": num_microbatches,
        "seq_length": seq_length,
        "micro_batch_size": micro_batch_size,
    }
    if pg_collection is not None:
        arguments["pg_collection"] = pg_collection
    for name, value in arguments.items():
        if not isinstance(value, list | tuple) or len(value) != count:
            raise ValueError(f"{name}: want a list of {count}, one entry per model")
    models = [_single(f"model[{m}]", model[m]) for m in range(count)]
    iterators = [_single(f"data_iterator[{m}]", data_iterator[m]) for m in range(count)]
    given = pg_collection or [None] * count
    groups = [_groups_of(*each) for each in zip(models, given, strict=True)]
    pipeline = _pipeline_of(models, groups, options)
    steps = [
        StepInput(
            forward_step_func[m],
            iterators[m],
            _per_micro_batch(f"seq_length[{m}]", seq_length[m], num_microbatches[m]),
            _per_micro_batch(f"micro_batch_size[{m}]", micro_batch_size[m], num_microbatches[m]),
            collect_non_loss_data,
            first_val_step,
            force_all_reduce,
        )
        for m in range(count)
    ]
    return pipeline.run(steps, forward_only)


def last_step(model: Sequence[torch.nn.Module | Sequence[torch.nn.Module]]) -> StepReport | None:
    """The report of the last fused training step of these models, on this rank.

    model: as `fused_forward_backward` was given it. None before the first step.
    """
    models = [_single(f"model[{m}]", each) for m, each in enumerate(model)]
    pipeline = _known_pipelines(models).get(_key(models))
    return pipeline.last_step if pipeline is not None else None


def _single(name: str, value: Any) -> Any:
    """Megatron hands models and iterators over in lists of one."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise ValueError(
            f"{name}: a list of {len(value)}; a model of several chunks (interleaved stages) "
            "cannot be fused"
        )
    return value[0]


def _groups_of(
    model: torch.nn.Module | None, given: ProcessGroupCollection | None
) -> ProcessGroupCollection | None:
    """None on a rank without its part of the model, which all ranks then find out together."""
    if model is None:
        return None
    return given or get_attr_wrapped_model(model, "pg_collection")


def _per_micro_batch(name: str, value: int | Sequence[int], count: int) -> tuple[int, ...]:
    if isinstance(value, int):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name}: {len(value)} numbers for {count} micro-batches")
    return tuple(value)


def _pipeline_of(
    models: Sequence[torch.nn.Module],
    process_groups: Sequence[ProcessGroupCollection | None],
    options: FusionOptions | None,
) -> FusedPipeline:
    """The pipeline of these models, made in the first call with them."""
    known, key = _known_pipelines(models), _key(models)
    if key not in known:
        names = [f"model {m}" for m in range(len(models))]
        known[key] = FusedPipeline(names, models, process_groups, options)
    return known[key]


def _known_pipelines(
    models: Sequence[torch.nn.Module],
) -> dict[tuple[int, ...], FusedPipeline]:
    # Kept by the first model itself, so that both go together.
    return {} if models[0] is None else models[0].__dict__.setdefault("_fused_pipelines", {})


def _key(models: Sequence[torch.nn.Module]) -> tuple[int, ...]:
    return tuple(id(each) for each in models[1:])
