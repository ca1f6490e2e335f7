"""Inference instances against transformers, in three layouts, before and after training.

One launch of two ranks; samples of random tokens go through the job's own queue.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.inference_checks import Results, check_inference

RANKS = 2
LAYOUTS = ("two instances", "one pipeline", "one with TP")
TOLERANCE = 1e-4  # nats, and units of value: float32


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(check_inference, RANKS, str(tmp_path_factory.mktemp("job")), timeout=240)


@pytest.fixture(params=LAYOUTS)
def result(results: list[Results], request: pytest.FixtureRequest) -> Results:
    """One layout's results; they are the same on every rank."""
    of_ranks = [rank[request.param] for rank in results]
    assert of_ranks == of_ranks[:1] * RANKS
    return of_ranks[0]


def test_scores_equal_those_of_transformers(result: Results) -> None:
    assert set(result["errors"]) == {"log_probs", "reference_log_probs", "values"}
    assert max(result["errors"].values()) < TOLERANCE


def test_score_is_the_reward_model_plus_the_function(result: Results) -> None:
    assert result["sums"] == pytest.approx(result["wanted sums"], abs=TOLERANCE)


def test_scores_do_not_depend_on_instance_or_order(result: Results) -> None:
    assert result["ways"] and all(result["ways"])


def test_samples_scored_together_have_nearly_the_same_scores(result: Results) -> None:
    assert max(result["together"].values()) < TOLERANCE


def test_scores_are_those_of_the_trained_weights_after_training(result: Results) -> None:
    change = result["change"]
    assert change["log_probs"] > 0.01 and change["values"] > 0.01
    assert max(result["errors after training"].values()) < TOLERANCE


def test_the_reference_does_not_move(result: Results) -> None:
    assert result["change"]["reference_log_probs"] == 0


def test_scoring_leaves_the_models_in_training_mode(result: Results) -> None:
    assert result["in training mode"] == [True, True]
