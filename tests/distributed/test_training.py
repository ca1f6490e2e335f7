"""PPO's updates on Megatron, in many layouts, against plain torch on transformers models.

The reference has nothing of Megatron: whole mini-batches on one process, the losses of rlhf/,
autograd, torch's AdamW and clipping. One launch of four ranks runs every case; the tests read
their part of its results.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.training_checks import CASES, LONG_CASE, check_training
from tests.distributed.training_reference import STEPS, Results, learning_rate

RANKS = 4
# float32 sums in another order; a wrong factor anywhere is off by far more.
WEIGHT_TOLERANCE = 1e-6
UPDATE_TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    return run_ranks(check_training, RANKS, str(tmp_path_factory.mktemp("job")), timeout=300)


@pytest.mark.parametrize("case", CASES)
def test_weights_equal_those_of_plain_torch(results: list[Results], case: str) -> None:
    errors = results[0]["cases"][case]["errors"]
    assert {name.split(".")[0] for name in errors} == {"actor", "critic"}
    for name, (weight, update) in errors.items():
        assert weight < WEIGHT_TOLERANCE, name
        assert update < UPDATE_TOLERANCE, name


@pytest.mark.parametrize("case", CASES)
def test_replicas_hold_equal_weights(results: list[Results], case: str) -> None:
    for model in ("actor", "critic"):
        parts = [rank["cases"][case]["parts"][model] for rank in results]
        for place, total in parts:
            assert [t for p, t in parts if p == place] == [total] * [p for p, _ in parts].count(
                place
            )


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_the_whole_mini_batch(results: list[Results], case: str) -> None:
    updates = results[0]["cases"][case]["updates"]
    for update, expected in zip(updates, results[0]["expected"], strict=False):
        for model in ("actor", "critic"):
            assert len(update[model]) == STEPS
            for step, wanted in zip(update[model], expected[model], strict=True):
                assert step.keys() == wanted.keys()
                for name, value in wanted.items():
                    # A rounding error may put one token on the other side of a bound.
                    slack = 0.02 if name.endswith("fraction") else 1e-5
                    assert step[name] == pytest.approx(value, rel=1e-4, abs=slack), name


def test_metrics_are_equal_on_every_rank(results: list[Results]) -> None:
    for case in CASES:
        everywhere = [rank["cases"][case]["updates"] for rank in results]
        assert everywhere == everywhere[:1] * RANKS, case


def test_the_reference_clips_its_gradients(results: list[Results]) -> None:
    # Else the tests above would say nothing of clipping.
    for update in results[0]["expected"]:
        assert all(step["grad_norm"] > 0.5 for step in update["actor"])
        assert all(step["grad_norm"] > 0.3 for step in update["critic"])


def test_learning_rates_count_iterations(results: list[Results]) -> None:
    first, second = results[0]["cases"][LONG_CASE]["updates"]
    rates = [step["learning_rate"] for step in first["actor"] + second["actor"]]
    assert rates == pytest.approx([learning_rate(step) for step in range(2 * STEPS)])
    assert rates[0] == pytest.approx(2e-4) and rates[STEPS] == pytest.approx(6e-4)
    assert {step["learning_rate"] for step in first["critic"] + second["critic"]} == {4e-4}


def test_early_stop_stops_the_actor_alone_and_for_one_iteration(results: list[Results]) -> None:
    for rank in results:
        stop = rank["early stop"]
        assert stop["stopped"]
        assert [len(update["actor"]) for update in stop["updates"]] == [1, 1]
        assert [len(update["critic"]) for update in stop["updates"]] == [STEPS, STEPS]
        assert stop["steps"] == 2


def test_early_stop_does_not_hold_back_thelearning_rate(results: list[Results]) -> None:
    (first,), (second,) = (update["actor"] for update in results[0]["early stop"]["updates"])
    assert first["learning_rate"] == pytest.approx(learning_rate(0))
    assert second["learning_rate"] == pytest.approx(learning_rate(STEPS))


def test_critic_warm_up_leaves_the_actor_alone(results: list[Results]) -> None:
    for rank in results:
        warm_up = rank["warm-up"]
        assert warm_up["same"] == [
            {"actor": True, "critic": False},
            {"actor": False, "critic": False},
        ]
        first, second = warm_up["actor steps"]
        assert not first and len(second) == STEPS
        # Iterations count for the learning rate, whoever is trained in them.
        assert second[0]["learning_rate"] == pytest.approx(learning_rate(STEPS))


def test_a_plain_step_is_as_long_as_the_clipped_gradient(results: list[Results]) -> None:
    lengths = results[0]["sgd"]
    assert lengths["actor"] == pytest.approx(2e-4 * 0.5, rel=1e-3)
    assert lengths["critic"] == pytest.approx(4e-4 * 0.3, rel=1e-3)


def test_bfloat16_has_nearly_the_gradients_of_float32(results: list[Results]) -> None:
    found, expected = results[0]["bfloat16"], results[0]["expected"][0]
    assert found["dtypes"] == ["torch.bfloat16"]
    for model, norm in found["norms"].items():
        assert norm == pytest.approx(expected[model][0]["grad_norm"], rel=0.1), model
