"""One rank of the trial of collectives: FOLDER PARENT_PID, the rest from torchrun."""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

from megatron_rlhfuse.doctor.check import last_line
from megatron_rlhfuse.doctor.trials.collectives import ERROR
from megatron_rlhfuse.rollout.lifetime import die_with_parent

ELEMENTS = 1 << 20
TIMEOUT = timedelta(seconds=60)


def main() -> int:
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    die_with_parent(parent)
    try:
        _all_reduce()
    except Exception as fault:
        (folder / ERROR.format(rank=os.environ["RANK"])).write_text(last_line(str(fault)))
        return 1
    return 0


def _all_reduce() -> None:
    import torch
    import torch.distributed as dist

    from megatron_rlhfuse import platform

    platform.set_up_rank(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(platform.backend(), timeout=TIMEOUT)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = [(platform.backend(), dist.group.WORLD, platform.device())]
    if platform.backend() != "gloo":
        gloo = dist.new_group(backend="gloo", timeout=TIMEOUT)
        groups.append(("gloo", gloo, torch.device("cpu")))
    for backend, group, device in groups:
        numbers = torch.full((ELEMENTS,), float(rank + 1), device=device)
        dist.all_reduce(numbers, group=group)
        wanted = ranks * (ranks + 1) / 2
        if not bool((numbers == wanted).all()):
            raise RuntimeError(f"{backend}: a sum of {ranks} ranks is not {wanted:g} everywhere")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
