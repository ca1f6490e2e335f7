"""Lets Megatron's own `get_forward_backward_func` lead to the fused pipeline of two models.

A job that calls `install()` once keeps calling what `get_forward_backward_func()` returns: with
one model it gets Megatron's schedule, with lists of two it gets `fused_forward_backward`.

Invariants
- A call whose `forward_step_func` is no list or tuple reaches Megatron with the same arguments.
- Neither wrapping nor installing twice changes anything.
- Importing this file imports neither torch nor Megatron: the patch in patches/ imports it from
  within Megatron.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MARK = "_leads_to_fusion"
"""Attribute of a function that this file has wrapped."""


def with_fusion(forward_backward_func: Callable[..., Any]) -> Callable[..., Any]:
    """`forward_backward_func`, except that a list of forward steps is trained fused.

    The function returned takes Megatron's keywords. Where `forward_step_func` is a list or tuple
    they all go to `fused_forward_backward`, which judges them.
    """
    if hasattr(forward_backward_func, _MARK):
        return forward_backward_func

    @functools.wraps(forward_backward_func)
    def one_model_or_two(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("forward_step_func"), list | tuple):
            from megatron_rlhfuse.pipeline.forward_backward import fused_forward_backward

            return fused_forward_backward(*args, **kwargs)
        return forward_backward_func(*args, **kwargs)

    setattr(one_model_or_two, _MARK, True)
    return one_model_or_two


def install() -> None:
    """Makes Megatron's `get_forward_backward_func` return functions that also train fused.

    The new function takes the old one's place in Megatron and in every module loaded so far that
    has imported it by name, the caller's script included, so it does not matter whether this is
    called before or after those imports. In a tree that carries the patch nothing is left to do.
    """
    from megatron.core.pipeline_parallel import schedules

    if getattr(schedules, "with_fusion", None) is with_fusion:  # the patch put it there
        return
    original = schedules.get_forward_backward_func
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def get_forward_backward_func(*args: Any, **kwargs: Any) -> Callable[..., Any]:
        return with_fusion(original(*args, **kwargs))

    setattr(get_forward_backward_func, _MARK, True)
    _rebind(original, get_forward_backward_func)


def _rebind(old: object, new: object) -> None:
    """Puts `new` where a loaded module's namespace holds `old`, under whatever name."""
    for module in list(sys.modules.values()):
        if not isinstance(module, ModuleType):
            continue
        # Plain attribute access would make a module that loads itself on first use do so.
        namespace = object.__getattribute__(module, "__dict__")
        for name in [name for name, value in list(namespace.items()) if value is old]:
            namespace[name] = new
