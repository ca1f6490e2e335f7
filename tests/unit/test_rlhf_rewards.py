"""Token rewards against a loop over samples and tokens."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.rewards import token_rewards


def right_padded_mask(lengths: list[int], width: int) -> Tensor:
    return torch.tensor([[float(t < length) for t in range(width)] for length in lengths])


def scalar_kl(kind: str, log_prob: float, reference: float) -> float:
    difference = log_prob - reference
    return {
        "k1": difference,
        "k2": difference**2 / 2,
        "k3": math.exp(-difference) - 1 + difference,
    }[kind]


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**31),
    beta=st.sampled_from([0.0, 0.05, 1.0]),
    kind=st.sampled_from(["k1", "k2", "k3"]),
    clip=st.sampled_from([None, 0.5, 10.0]),
    penalty=st.sampled_from([0.0, 1.5]),
)
def test_rewards_equal_the_loop(
    lengths: list[int], seed: int, beta: float, kind: str, clip: float | None, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, width = len(lengths), 6
    scores = 3 * torch.randn(batch, generator=generator)
    log_probs, reference = torch.randn(2, batch, width, generator=generator)
    by_length = torch.rand(batch, generator=generator) < 0.5
    got = token_rewards(
        scores,
        log_probs,
        reference,
        right_padded_mask(lengths, width),
        beta,
        kind,
        clip=clip,
        missing_eos_penalty=penalty,
        stopped_by_length=by_length,
    )
    expected = torch.zeros(batch, width)
    for i, length in enumerate(lengths):
        score = scores[i].item()
        if clip is not None:
            score = max(-clip, min(clip, score))
        if by_length[i]:
            score -= penalty
        for t in range(length):
            expected[i, t] = -beta * scalar_kl(kind, log_probs[i, t].item(), reference[i, t].item())
        expected[i, length - 1] += score
    torch.testing.assert_close(got, expected)


def test_score_goes_to_the_last_token_of_a_mask_with_holes() -> None:
    mask = torch.tensor([[1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    zeros = torch.zeros(2, 4)
    got = token_rewards(torch.tensor([2.0, 3.0]), zeros, None, mask, 0.0, "k1")
    assert got.tolist() == [[0, 0, 2, 0], [3, 0, 0, 0]]


def test_penalty_counts_in_full_below_the_clip() -> None:
    got = token_rewards(
        torch.tensor([-100.0]),
        torch.zeros(1, 1),
        None,
        torch.ones(1, 1),
        0.0,
        "k1",
        clip=5.0,
        missing_eos_penalty=1.0,
        stopped_by_length=torch.tensor([True]),
    )
    assert got.item() == -6.0


def test_inputs_are_left_alone_and_no_gradient_flows() -> None:
    scores, log_probs = torch.ones(1), torch.zeros(1, 3, requires_grad=True)
    rewards = token_rewards(scores, log_probs, torch.ones(1, 3), torch.ones(1, 3), 0.1, "k3")
    assert not rewards.requires_grad
    assert scores.tolist() == [1.0] and log_probs.tolist() == [[0.0] * 3]


def test_bad_input_is_refused_by_name() -> None:
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    scores = torch.zeros(2)
    with pytest.raises(ValueError, match=r"samples \[1\] hold no response token"):
        token_rewards(scores, zeros, zeros, right_padded_mask([2, 0], 3), 0.1, "k1")
    with pytest.raises(ValueError, match="reference_log_probs is None"):
        token_rewards(scores, zeros, None, ones, 0.1, "k1")
    with pytest.raises(ValueError, match=r"scores has shape \(2, 1\)"):
        token_rewards(scores.unsqueeze(1), zeros, zeros, ones, 0.1, "k1")
    with pytest.raises(ValueError, match="missing_eos_penalty needs stopped_by_length"):
        token_rewards(scores, zeros, zeros, ones, 0.1, "k1", missing_eos_penalty=1.0)
    with pytest.raises(ValueError, match="clip is 0"):
        token_rewards(scores, zeros, zeros, ones, 0.1, "k1", clip=0.0)
