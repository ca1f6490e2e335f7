"""A fused step gives the losses and gradients of Megatron's own schedule, whatever its plan."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.fused_checks import CASES, RANKS, all_names, check_fused


@pytest.fixture(scope="module")
def results(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    by_rank: list[dict[str, Any]] = [{} for _ in range(RANKS)]
    for names in all_names():
        folder = str(tmp_path_factory.mktemp("fused"))
        for found, more in zip(
            by_rank, run_ranks(check_fused, RANKS, folder, names, timeout=300), strict=True
        ):
            found.update(more)
    return by_rank


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_equal_the_stock_schedule(results: Any, case: str) -> None:
    for rank, found in enumerate(results):
        assert found[case]["wrong"] == [], f"rank {rank}"
        assert found[case]["forward"], f"rank {rank}"


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_has_a_gradient(results: Any, case: str) -> None:
    # Else equal gradients would say nothing.
    assert all(found[case]["smallest"] > 0 for found in results)


@pytest.mark.parametrize("case", CASES)
def test_the_plan_goes_through_its_stages_alike_on_every_rank(results: Any, case: str) -> None:
    sources = results[0][case]["sources"]
    assert all(found[case]["sources"] == sources for found in results)
    assert sources[0] == "1f1b" and sources[-2:] == ["search", "search"]
    # Pipelines in opposite directions always have something to gain; but the plan of the second
    # step knows the first one only, in which a rank that was held up may look like a slow stage.
    planned = sources[1:-2]
    first_greedy = planned.index("greedy")
    assert set(planned[:first_greedy]) <= {"1f1b"} and set(planned[first_greedy:]) == {"greedy"}
