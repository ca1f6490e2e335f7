"""vLLM's way in: the one function of the `vllm.general_plugins` entry point.

vLLM calls it in every process it starts, also in processes that have nothing to do with this
project, so it must be cheap, must not fail, and must be callable more than once.
"""

from __future__ import annotations

import functools
import os
from importlib.metadata import entry_points

from megatron_rlhfuse.rollout.lifetime import ENGINE_PROCESS_VARIABLE, die_with_parent
from megatron_rlhfuse.rollout.resumption import resume_in_worker

WEIGHT_TRANSFER_BACKEND = "rlhfuse-shared-memory"


@functools.cache  # vLLM refuses a second registration in a process
def register() -> None:
    """Makes the weight transfer known; ties the workers of our own engines to their parent, and
    lets them go on with samples that others began."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    WeightTransferEngineFactory.register_engine(
        WEIGHT_TRANSFER_BACKEND,
        "megatron_rlhfuse.rollout.weight_transfer",
        "SharedMemoryWeightTransferEngine",
    )
    if ENGINE_PROCESS_VARIABLE in os.environ:
        die_with_parent()
        resume_in_worker()


def is_installed() -> bool:
    """Whether vLLM finds `register` in processes that it starts by itself."""
    return any(
        entry.value == f"{__name__}:{register.__name__}"
        for entry in entry_points(group="vllm.general_plugins")
    )
