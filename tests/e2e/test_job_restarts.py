"""A job whose ranks are killed, one stage after the other, and started again by torchrun."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.jobs import INTER, ROOT, run_paced, start_paced
from tests.e2e.kill_in_stages import STAGES
from tests.e2e.runs import assert_equal_weights, metrics, same_everywhere

# A life that goes on from a checkpoint knows no rates in its first iteration, and seldom migrates.
ITERATIONS = 6
KILLER = ROOT / "tests" / "e2e" / "kill_in_stages.py"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_paced(
        tmp_path_factory.mktemp("undisturbed"), rlhfuse_fusion="none", train_iters=ITERATIONS
    )


@pytest.mark.timeout(900)
def test_a_rank_that_is_killed_in_every_stage_changes_nothing(
    undisturbed: Path, tmp_path: Path
) -> None:
    killed = tmp_path / "killed"
    killed.mkdir()
    save = tmp_path / "checkpoints"
    job = start_paced(
        tmp_path,
        environment={"RLHFUSE_TEST_KILLED": str(killed), "RLHFUSE_TEST_SAVE": str(save)},
        program=KILLER,
        torchrun=["--max-restarts", str(len(STAGES))],
        **{**INTER, "rlhfuse_fusion": "both"},
        rlhfuse_plan_cache="none",
        save=save,
        save_interval=1,
        rlhfuse_auto_resume=True,
        train_iters=ITERATIONS,
    )
    assert job.wait(timeout_s=600) == 0, job.output
    job.assert_nothing_left()

    assert {each.name for each in killed.iterdir()} == set(STAGES)
    assert job.output.count("resumed after iteration") == len(STAGES)
    assert_equal_weights(tmp_path, undisturbed)
    assert same_everywhere(tmp_path) == same_everywhere(undisturbed)
    assert [record["iteration"] for record in metrics(tmp_path)] == [*range(1, ITERATIONS + 1)]


def test_all_nodes_start_again_when_a_rank_of_one_is_killed(
    undisturbed: Path, tmp_path: Path
) -> None:
    save = tmp_path / "checkpoints"
    job = start_paced(
        tmp_path,
        # As output_rules.py demands it.
        environment={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
        nodes=2,
        elastic=True,
        torchrun=["--max-restarts", "1"],
        rlhfuse_fusion="none",
        save=save,
        save_interval=1,
        rlhfuse_auto_resume=True,
        train_iters=ITERATIONS,
    )
    job.wait_for(f"iteration 1/{ITERATIONS}")
    job.ranks()[1].kill()
    assert job.wait() == 0, job.output
    job.assert_nothing_left()
    assert "resumed after iteration" in job.output
    assert_equal_weights(tmp_path, undisturbed)
    assert same_everywhere(tmp_path) == same_everywhere(undisturbed)
