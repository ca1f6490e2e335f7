"""Whole jobs that leave their longest prompts out and train them together later, and that deal
prompts out by how long their responses were.

Which engine makes a sample, beside which others, and what is given up when must not show in what is
learned.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from megatron_rlhfuse.data import Prompt, PromptSampler
from megatron_rlhfuse.migration.dispatch import dispatch_prompts
from megatron_rlhfuse.migration.prompt_lengths import PromptLengths
from megatron_rlhfuse.rollout.prompt_rounds import PromptRounds
from tests.e2e.jobs import INTER, KV, SMALL, TOY, copy_checkpoint, end, run_paced, start_paced
from tests.e2e.runs import (
    assert_equal_weights,
    during,
    metrics,
    same_everywhere,
)

PROMPTS = 8  # of the data and of a rollout batch, so that an epoch is over before an iteration
COPIES = 2
EXTRA = 4  # prompts that an iteration answers beyond those it trains
DEFERRED = [EXTRA, EXTRA, 0, EXTRA]
"""By iteration: after two short rounds those that were left out make up the third."""
SHORT = [1, 2, 4]
TAIL = {
    "rollout_samples_per_prompt": COPIES,
    "rollout_extra_prompts": EXTRA / PROMPTS,
    "rollout_max_num_seqs": 4,  # of the twelve samples that an engine has, more or less
}
LONGEST_FIRST = {"rollout_dispatch": "longest-first"}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    lines = (TOY / "prompts.jsonl").read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:PROMPTS]))
    return path


@pytest.fixture(scope="module")
def plain(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without fusion, prompts dealt out one by one."""
    run = tmp_path_factory.mktemp("plain")
    return run_paced(run, prompt_data=prompts, rlhfuse_fusion="none", **TAIL)


@pytest.fixture(scope="module")
def fused(prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves after every iteration."""
    run = tmp_path_factory.mktemp("fused")
    return run_paced(
        run,
        prompt_data=prompts,
        **TAIL,
        **INTER,
        **KV,
        **LONGEST_FIRST,
        save=run / "checkpoints",
        save_interval=1,
    )


@pytest.fixture(scope="module")
def resumed(fused: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Goes on after the first iteration of `fused`; at once an engine is killed."""
    run = tmp_path_factory.mktemp("resumed")
    job = start_paced(
        run,
        prompt_data=prompts,
        **TAIL,
        **INTER,
        **KV,
        **LONGEST_FIRST,
        load=copy_checkpoint(fused, 1, run),
    )
    job.wait_for("resumed after iteration 1")
    time.sleep(0.4)
    job.engine(rank=1).kill()
    end(job)
    return run


RUNS = ["plain", "fused", "resumed"]


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest) -> Path:
    folder: Path = request.getfixturevalue(request.param)
    return folder


def learned_alike(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in record.items() if k != "engine_restarts"}
        for record in same_everywhere(run)
    ]


@pytest.mark.parametrize("name", ["fused", "resumed"])
def test_neither_fusion_nor_dispatch_shows_in_what_is_learned(
    request: pytest.FixtureRequest, plain: Path, name: str
) -> None:
    folder = request.getfixturevalue(name)
    assert_equal_weights(folder, plain)
    assert learned_alike(folder) == learned_alike(plain)


def test_the_longest_prompts_are_left_out_and_trained_together(run: Path) -> None:
    records = metrics(run)
    assert [record["deferred_prompts"] for record in records] == DEFERRED
    for record in records:
        assert record["consumed_samples"] == PROMPTS * COPIES * record["iteration"]
        assert (record["discarded_tokens"] > 0) == (record["deferred_prompts"] > 0)
    *_, together, _ = (record["response_length_mean"] for record in records)
    assert together > max(records[n - 1]["response_length_mean"] for n in SHORT)


def test_only_a_round_without_left_out_prompts_may_migrate(fused: Path) -> None:
    # Whether a sample does depends on time.
    may_migrate = ["migrated_samples" in record for record in metrics(fused)]
    assert may_migrate == [deferred == 0 for deferred in DEFERRED]
    for iteration in SHORT:
        assert not [e for e in during(fused, iteration) if e["cat"] == "migration"]


def dealt(run: Path, iteration: int) -> dict[int, int]:
    """By sample that was made whole: the rank, and so the instance, that made it."""
    spans = [e for e in during(run, iteration) if e["cat"] == "sample"]
    return {int(e["name"].removeprefix("sample ")): e["pid"] for e in spans}


def test_prompts_are_dealt_out_by_what_earlier_lengths_say(plain: Path, fused: Path) -> None:
    data = [Prompt(index, (1,), "", {}) for index in range(PROMPTS)]
    sampler = PromptSampler(PROMPTS, PROMPTS + EXTRA, seed=SMALL["seed"])  # type: ignore[arg-type]
    rounds, known = PromptRounds(data, sampler, COPIES, PROMPTS), PromptLengths()  # type: ignore[arg-type]
    for iteration in range(1, len(DEFERRED) + 1):
        batch = rounds.next_batch(iteration)
        expected = [known.expected(drawn.prompt.index) for drawn in batch.drawn]
        for run, dispatch in ((plain, "round-robin"), (fused, "longest-first")):
            by_instance = dispatch_prompts(expected, 2, dispatch)  # type: ignore[arg-type]
            wanted = {
                sample: instance
                for instance, prompts in enumerate(by_instance)
                for prompt in prompts
                for sample in batch.samples(prompt)
            }
            made = dealt(run, iteration)
            assert len(made) >= PROMPTS * COPIES
            if iteration in SHORT:  # in the other one they may have migrated
                assert made == {sample: wanted[sample] for sample in made}
        spans = [e for e in during(fused, iteration) if e["cat"] == "sample"]
        lengths = {int(e["name"].removeprefix("sample ")): e["args"]["tokens"] for e in spans}
        kept = rounds.settle(batch, lengths)
        known.add((batch[sample].index, lengths[sample]) for sample in kept)


def test_a_resumed_job_deals_prompts_out_as_one_that_was_not_stopped(
    fused: Path, resumed: Path
) -> None:
    for iteration in SHORT[1:]:
        once, again = dealt(fused, iteration), dealt(resumed, iteration)
        # Which of those that are left out are made whole depends on time.
        both = once.keys() & again.keys()
        assert len(both) >= PROMPTS * COPIES
        assert {sample: once[sample] for sample in both} == {each: again[each] for each in both}


def test_an_engine_was_killed_while_it_generated(resumed: Path) -> None:
    assert [record["engine_restarts"] for record in metrics(resumed)] == [0, 1, 0, 0]
    begun = [e["ts"] for e in during(resumed, 2) if e["cat"] == "sample" and e["pid"] == 1]
    # A new engine takes seconds to start, then begins what the old one had not finished.
    assert max(begun) > min(e["ts"] for e in during(resumed, 2)) + 1e6


def test_a_job_that_is_done_says_so(fused: Path, prompts: Path, tmp_path: Path) -> None:
    job = start_paced(
        tmp_path, prompt_data=prompts, **TAIL, **INTER, load=copy_checkpoint(fused, 4, tmp_path)
    )
    end(job)
    assert "resumed after iteration 4" in job.output
    assert f"nothing to do: --train-iters is {len(DEFERRED)}" in job.output
    assert_equal_weights(tmp_path, fused)
