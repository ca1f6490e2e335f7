"""The rollout batch with its advantages, against loops over single samples."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.training.experience import (
    AdvantageOptions,
    build_experience,
    mini_batches,
)
from tests.unit.scored_samples import OPTIONS, lengths, scored_samples, seeds

KL = 0.3


def score_of(item: ScoredSample, options: AdvantageOptions) -> float:
    """The score after clipping, then the penalty of a response that was cut."""
    bound = options.reward_clip or math.inf
    cut = item.sample.stop_reason == "length"
    return min(max(item.score, -bound), bound) - options.missing_eos_penalty * cut


def rewards_of(item: ScoredSample, options: AdvantageOptions) -> list[float]:
    """KL penalty at every token, the score at the last one."""
    assert item.reference_log_probs is not None
    beta = KL if options.kl_in_reward else 0.0
    rewards = [
        -beta * (p - q)
        for p, q in zip(item.log_probs.tolist(), item.reference_log_probs.tolist(), strict=True)
    ]
    rewards[-1] += score_of(item, options)
    return rewards


def gae_of(item: ScoredSample, options: AdvantageOptions) -> list[float]:
    """Token by token, from the end."""
    assert item.values is not None
    rewards, values = rewards_of(item, options), item.values.tolist()
    advantages = [0.0] * len(rewards)
    following = next_value = 0.0
    for t in reversed(range(len(rewards))):
        delta = rewards[t] + options.gamma * next_value - values[t]
        advantages[t] = following = delta + options.gamma * options.lam * following
        next_value = values[t]
    return advantages


def check_rows(padded: Tensor, rows: list[list[float]]) -> None:
    """The rows, and zeros behind them."""
    for row, expected in zip(padded, rows, strict=True):
        filled = torch.tensor(expected + [0.0] * (len(row) - len(expected)))
        torch.testing.assert_close(row, filled, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(
    lengths,
    seeds,
    st.booleans(),
    st.sampled_from([None, 0.5]),
    st.sampled_from([0.0, 1.5]),
)
def test_gae_of_every_token_equals_a_loop(
    response_lengths: list[int],
    seed: int,
    kl_in_reward: bool,
    reward_clip: float | None,
    penalty: float,
) -> None:
    scored = scored_samples(response_lengths, seed)
    options = replace(
        OPTIONS, kl_in_reward=kl_in_reward, reward_clip=reward_clip, missing_eos_penalty=penalty
    )
    experience = build_experience(scored, options, KL)
    check_rows(experience.rewards, [rewards_of(item, options) for item in scored])
    advantages = [gae_of(item, options) for item in scored]
    check_rows(experience.advantages, advantages)
    assert experience.returns is not None
    returns = [
        [a + v for a, v in zip(row, item.values.tolist(), strict=True)]  # type: ignore[union-attr]
        for row, item in zip(advantages, scored, strict=True)
    ]
    check_rows(experience.returns, returns)
    torch.testing.assert_close(experience.scores, torch.tensor([item.score for item in scored]))


@settings(deadline=None, max_examples=20)
@given(lengths, seeds)
def test_every_row_is_its_own_sample(response_lengths: list[int], seed: int) -> None:
    scored = scored_samples(response_lengths, seed)
    experience = build_experience(scored, OPTIONS, KL)
    sequences = experience.sequences
    rows = sequences.tokens.split(sequences.lengths.tolist())
    for row, item in zip(rows, scored, strict=True):
        assert row.tolist() == [*item.sample.prompt, *item.sample.response]
    assert sequences.prompt_lengths.tolist() == [len(item.sample.prompt) for item in scored]
    assert sequences.response_lengths.tolist() == response_lengths
    check_rows(experience.rollout_log_probs, [list(item.sample.log_probs) for item in scored])
    check_rows(experience.old_log_probs, [item.log_probs.tolist() for item in scored])
    assert experience.reference_log_probs is not None and experience.old_values is not None
    check_rows(
        experience.reference_log_probs,
        [item.reference_log_probs.tolist() for item in scored],  # type: ignore[union-attr]
    )
    check_rows(experience.old_values, [item.values.tolist() for item in scored])  # type: ignore[union-attr]
    check_rows(experience.mask, [[1.0] * n for n in response_lengths])


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
@pytest.mark.parametrize("per_prompt", [2, 3])
def test_groups_are_the_samples_of_one_prompt(estimator: str, per_prompt: int) -> None:
    prompts = 2
    scored = scored_samples([3, 1, 4, 2, 5, 2][: prompts * per_prompt], 5)
    options = replace(
        OPTIONS, estimator=estimator, kl_in_reward=False, samples_per_prompt=per_prompt
    )
    experience = build_experience(scored, options, KL)
    assert experience.returns is None
    for prompt in range(prompts):
        members = scored[prompt * per_prompt : (prompt + 1) * per_prompt]
        scores = [item.score for item in members]
        mean = sum(scores) / per_prompt
        deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / (per_prompt - 1))
        for item in members:
            others = (sum(scores) - item.score) / (per_prompt - 1)
            expected = (item.score - mean) / deviation
            if estimator == "rloo":
                expected = item.score - others
            row = experience.advantages[item.sample.sample_id]
            length = len(item.sample.response)
            torch.testing.assert_close(
                row[:length], torch.full((length,), expected), rtol=1e-4, atol=1e-4
            )
            assert not row[length:].any()


def test_grpo_without_the_standard_deviation_only_centres() -> None:
    scored = scored_samples([2, 2], 3)
    options = replace(
        OPTIONS,
        estimator="grpo",
        kl_in_reward=False,
        samples_per_prompt=2,
        normalize_std=False,
    )
    advantages = build_experience(scored, options, KL).advantages
    half = (scored[0].score - scored[1].score) / 2
    torch.testing.assert_close(advantages[:, 0], torch.tensor([half, -half]))


@settings(deadline=None, max_examples=20)
@given(lengths, seeds)
def test_whitening_is_over_all_response_tokens(response_lengths: list[int], seed: int) -> None:
    scored = scored_samples([n + 1 for n in response_lengths], seed)
    plain = build_experience(scored, OPTIONS, KL)
    white = build_experience(scored, replace(OPTIONS, whiten=True), KL)
    tokens = plain.advantages[plain.mask.bool()].double()
    expected = (tokens - tokens.mean()) / tokens.std(correction=0)
    torch.testing.assert_close(
        white.advantages[white.mask.bool()].double(), expected, rtol=1e-3, atol=1e-3
    )
    # The critic learns returns, which whitening must leave alone.
    assert torch.equal(white.returns, plain.returns)  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_group_estimators_are_never_whitened(estimator: str) -> None:
    scored = scored_samples([2, 3, 1, 2], 0)
    plain = replace(OPTIONS, estimator=estimator, kl_in_reward=False, samples_per_prompt=2)
    one = build_experience(scored, plain, KL).advantages
    other = build_experience(scored, replace(plain, whiten=True), KL).advantages
    assert torch.equal(one, other)


def test_models_that_a_job_lacks_leave_no_tensors() -> None:
    scored = [
        replace(item, reference_log_probs=None, values=None) for item in scored_samples([2, 3], 1)
    ]
    options = replace(OPTIONS, estimator="reinforce++", kl_in_reward=False)
    experience = build_experience(scored, options, KL)
    assert experience.reference_log_probs is None and experience.old_values is None
    assert experience.returns is None


@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_an_epoch_of_mini_batches_is_a_permutation(
    mini_batch: int, steps: int, epochs: int, seed: int
) -> None:
    size = mini_batch * steps
    order = mini_batches(size, mini_batch, epochs, seed)
    assert len(order) == epochs
    for epoch in order:
        assert [len(rows) for rows in epoch] == [mini_batch] * steps
        assert sorted(torch.cat(epoch).tolist()) == list(range(size))


def test_mini_batches_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[int]:
        torch.manual_seed(random.randrange(2**31))  # the process's own stream has no part in it
        return torch.cat(
            [rows for epoch in mini_batches(32, 8, 2, seed) for rows in epoch]
        ).tolist()

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)
    first, second = drawn(1)[:32], drawn(1)[32:]
    assert first != second  # every epoch is shuffled anew


def test_a_sample_without_response_is_refused() -> None:
    empty = scored_samples([2, 3], 0)
    empty[1] = replace(
        empty[1],
        sample=replace(empty[1].sample, response=(), log_probs=()),
        log_probs=torch.zeros(0),
        reference_log_probs=torch.zeros(0),
        values=torch.zeros(0),
    )
    with pytest.raises(ValueError, match=r"samples \[1\] hold no response token"):
        build_experience(empty, OPTIONS, KL)


@pytest.mark.parametrize("name", ["log_probs", "reference_log_probs", "values"])
@pytest.mark.parametrize("length", [2, 4])
def test_a_response_with_values_of_another_length_is_refused(name: str, length: int) -> None:
    scored = scored_samples([2, 3, 1], 0)
    scored[1] = replace(scored[1], **{name: torch.zeros(length)})
    with pytest.raises(ValueError, match=rf"samples\[1\]\.{name}: want 3 values, got {length}"):
        build_experience(scored, OPTIONS, KL)


@pytest.mark.parametrize("name", ["reference_log_probs", "values"])
def test_a_model_scores_all_samples_or_none(name: str) -> None:
    scored = scored_samples([2, 2, 2], 0)
    scored[1] = replace(scored[1], **{name: None})
    with pytest.raises(ValueError, match=rf"samples\[1\]\.{name}: want 2 values, got none"):
        build_experience(scored, OPTIONS, KL)
