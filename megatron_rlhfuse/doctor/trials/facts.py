"""Asks torch what it is built for and what it drives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


def run(folder: Path) -> dict[str, Any]:
    """The fields of `TorchFacts`."""
    import torch

    from megatron_rlhfuse import platform
    from megatron_rlhfuse.doctor.torch_facts import Gpu, TorchFacts

    gpus, fault = [], ""
    if platform.has_cuda():
        for number in range(torch.cuda.device_count()):
            free, memory = torch.cuda.mem_get_info(number)
            name = torch.cuda.get_device_name(number)
            gpus.append(Gpu(name, torch.cuda.get_device_capability(number), memory, free))
    elif torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except RuntimeError as error:
            fault = str(error).partition("\n")[0]
    has_nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    facts = TorchFacts(
        cuda=torch.version.cuda,
        architectures=tuple(torch.cuda.get_arch_list()),
        nccl=".".join(map(str, torch.cuda.nccl.version())) if has_nccl else None,
        has_nccl=has_nccl,
        gpus=tuple(gpus),
        fault=fault,
    )
    return dataclasses.asdict(facts)
