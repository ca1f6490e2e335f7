"""The invariant of the folder: what stands at masked positions never matters.

Every public function is run twice, with zeros and with garbage (nan, infinities, huge numbers) at
masked positions; results and gradients must be bitwise equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.advantages import estimate_advantages, gae, reinforce_plus_plus, whiten
from megatron_rlhfuse.rlhf.kl import kl_estimate
from megatron_rlhfuse.rlhf.losses import (
    PolicyBatch,
    PolicyLossOptions,
    ValueBatch,
    policy_loss,
    value_loss,
)
from megatron_rlhfuse.rlhf.masking import masked
from megatron_rlhfuse.rlhf.rewards import token_rewards
from megatron_rlhfuse.rlhf.statistics import explained_variance, policy_mismatch

OPTIONS = PolicyLossOptions(
    dual_clip=3.0, tis_cap=1.1, entropy_coefficient=0.01, kl_coefficient=0.1, kl_estimator="k3"
)
# Two samples of one prompt, twice.
GROUPS = torch.tensor([0, 0, 1, 1])
SCORES = torch.tensor([1.0, -2.0, 0.5, 3.0])
WIDTH = 5
INPUTS = 8

# Each takes the mask and INPUTS garbage-bearing tensors; what it returns is compared.
FUNCTIONS: dict[str, Callable[[Tensor, list[Tensor]], Any]] = {
    "k1": lambda m, x: kl_estimate("k1", x[0], x[1], m),
    "k2": lambda m, x: kl_estimate("k2", x[0], x[1], m),
    "k3": lambda m, x: kl_estimate("k3", x[0], x[1], m),
    "token_rewards": lambda m, x: token_rewards(SCORES, x[0], x[1], m, 0.1, "k3"),
    "gae": lambda m, x: gae(x[0], x[1], m, 0.9, 0.8),
    "reinforce_plus_plus": lambda m, x: reinforce_plus_plus(x[0], m, 0.9),
    "whiten": lambda m, x: whiten(x[0], m),
    "whiten, mean kept": lambda m, x: whiten(x[0], m, shift_mean=False),
    "estimate gae": lambda m, x: estimate_advantages(
        "gae", x[0], m, whiten_advantages=True, values=x[1], gamma=0.9, lam=0.8
    ),
    "estimate grpo": lambda m, x: estimate_advantages(
        "grpo", x[0], m, whiten_advantages=True, group_ids=GROUPS
    ),
    "estimate rloo": lambda m, x: estimate_advantages(
        "rloo", x[0], m, whiten_advantages=False, group_ids=GROUPS
    ),
    "policy_loss": lambda m, x: policy_loss(PolicyBatch(x[0], x[1], x[2], m, *x[3:7]), OPTIONS),
    "value_loss": lambda m, x: value_loss(ValueBatch(x[0], x[1], x[2], m, x[3]), clip=0.2),
    "value_loss, no clip": lambda m, x: value_loss(
        ValueBatch(x[0], x[1], x[2], m, x[3]), clip=None
    ),
    "policy_mismatch": lambda m, x: policy_mismatch(x[0], x[1], m),
    "explained_variance": lambda m, x: explained_variance(x[0], x[1], m),
}

garbage = st.sampled_from([float("nan"), float("inf"), float("-inf"), 3e38, -3e38, 1.0])
masks = st.lists(
    st.lists(st.booleans(), min_size=WIDTH, max_size=WIDTH).filter(any), min_size=4, max_size=4
)


def leaves(result: Any) -> list[Tensor]:
    """Every tensor in a result, whatever holds it."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, float):
        return [torch.tensor(result)]
    if is_dataclass(result):
        return [x for f in fields(result) for x in leaves(getattr(result, f.name))]
    if isinstance(result, dict):
        return [x for value in result.values() for x in leaves(value)]
    if isinstance(result, tuple):
        return [x for value in result for x in leaves(value)]
    assert result is None
    return []


def run(
    function: Callable[[Tensor, list[Tensor]], Any], mask: Tensor, inputs: list[Tensor]
) -> tuple[list[Tensor], list[Tensor | None]]:
    """(results, gradients of the sum of the differentiable ones to every input)."""
    inputs = [x.clone().requires_grad_() for x in inputs]
    results = leaves(function(mask, inputs))
    differentiable = [x for x in results if x.requires_grad]
    if differentiable:
        torch.stack([x.sum() for x in differentiable]).sum().backward()
    return [x.detach() for x in results], [x.grad for x in inputs]


@pytest.mark.parametrize("name", FUNCTIONS)
@settings(deadline=None, max_examples=25)
@given(present=masks, seed=st.integers(0, 2**31), noise=st.lists(garbage, min_size=1, max_size=6))
def test_garbage_at_masked_positions_never_matters(
    name: str, present: list[list[bool]], seed: int, noise: list[float]
) -> None:
    mask = torch.tensor(present).float()
    generator = torch.Generator().manual_seed(seed)
    clean = [torch.randn(mask.shape, generator=generator) * mask for _ in range(INPUTS)]
    filler = torch.tensor(noise).repeat(mask.numel())[: mask.numel()].view_as(mask)
    dirty = [torch.where(mask == 1, x, filler) for x in clean]

    results, gradients = run(FUNCTIONS[name], mask, clean)
    dirty_results, dirty_gradients = run(FUNCTIONS[name], mask, dirty)

    assert len(results) == len(dirty_results) > 0
    for expected, got in zip(results, dirty_results, strict=True):
        assert torch.equal(got, expected) or (got.isnan().all() and expected.isnan().all())
        if got.shape == mask.shape:
            assert (got[mask == 0] == 0).all()
            assert got.dtype == torch.float32
    for expected_gradient, gradient in zip(gradients, dirty_gradients, strict=True):
        assert (gradient is None) == (expected_gradient is None)
        if gradient is not None and expected_gradient is not None:
            assert torch.equal(gradient, expected_gradient)
            assert (gradient[mask == 0] == 0).all()


def test_wrong_shapes_and_types_are_refused_by_name() -> None:
    mask = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"values has shape \(3,\) and mask has \(2, 3\)"):
        masked(torch.ones(3), mask, "values")
    with pytest.raises(ValueError, match=r"both must be \[batch, response\]"):
        masked(torch.ones(6), torch.ones(6), "values")
    with pytest.raises(ValueError, match=r"log_probs is torch\.bfloat16"):
        masked(mask.bfloat16(), mask, "log_probs")
