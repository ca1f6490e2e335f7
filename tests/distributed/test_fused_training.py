"""Fused steps train what steps one after the other train, bit for bit, in many layouts.

Four ranks, samples made up, no engines. The job that is not fused is what test_training.py
compares with plain torch.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.fused_training_checks import (
    CASES,
    CHECKPOINTS,
    SEARCHED,
    check_checkpoints,
    check_fused_training,
)
from tests.distributed.training_reference import STEPS

Results = dict[str, Any]
CLIPS = {"actor": 0.5, "critic": 0.3}


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """By rank and case."""
    folder = tmp_path_factory.mktemp("fused-training")
    return run_ranks(check_fused_training, 4, str(folder), list(CASES), timeout=400)


@pytest.fixture(scope="module")
def checkpoints(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    folder = tmp_path_factory.mktemp("fused-checkpoints")
    return run_ranks(check_checkpoints, 4, str(folder), timeout=240)


@pytest.mark.parametrize("case", CASES)
def test_weights_are_equal_bit_for_bit(results: list[Results], case: str) -> None:
    for rank in results:
        assert rank[case]["different"] == []
        assert rank[case]["unchanged"] == []


@pytest.mark.parametrize("case", CASES)
def test_metrics_and_gradient_norms_are_equal(results: list[Results], case: str) -> None:
    for rank in results:
        assert rank[case]["fused"] == rank[case]["unfused"]
        assert rank[case]["fused"] == results[0][case]["fused"]


@pytest.mark.parametrize("case", CASES)
def test_the_steps_are_clipped(results: list[Results], case: str) -> None:
    """Where clipping does not bite, an error in a gradient's norm would not show in weights."""
    for name, clip in CLIPS.items():
        steps = [step for update in results[0][case]["fused"] for step in update[name]]
        assert any(step["grad_norm"] > clip for step in steps)


@pytest.mark.parametrize("case", SEARCHED)
def test_the_plan_that_was_searched_for_is_reached(results: list[Results], case: str) -> None:
    for rank in results:
        assert [times["fused_steps"] for times in rank[case]["times"]] == [STEPS, STEPS]
        assert rank[case]["times"][-1]["fusion_plan"] == "search"


@pytest.mark.parametrize("case", SEARCHED)
def test_without_a_trace_only_planning_is_timed(results: list[Results], case: str) -> None:
    measured, unmeasured = results[0][case]["times"]
    assert measured["makespan_s"] > 0 and 0 < measured["bubble_fraction"] < 1
    assert unmeasured.keys() == {"fusion_plan", "fused_steps"}


def test_the_critic_goes_on_by_itself_where_the_actor_stops(results: list[Results]) -> None:
    for rank in results:
        assert rank["early stop"]["fused stopped"] and rank["early stop"]["unfused stopped"]
        for update in rank["early stop"]["fused"]:
            assert (len(update["actor"]), len(update["critic"])) == (1, STEPS)
        assert [times["fused_steps"] for times in rank["early stop"]["times"]] == [1, 1]


def test_the_critic_warms_up_by_itself(results: list[Results]) -> None:
    first, second = results[0]["critic warm-up"]["fused"]
    assert (len(first["actor"]), len(first["critic"])) == (0, STEPS)
    assert (len(second["actor"]), len(second["critic"])) == (STEPS, STEPS)
    warm_up, training = results[0]["critic warm-up"]["times"]
    assert warm_up == {} and training["fused_steps"] == STEPS


@pytest.mark.parametrize("saved", ["saved fused", "saved unfused"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints_are_good_for_both_kinds_of_job(
    checkpoints: list[Results], case: str, saved: str
) -> None:
    for rank in checkpoints:
        found = rank[case][saved]
        assert found["progress"] == {"iteration": 1}
        assert found["loaded"] == []
        assert found["ended"] == []
        assert found["updates"][0] == found["updates"][1]
