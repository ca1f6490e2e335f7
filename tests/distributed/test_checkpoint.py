"""Checkpoints of whole jobs: exact resume, a kill while saving, another layout, refusals.

Two launches. The first runs four iterations without a break, saves after the second, and is killed
(-9) while it saves after the fourth. The second one, in new processes, resumes from what it left.
Samples come from a stub; everything else is the job's own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.checkpoint_checks import resume, run_and_be_killed
from tests.distributed.conftest import run_on_ranks

RANKS = 2
Results = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a job left that was killed while it saved."""
    root = tmp_path_factory.mktemp("job")
    with pytest.raises(pytest.fail.Exception, match="SIGKILL"):
        run_on_ranks(run_and_be_killed, RANKS, str(root), timeout=240)
    return root


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> list[Results]:
    return [json.loads((folder / f"uninterrupted-{r}.json").read_text()) for r in range(RANKS)]


@pytest.fixture(scope="module")
def resumed(folder: Path, uninterrupted: list[Results]) -> list[Results]:
    return run_on_ranks(resume, RANKS, str(folder), timeout=240)


def test_a_kill_while_saving_leaves_the_checkpoint_before_it(resumed: list[Results]) -> None:
    for rank in resumed:
        assert "iter_0000004" in rank["left"] and not rank["half is whole"]
        assert rank["started from"] == 2


@pytest.mark.parametrize("iteration", ["2", "3", "4"])
def test_resuming_is_exact(
    uninterrupted: list[Results], resumed: list[Results], iteration: str
) -> None:
    for once, twice in zip(uninterrupted, resumed, strict=True):
        assert twice["digests"][iteration] == once[iteration]


def test_the_digests_tell_states_apart(uninterrupted: list[Results]) -> None:
    for rank in uninterrupted:
        changing = {name for name in rank["2"] if "random" not in name}
        assert changing >= {"data", "kl", "steps", "actor optimizer", "critic scheduler"}
        assert all(rank["2"][name] != rank["3"][name] for name in changing)


@pytest.mark.parametrize("job", ["bfloat16", "warm-up"])
def test_resuming_is_exact_with_other_flags(
    uninterrupted: list[Results], resumed: list[Results], job: str
) -> None:
    for once, twice in zip(uninterrupted, resumed, strict=True):
        assert twice["digests"][job] == once[job]


def test_saving_starts_no_process_that_a_killed_rank_would_leave(resumed: list[Results]) -> None:
    assert [rank["child processes"] for rank in resumed] == [[], []]


def test_the_half_written_checkpoint_is_replaced(resumed: list[Results]) -> None:
    assert {rank["latest"] for rank in resumed} == {"4\n"}


def test_another_layout_goes_on_from_the_same_place(resumed: list[Results]) -> None:
    for rank in resumed:
        other = rank["other layout"]
        assert other["iteration"] == 4
        assert other["loaded"] == {"actor": 0, "critic": 0}
        assert max(other["trained on"].values()) < 1e-6


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("no folder", ["--load", "nowhere", "holds no checkpoint"]),
        ("no tracker", ["--load", "empty", "holds no checkpoint", "leave the flag out"]),
        ("dangling tracker", ["dangling", "'7'", "names no checkpoint"]),
        ("garbled tracker", ["garbled", "'two'", "names no checkpoint"]),
        ("torn", ["torn/iter_0000002"]),
        ("truncated", ["truncated/iter_0000004 is damaged", "__0_0.distcp, __1_0.distcp"]),
        (
            "flipped byte",
            ["flipped/iter_0000004 is damaged: __1_0.distcp is not", "iteration.txt: 2"],
        ),
        ("lost file", ["lost/iter_0000004 is damaged: __0_0.distcp is not"]),
        ("sums unreadable", ["no sums/iter_0000004/integrity.json is damaged"]),
        (
            "another model",
            ["checkpoints/iter_0000004", "another actor", "qwen3", "--actor-model"],
        ),
        ("no critic", ["without-critic/iter_0000001", "holds no critic", "--advantage-estimator"]),
        ("another schedule", ["actor", "checkpoints", "--lr-decay-iters", "--train-iters"]),
    ],
)
def test_what_does_not_fit_is_refused(resumed: list[Results], wrong: str, words: list[str]) -> None:
    for rank in resumed:
        assert all(word in rank["refusals"][wrong] for word in words), rank["refusals"][wrong]


def test_the_tracker_is_written_last(resumed: list[Results]) -> None:
    assert {rank["crash before the tracker"] for rank in resumed} == {"iter_0000004"}


def test_a_checkpoint_without_sums_is_loaded(resumed: list[Results]) -> None:
    """Of a job that wrote none."""
    assert {rank["refusals"]["without sums"] for rank in resumed} == {"accepted"}


def test_rank_0_says_what_is_loaded(resumed: list[Results]) -> None:
    """A shared file system may show others an earlier checkpoint, or none."""
    for rank in resumed:
        assert rank["disagreement"] == {"load": "checkpoints", "iteration": 4}


def test_a_full_disk_costs_no_more_than_that_checkpoint(resumed: list[Results]) -> None:
    full = [rank["full disk"] for rank in resumed]
    for rank in full:
        assert rank["status"] == 1
        assert rank["left"] == [] and rank["latest"] == "iter_0000004"
        assert rank["then"] == "iter_0000008"
    (message,) = (line for rank in full for line in rank["said"])  # of all ranks one speaks
    assert message.startswith("the checkpoint of iteration 8 cannot be written to ")
    assert "rank 1: " in message
    assert message.endswith("; the latest checkpoint is still iter_0000004")
