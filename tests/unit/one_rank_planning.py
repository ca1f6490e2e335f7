"""A job of one rank that answers for all stages of two models: what plans are tested with."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch.distributed as dist

from megatron_rlhfuse.pipeline import autoplan
from megatron_rlhfuse.pipeline.devices import DeviceMap, map_devices, opposite_layout
from megatron_rlhfuse.pipeline.groups import Layout
from megatron_rlhfuse.pipeline.profile import Costs, StageCost

NAMES = ("actor", "critic")
COUNTS = (4, 4)
ACTIVATION = 100.0
COSTS: Costs = (StageCost(0.01, 0.02, ACTIVATION), StageCost(0.012, 0.021, ACTIVATION))
PATIENCE = 60.0
"""Seconds that a test waits for a search: the machine may be busy."""


def opposite(ranks: int) -> DeviceMap:
    """Two models of `ranks` stages, whose pipelines run opposite to each other."""
    layout = Layout.contiguous(ranks, 1, ranks)
    return map_devices(NAMES, [layout, opposite_layout(layout, 1, ranks)])


DEVICES = opposite(4)


def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The body of a fixture: a job of one rank, which answers for all stages."""

    def gather(devices: DeviceMap, mine: Costs, transfer: float) -> Any:
        return [
            [cost] * layout.pp for cost, layout in zip(mine, devices.layouts, strict=True)
        ], transfer

    monkeypatch.setattr(autoplan, "gather_costs", gather)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def is_searching() -> bool:
    """Whether a search is going on in this process."""
    return any(thread.name == "plan search" for thread in threading.enumerate())
