"""RLHF (PPO) on stock Megatron-Core and stock vLLM, built for stage fusion.

The names below are for a Megatron job of one's own. Each is imported when it is first asked for,
so `import megatron_rlhfuse` alone loads neither torch nor Megatron.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_rlhfuse.hook import install
    from megatron_rlhfuse.pipeline.forward_backward import fused_forward_backward, last_step
    from megatron_rlhfuse.pipeline.fused import FusionOptions
    from megatron_rlhfuse.pipeline.rank_layouts import opposite_process_groups

__all__ = [
    "FusionOptions",
    "fused_forward_backward",
    "install",
    "last_step",
    "opposite_process_groups",
]

_MODULE_OF = {
    "FusionOptions": "megatron_rlhfuse.pipeline.fused",
    "fused_forward_backward": "megatron_rlhfuse.pipeline.forward_backward",
    "install": "megatron_rlhfuse.hook",
    "last_step": "megatron_rlhfuse.pipeline.forward_backward",
    "opposite_process_groups": "megatron_rlhfuse.pipeline.rank_layouts",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
