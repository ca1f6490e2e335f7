"""Bad input and broken ranks: a clear error on every rank, in time, and nothing hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.conftest import REPOSITORY, RunRanks
from tests.distributed.fused_fault_checks import (
    FAULTY,
    RANKS,
    TIMEOUT,
    check_faults,
    check_refusals,
)

SLACK = 4.0
"""Seconds: ranks share cores, and do not begin a step at the same moment."""

# By name of a plan file or layout: what the message must say.
REFUSED = {
    "devices": "the plan is for 4 devices, this job has 2",
    "layout": "models[1].pipelines: the plan has [[0, 1]], critic runs on [[1, 0]]",
    "swapped": "models[0].micro_batches: the plan has 3, actor runs 4",
    "counts": "models[1].micro_batches: the plan has 4, critic runs 3",
    "one model": "the plan is for 1 model(s), this job trains actor and critic",
    "deadlock": "a deadlock: a0B1 on device 0 waits for a0B1 on device 1",
    "sequence": "device 0, position 0 (a0F1): micro-batches must stay in sequence",
    "twice": "device 0, position 1 (a0F0): stands here more than once",
    "numbers": "makespan: the file says",
    "not JSON": "not JSON",
    "not text": "not JSON",
    "missing": "No such file or directory",
}
LAYOUTS = {
    "no part": "critic has no part on rank 1",
    "own model": "critic: 2 ranks do not fill 1 replicas x 1 stages x 1 tensor parts",
    "crossing": "passes a device twice",
}


@pytest.fixture(scope="module")
def refusals(run_ranks: RunRanks, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(check_refusals, 2, str(tmp_path_factory.mktemp("plans")), timeout=300)


@pytest.fixture(scope="module")
def faults(run_ranks: RunRanks) -> list[dict[str, Any]]:
    return run_ranks(check_faults, RANKS, timeout=300)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    return _errors_of_survivors(tmp_path_factory.mktemp("killed"))


def test_a_plan_for_the_job_is_run_from_the_first_step(refusals: Any) -> None:
    for found in refusals:
        assert found["right"]["type"] == found["right"]["again"]["type"] == "none"
        assert found["right"]["source"] == "file"


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_cannot_be_run_is_refused_before_the_step(refusals: Any, name: str) -> None:
    found = [each[name] for each in refusals]
    for each in found:
        assert REFUSED[name] in each["text"]
        assert each["text"] == found[0]["text"]
        assert each["forwards"] == 0
        assert each["again"]["text"] == each["text"]
        assert each["answer"] == len(found)


def test_numbers_of_micro_batches_have_plans_of_their_own(refusals: Any) -> None:
    for found in refusals:
        assert found["steps"] == {
            "micro_batches": [[4, 3], [2, 5], [4, 3]],
            "measured": [False, True, True],
        }


DISAGREEMENTS = {
    "other counts": "num_microbatches of critic: ranks have [3, 4]",
    "no micro-batch": "num_microbatches of critic: ranks have [0, 3]",
    "lengths": "seq_length, micro_batch_size or pipeline_dtype of critic",
    "forward only": "forward_only",
}


@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_ranks_that_want_different_steps_all_learn_of_it(refusals: Any, name: str) -> None:
    found = [each[name] for each in refusals]
    for each in found:
        assert each["type"] == "ValueError"
        assert DISAGREEMENTS[name] in each["text"]
        assert (each["answer"], each["next"]) == (len(found), "none")


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_that_cannot_be_fused_are_refused_on_every_rank(refusals: Any, name: str) -> None:
    found = [each[name] for each in refusals]
    for each in found:
        assert each["type"] == "LayoutError"
        assert LAYOUTS[name] in each["text"]
        assert each["answer"] == len(found)


def test_who_waits_for_a_rank_that_hangs_gives_up_in_time(faults: Any) -> None:
    found = [each["hang"] for each in faults]
    assert [each["before"] for each in found] == ["none"] * RANKS
    for rank, peer in ((0, 1), (2, 1), (3, 2)):
        _check_place(found[rank], rank, peer)
        assert f"nothing came from it for {TIMEOUT:g} s" in found[rank]["text"]
        assert TIMEOUT - 0.1 <= found[rank]["seconds"] < TIMEOUT + SLACK
    assert "WAIT a0F1: actor, stage 2, micro-batch 1" in found[2]["text"]


def test_a_rank_that_wakes_up_too_late_learns_that_it_was_given_up(faults: Any) -> None:
    found = faults[FAULTY]["hang"]
    _check_place(found, FAULTY, found["peer"])
    assert "the connection failed" in found["text"]


def test_the_error_of_a_forward_keeps_its_type_and_says_where(faults: Any) -> None:
    found = faults[FAULTY]["exception"]
    assert (found["type"], found["text"]) == ("ValueError", "bad sample 17")
    assert "on rank 1: FORWARD a0F1: actor, stage 1, micro-batch 1" in found["notes"][0]


def test_who_waits_for_a_rank_that_failed_gives_up_in_time(faults: Any) -> None:
    for rank, peer in ((0, 1), (2, 1), (3, 2)):
        found = faults[rank]["exception"]
        _check_place(found, rank, peer)
        assert found["seconds"] < TIMEOUT + SLACK


@pytest.mark.parametrize("fault", ["hang", "exception"])
def test_a_step_after_one_that_broke_fails_in_time(faults: Any, fault: str) -> None:
    for found in faults:
        assert found[fault]["again"]["type"] != "none"
        assert found[fault]["again"]["seconds"] < TIMEOUT + SLACK
        assert found[fault]["answer"] == RANKS


def test_a_rank_that_is_killed_ends_the_others_waits_in_time(
    killed: dict[int, dict[str, Any]],
) -> None:
    assert sorted(killed) == [0, 2, 3]
    for rank, peer in ((0, 1), (2, 1), (3, 2)):
        _check_place(killed[rank], rank, peer)
        assert killed[rank]["seconds"] < TIMEOUT + SLACK


def test_neighbours_of_a_killed_rank_see_its_connection_close(
    killed: dict[int, dict[str, Any]],
) -> None:
    for rank in (0, 2):
        assert "the connection failed: " in killed[rank]["text"]
    assert f"nothing came from it for {TIMEOUT:g} s" in killed[3]["text"]


def _check_place(found: dict[str, Any], rank: int, peer: int) -> None:
    assert found["type"] == "PipelineError"
    assert (found["rank"], found["peer"]) == (rank, peer)
    assert f"rank {rank}, instruction " in found["text"]
    assert f"({found['instruction']}, rank {peer} at the other end)" in found["text"]
    assert "micro-batch" in found["instruction"]


def _errors_of_survivors(folder: Path) -> dict[int, dict[str, Any]]:
    """Runs `check_kill`; no torchrun: it would end the others as soon as one is gone."""
    script = REPOSITORY / "tests" / "distributed" / "fused_fault_checks.py"
    processes = []
    try:
        for rank in range(RANKS):
            with (folder / f"log-{rank}").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(script), str(folder), str(rank)],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
                    )
                )
        deadline = time.monotonic() + 200
        status = [each.wait(max(0.1, deadline - time.monotonic())) for each in processes]
    finally:
        for each in processes:
            each.kill()
            each.wait()
    logs = "\n".join((folder / f"log-{rank}").read_text()[-1500:] for rank in range(RANKS))
    assert status == [-signal.SIGKILL if rank == FAULTY else 0 for rank in range(RANKS)], logs
    return {
        int(path.name.removeprefix("error-")): json.loads(path.read_text())
        for path in folder.glob("error-*")
    }
