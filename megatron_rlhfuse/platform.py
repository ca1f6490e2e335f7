"""The machine under the job: GPUs with NCCL, or CPU cores with Gloo.

This is the only file that asks whether there is a GPU. Megatron-Core names `torch.cuda`
everywhere; on a machine without GPUs `prepare()` puts stand-ins under those names, so that the
stock schedules, optimizers and checkpoints run unmodified on CPU tensors.

Invariants
- With CUDA present `prepare()` changes nothing at all.
- Without CUDA, `torch.cuda.is_available()` keeps answering False; nothing claims a GPU.
- `prepare()` is idempotent, and edits no file of another package.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import types
from collections import defaultdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_redirect: TorchFunctionMode | None = None


def has_cuda() -> bool:
    """Whether this process drives GPUs."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device this rank's tensors live on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_cuda() else _CPU


def backend() -> str:
    """The torch.distributed backend of this machine."""
    return "nccl" if has_cuda() else "gloo"


def device_name() -> str:
    """What the device calls itself; for a CPU, the machine and its cores."""
    if has_cuda():
        return torch.cuda.get_device_name()
    return f"{os.uname().machine} x {os.cpu_count()}"


def default_flags() -> dict[str, Any]:
    """Megatron flags (by attribute name) that this machine needs; a user's own value wins."""
    if has_cuda():
        return {}
    return {
        "distributed_backend": "gloo",
        "use_cpu_initialization": True,
        "masked_softmax_fusion": False,
        "bias_swiglu_fusion": False,
        "bias_gelu_fusion": False,
        "bias_dropout_fusion": False,
        "gradient_accumulation_fusion": False,
        "attention_softmax_in_fp32": True,
    }


def receives_ahead() -> int:
    """Receives of a channel that a rank posts before it waits for the first of them.

    A second NCCL receive queues behind the first one; with CUDA_DEVICE_MAX_CONNECTIONS=1 all that
    is launched after it would wait too, until the first is done.
    """
    return 1 if has_cuda() else 2


def engine_defaults() -> dict[str, Any]:
    """How a vLLM engine runs here: device, dtype, and whether it can give memory back."""
    if has_cuda():
        return {"device": "cuda", "dtype": "bfloat16", "enforce_eager": False, "can_sleep": True}
    return {"device": "cpu", "dtype": "float32", "enforce_eager": True, "can_sleep": False}


def visible_devices(local_rank: int, count: int) -> tuple[int, ...] | None:
    """The GPUs of an engine of `count` workers led by `local_rank`; None where there are none."""
    return tuple(range(local_rank, local_rank + count)) if has_cuda() else None


def peak_resident_bytes(pid: int | None = None) -> int:
    """Peak resident memory of a process of this machine; 0 once it is gone. None: this one."""
    try:
        status = Path(f"/proc/{pid or 'self'}/status").read_text()
    except FileNotFoundError:
        return 0
    kib = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(kib.group(1)) * 1024 if kib else 0


def free_memory() -> float:
    """Bytes of device memory that no tensor holds; host memory is not counted, so inf on a CPU."""
    if not has_cuda():
        return math.inf
    free, _ = torch.cuda.mem_get_info()
    return float(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def synchronize() -> None:
    """Waits for this rank's GPU; on CPU everything is done already."""
    if has_cuda():
        torch.cuda.synchronize()


def wait_for(work: Any, timeout: timedelta) -> None:
    """Waits for a transfer of torch.distributed; on a GPU only what is queued from now on waits.

    With a time-out NCCL's work would hold up the host, for every hop.
    """
    if has_cuda():
        work.wait()
    else:
        work.wait(timeout)


def release_memory() -> None:
    """Gives cached GPU memory back, so that an engine on the same GPU can take it."""
    if has_cuda():
        torch.cuda.empty_cache()


def set_up_rank(local_rank: int) -> None:
    """Binds this process to its GPU; on CPU keeps one thread per rank (cores are shared)."""
    if has_cuda():
        torch.cuda.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def prepare() -> None:
    """Makes stock Megatron run on this machine. Call once, before any model is built."""
    global _redirect
    # What Megatron insists on where it overlaps tensor-parallel communication with compute.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if has_cuda() or _redirect is not None:
        return
    # No compiler is promised on a CPU machine; the fallback eager code is the same arithmetic.
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # dynamo keeps a table of torch.cuda's functions: build it before they are replaced, or it
    # meets one stand-in under several names and raises "Duplicate torch object".
    import megatron.training  # noqa: F401
    import torch._dynamo.trace_rules as trace_rules

    trace_rules.get_torch_obj_rule_map()
    _stand_in_for_cuda()
    _stand_in_for_rng()
    _share_gloo_device()
    _redirect = _RedirectToCpu()
    _redirect.__enter__()


class _RedirectToCpu(TorchFunctionMode):
    """Turns `device="cuda"` into the CPU, and lets optimizers recognise CPU parameters."""

    def __torch_function__(self, func, types_, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if kwargs:
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
            wanted = kwargs.get("device")
            if wanted is not None and str(wanted).startswith("cuda"):
                kwargs["device"] = _CPU
        result = func(*args, **(kwargs or {}))
        # Megatron's optimizers sort parameters by `param.type() == "torch.cuda.FloatTensor"`.
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.", 1)
        return result


class _Stream:
    """Stands for torch.cuda.Stream: everything on a CPU is already in order."""

    device = _CPU

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()


class _Event:
    """Stands for torch.cuda.Event."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None: ...

    def wait(self, *args: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _stand_in_for_cuda() -> None:
    cuda = torch.cuda
    stream = _Stream()
    replaced: dict[str, Any] = {
        "current_device": lambda: _CPU,
        # One device per process: stock initialisation then takes its usual path, on Gloo.
        "device_count": lambda: 1,
        "current_stream": lambda *a, **k: stream,
        "default_stream": lambda *a, **k: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "Stream": _Stream,
        "Event": _Event,
        "memory_stats": lambda *a, **k: defaultdict(int),
        "get_device_name": lambda *a, **k: "cpu",
        "get_device_capability": lambda *a, **k: (10, 0),
        "get_device_properties": lambda *a, **k: types.SimpleNamespace(
            name="cpu", major=10, minor=0, total_memory=1 << 34, multi_processor_count=1
        ),
    }
    for name in ("set_device", "set_stream", "synchronize", "empty_cache"):
        replaced[name] = _nothing
    replaced["reset_peak_memory_stats"] = _nothing
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved"):
        replaced[name] = lambda *a, **k: 0
    replaced["max_memory_reserved"] = lambda *a, **k: 0
    for name, stand_in in replaced.items():
        setattr(cuda, name, stand_in)
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, _nothing)
    stay: Any = lambda self, *a, **k: self  # noqa: E731
    torch.Tensor.cuda = stay  # type: ignore[method-assign]
    torch.nn.Module.cuda = stay  # type: ignore[method-assign]


def _stand_in_for_rng() -> None:
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        torch.set_rng_state(state)

    replaced: dict[str, Any] = {
        "get_rng_state": get_state,
        "set_rng_state": set_state,
        "manual_seed": lambda seed: torch.default_generator.manual_seed(int(seed)),
        # torch.manual_seed itself calls this one: the CPU generator is seeded already.
        "manual_seed_all": _nothing,
    }
    for name, stand_in in replaced.items():
        setattr(torch.cuda, name, stand_in)
    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state


def _share_gloo_device() -> None:
    """Lets all Gloo groups of this process use one device.

    By default each group opens its own, with a thread that wakes a hundred times a second: with
    the groups of two models they keep a core busy that computes nothing.
    """
    gloo: Any = torch.distributed.ProcessGroupGloo
    original = gloo.__init__
    shared: list[Any] = []

    def initialize(
        self: Any,
        store: Any,
        rank: int,
        size: int,
        timeout: timedelta = torch.distributed.default_pg_timeout,
    ) -> None:
        if not shared:
            # Torch's own choice, which heeds GLOO_SOCKET_IFNAME.
            original(self, store, rank, size, timeout)
            shared.extend(self.options._devices)
            return
        options = gloo._Options()
        options._devices = list(shared)
        options._timeout = timeout
        original(self, store, rank, size, options)

    gloo.__init__ = initialize
