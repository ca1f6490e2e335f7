"""All-reduce between the ranks that torchrun starts, over this machine's backends."""

from __future__ import annotations

import os
from pathlib import Path

RANKS = "collectives_rank"
ERROR = "rank-{rank}.txt"


def run(folder: Path) -> str:
    """Two ranks; one on a single GPU, which NCCL does not give to two."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    from megatron_rlhfuse import platform
    from megatron_rlhfuse.doctor.check import last_line

    ranks = _ranks()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun says a paragraph where it is not set
    command = ["--standalone", "--nproc-per-node", str(ranks), "-m", f"{__package__}.{RANKS}"]
    try:
        main([*command, str(folder), str(os.getpid())])
    except ChildFailedError as fault:
        for rank in range(ranks):
            said = folder / ERROR.format(rank=rank)
            if said.exists():
                raise RuntimeError(f"rank {rank}: {said.read_text()}") from fault
        raise RuntimeError(f"torchrun: {last_line(str(fault))}") from fault
    backends = "NCCL and Gloo" if platform.has_cuda() else "Gloo"
    return f"all-reduce of {ranks} {'ranks' if ranks > 1 else 'rank'} over {backends}"


def _ranks() -> int:
    import torch

    from megatron_rlhfuse import platform

    return min(2, torch.cuda.device_count()) if platform.has_cuda() else 2
