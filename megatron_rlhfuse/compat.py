"""Every difference between supported Megatron and vLLM versions, and repairs of their wheels.

The only file that looks at what is installed beside torch, and in which version. `apply()` is
idempotent and is called once per process, after `platform.prepare()`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import queue
from pathlib import Path
from typing import Any

from megatron_rlhfuse.training import safe_loading


def apply() -> None:
    """Applies every repair that the installed versions need."""
    _skip_missing_dataset_makefile()
    _keep_checkpoint_results_in_process()
    _keep_restarts_apart()
    safe_loading.install()


def _skip_missing_dataset_makefile() -> None:
    # megatron-core's wheel ships the compiled dataset helpers but not the Makefile that
    # `compile_helpers` runs, so rank 0 would exit with status 1 while initialising.
    import megatron.core.datasets.utils as dataset_utils

    if not (Path(dataset_utils.__file__).parent / "Makefile").exists():
        dataset_utils.compile_helpers = lambda: None


def _keep_checkpoint_results_in_process() -> None:
    # The writer of distributed checkpoints reports through a queue that a process of its own
    # serves, so that a save could run in the background. Saves here do not; that process takes
    # seconds to start, half a GB, and outlives a rank that is killed.
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def default_flags() -> dict[str, Any]:
    """Megatron flags (by attribute name) without which it would call a package that is absent."""
    flags: dict[str, Any] = {}
    if not has_transformer_engine():
        flags |= {"transformer_impl": "local", "apply_rope_fusion": False}
    if importlib.util.find_spec("apex") is None:
        flags |= {
            "no_persist_layer_norm": True,
            "masked_softmax_fusion": False,
            "gradient_accumulation_fusion": False,
        }
    return flags


def has_transformer_engine() -> bool:
    """Whether Megatron can build its layers from Transformer Engine."""
    return importlib.util.find_spec("transformer_engine") is not None


def has_fused_optimizer() -> bool:
    """Whether apex or Transformer Engine provides Adam.

    Megatron's distributed optimizer on torch's own Adam trains, but cannot resume exactly: its
    state is empty before the first step, and all parameters share one `step` tensor.
    """
    from megatron.core.optimizer import distrib_optimizer

    return bool(distrib_optimizer.HAVE_APEX_OR_TE)


def _keep_restarts_apart() -> None:
    """Lets ranks that torchrun has started again find nothing of their forerunners.

    torch 2.13 gives them the same store (of the agent) with all that was in it: process groups
    then connect to addresses of dead ranks. All ranks of one agent have the same restart count;
    for several agents output_rules.py demands a store of the ranks' own.
    """
    import torch.distributed as dist

    # A function of the package hides the module.
    rendezvous = importlib.import_module("torch.distributed.rendezvous")
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    original = rendezvous._create_c10d_store
    if restarts == 0 or getattr(original, "is_apart", False):
        return

    def create(*args: Any, **kwargs: Any) -> dist.Store:
        store: dist.Store = original(*args, **kwargs)
        if not rendezvous._torchelastic_use_agent_store():
            return store
        return dist.PrefixStore(f"restart_{restarts}", store)

    create.is_apart = True  # type: ignore[attr-defined]
    rendezvous._create_c10d_store = create  # type: ignore[attr-defined]
