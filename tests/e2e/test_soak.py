"""Two hundred short iterations with everything fused: nothing that a process holds grows."""

from __future__ import annotations

import statistics as st
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from tests.e2e.jobs import INTER, KV, Job, shared_memory
from tests.e2e.runs import metrics, migrated

ITERATIONS = 200
EARLY = range(50, 100)
LATE = range(150, ITERATIONS)
"""Iterations that are compared."""

LEAK_BYTES = 40_000
"""Of an iteration, at most: allocators and logs of a process move it by a tenth of that. The
smallest thing an iteration could leave, a micro-batch's tensors or a sample's blocks, is more."""


class Holding(NamedTuple):
    """What a process held at a moment."""

    iteration: int
    memory: int
    """Bytes that are its own."""
    descriptors: int
    shared: int
    """Files in /dev/shm."""


Watched = Mapping[int, list[Holding]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("soak")


@pytest.fixture(scope="module")
def watched(run: Path) -> Watched:
    """By process, of ranks and engines: what it held, every second."""
    job = Job(
        run,
        **{**INTER, **KV, "rlhfuse_fusion": "both"},
        rollout_batch_size=8,
        global_batch_size=8,
        micro_batch_size=2,
        rollout_max_new_tokens=16,
        rollout_pace=0.01,  # else a tail is over before it pays to migrate it
        train_iters=ITERATIONS,
        lr=1e-5,
        rlhfuse_plan_cache="none",
        rlhfuse_plan_seconds=1,
        save=run / "checkpoints",
        save_interval=50,
        save_retain_interval=ITERATIONS,
    )
    job.wait_for("run folder")
    found: defaultdict[int, list[Holding]] = defaultdict(list)
    watched = [*job.ranks(), *(job.engine(rank) for rank in range(2))]
    while job.process.poll() is None:
        file = run / "metrics.jsonl"
        iteration = file.read_text().count("\n") if file.exists() else 0
        for process in watched:
            holding = _holding(process, iteration)
            if holding is not None:
                found[process.pid].append(holding)
        time.sleep(1.0)
    assert job.wait() == 0, job.output
    job.assert_nothing_left()
    return found


def _holding(process: psutil.Process, iteration: int) -> Holding | None:
    try:
        memory = process.memory_full_info().uss
        return Holding(iteration, memory, process.num_fds(), len(shared_memory(process.pid)))
    except psutil.Error:  # it has ended
        return None


def test_the_job_does_all_it_can(run: Path, watched: Watched) -> None:
    records = metrics(run)
    assert [record["iteration"] for record in records] == [*range(1, ITERATIONS + 1)]
    assert {record["fusion"] for record in records} == {"both"}
    assert len(migrated(run)) > ITERATIONS // 20
    assert sum(record.get("engine_restarts", 0) for record in records) == 0
    assert [each.name for each in (run / "checkpoints").glob("iter_*")] == ["iter_0000200"]


def test_nothing_grows(watched: Watched) -> None:
    assert len(watched) == 4
    for pid, holdings in watched.items():
        early, late = (
            [each for each in holdings if each.iteration in span] for span in (EARLY, LATE)
        )
        assert len(early) >= 5 and len(late) >= 5, pid
        # Not the most: a file that is being written may be seen in one span alone.
        for field in ("descriptors", "shared"):
            held = [st.median(getattr(each, field) for each in span) for span in (early, late)]
            assert held[1] <= held[0], (pid, field, held)
        growth = st.median(e.memory for e in late) - st.median(e.memory for e in early)
        assert growth < LEAK_BYTES * (LATE.start - EARLY.start), (pid, growth)
