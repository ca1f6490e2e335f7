"""What platform.py changes on a machine without GPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

# In a process of its own: prepare() is for good.
GROUPS = """
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from megatron_rlhfuse import platform

platform.prepare()
platform.prepare()
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
groups = [dist.new_group([0], timeout=timedelta(seconds=7)) for _ in range(4)]
for group in groups:
    dist.barrier(group)
names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
print(names.count("gloo_tcp_loop"))
print(groups[0]._get_backend(platform.device()).options._timeout.total_seconds())
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="changes nothing where there is a GPU")
def test_gloo_groups_share_a_device_and_keep_their_time_outs() -> None:
    done = subprocess.run(
        [sys.executable, "-c", GROUPS], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-2:] == ["1", "7.0"]
