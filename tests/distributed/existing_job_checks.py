"""The ranks' part of test_existing_job.py: the models of the example, in a job of our own."""

from __future__ import annotations

import importlib.util
import os
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_rlhfuse import (
    FusionOptions,
    fused_forward_backward,
    last_step,
    opposite_process_groups,
)

RANKS = 4
MICRO_BATCHES = 8
ABSENT = 2
"""The rank without its part of the second model, in one of the refusals."""

LENGTHS = (40, 64, 48, 56, 8, 64, 16, 24)
TIMEOUT = 60.0
OPTIONS = FusionOptions(timeout_s=TIMEOUT, search_seconds=0)


def check_api(example: str, folder: str, blocks: list[str]) -> dict[str, Any]:
    """What `fused_forward_backward` refuses, and what `blocks`, Python of the guide, compute.

    folder: where the files that the blocks name lie
    """
    os.chdir(folder)
    job = _Job(example)
    found: dict[str, Any] = {"refused": _refusals(job)}
    found["blocks"] = [_block(job, text) for text in blocks]
    found["lengths"] = _lengths(job)
    found["mismatch"] = _mismatch(job)  # the last one: it leaves messages under way
    return found


class _Job:
    """The example's functions and groups, and the arguments of a call with its models."""

    def __init__(self, example: str) -> None:
        spec = importlib.util.spec_from_file_location("existing_megatron_job", example)
        assert spec is not None and spec.loader is not None
        self.functions = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.functions)
        parallel_state.initialize_model_parallel(1, RANKS)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        self.groups = [groups, opposite_process_groups(groups)]
        self.args = Namespace(
            micro_batches=MICRO_BATCHES, tensor=1, pipeline=RANKS, hidden=32, layers=4
        )

    def models(self) -> list[Any]:
        return [self.functions.build_model(self.args, m, self.groups[m]) for m in (0, 1)]

    def both(self, models: list[Any]) -> dict[str, list[Any]]:
        return {
            "forward_step_func": [self.functions.forward_step] * 2,
            "data_iterator": [
                self.functions.mock_data(self.args, 0, m, self.groups[m]) for m in (0, 1)
            ],
            "model": models,
            "num_microbatches": [MICRO_BATCHES] * 2,
            "seq_length": [self.functions.SEQUENCE] * 2,
            "micro_batch_size": [self.functions.MICRO_BATCH_SIZE] * 2,
            "p2p_communicator": [
                P2PCommunicator(self.groups[m].pp, models[m].config) for m in (0, 1)
            ],
            "pg_collection": self.groups,
        }


def _refusals(job: _Job) -> dict[str, str]:
    """By name: the error of a call with one thing wrong, in an order that all ranks keep."""
    models = job.models()
    config = models[1].config
    found: dict[str, str] = {}

    def refuse(name: str, **changes: Any) -> None:
        arguments = {**job.both(models), **changes}
        found[name] = _error(lambda: fused_forward_backward(**arguments, options=OPTIONS))

    def refuse_config(field: str, value: Any) -> None:
        before = getattr(config, field)
        setattr(config, field, value)
        refuse(field)
        setattr(config, field, before)

    for name, value in job.both(models).items():
        if name not in ("model", "p2p_communicator"):
            refuse(name, **{name: value[:1]})
    refuse("no list", model=models[0])
    refuse("number", seq_length=64)
    refuse("chunks", model=[models[0], [models[1], models[1]]])
    refuse("iterators", data_iterator=[iter(()), [iter(()), iter(())]])
    refuse("decoder", decoder_seq_length=64)
    refuse("absent", model=[models[0], None if dist.get_rank() == ABSENT else models[1]])
    refuse_config("num_moe_experts", 4)
    refuse_config("virtual_pipeline_model_parallel_size", 2)
    refuse("lengths", seq_length=[64, [64, 64]])
    refuse("nothing", num_microbatches=[MICRO_BATCHES, 0])
    refuse_config("hidden_dropout", 0.1)
    return found


def _error(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def _block(job: _Job, text: str) -> dict[str, Any]:
    """Runs a block of the guide as a line of the example's training loop."""
    models = job.models()
    wanted = _stock(job.both(models))
    names: dict[str, Any] = {
        "both": job.both(models),
        "fused_forward_backward": fused_forward_backward,
    }
    exec(text, names)
    report = last_step(models)
    assert report is not None
    return {
        "equal": _numbers(names["losses"]) == wanted,
        "source": report.source,
        "losses": sum(map(len, wanted)),
    }


def _lengths(job: _Job) -> bool:
    """Whether micro-batches of different lengths, told in a list, give what Megatron gives."""
    models = job.models()
    for model in models:
        model.config.variable_seq_lengths = True  # for the stock schedule

    def data(number: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(number)
        for length in LENGTHS:
            yield torch.randint(job.functions.VOCABULARY, (2, length + 1), generator=generator)

    both = job.both(models)
    wanted = _stock(both | {"data_iterator": [data(m) for m in (0, 1)]})
    both |= {"data_iterator": [data(m) for m in (0, 1)], "seq_length": [LENGTHS, list(LENGTHS)]}
    del both["pg_collection"], both["p2p_communicator"]  # may be left out
    return _numbers(fused_forward_backward(**both, options=OPTIONS)) == wanted


def _mismatch(job: _Job) -> str:
    both = job.both(job.models()) | {"seq_length": [32, 64]}
    return _error(lambda: fused_forward_backward(**both, options=OPTIONS))


def _stock(both: dict[str, list[Any]]) -> list[list[float]]:
    """Losses of Megatron's own schedule, one model after the other."""
    schedule = get_forward_backward_func()
    return _numbers([schedule(**{k: v[m] for k, v in both.items()}) for m in (0, 1)])


def _numbers(losses: list[list[dict[str, Any]]]) -> list[list[float]]:
    return [[float(each["loss"]) for each in of_model] for of_model in losses]
