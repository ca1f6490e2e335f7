"""The value loss against a scalar loop and finite differences; the weights of the aggregations."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.losses import LossOutput, ValueBatch, aggregation_weights, value_loss

length_lists = st.lists(st.integers(1, 6), min_size=1, max_size=5)
aggregations = st.sampled_from(["token-mean", "sequence-mean"])
seeds = st.integers(0, 2**31)
WIDTH = 6


def right_padded_mask(lengths: list[int]) -> Tensor:
    return torch.tensor(
        [[float(t < length) for t in range(WIDTH)] for length in lengths], dtype=torch.float64
    )


def random_value_batch(
    lengths: list[int], seed: int, aggregation: str = "token-mean"
) -> ValueBatch:
    generator = torch.Generator().manual_seed(seed)
    mask = right_padded_mask(lengths)
    old, returns, step = torch.randn(
        3, len(lengths), WIDTH, generator=generator, dtype=torch.float64
    )
    return ValueBatch(
        values=(old + 0.4 * step).requires_grad_(),
        old_values=old,
        returns=returns,
        mask=mask,
        weights=aggregation_weights(mask, aggregation),
    )


def as_floats(output: LossOutput) -> dict[str, float]:
    return {"loss": output.loss.item()} | {k: v.item() for k, v in output.metrics.items()}


@settings(deadline=None, max_examples=50)
@given(length_lists, seeds, st.sampled_from([None, 0.1, 0.3]), aggregations)
def test_value_loss_and_metrics_equal_the_loop(
    lengths: list[int], seed: int, clip: float | None, aggregation: str
) -> None:
    batch = random_value_batch(lengths, seed, aggregation)
    expected = {"loss": 0.0, "value": 0.0, "value_loss": 0.0}
    if clip is not None:
        expected["value_clip_fraction"] = 0.0
    for i, t in (batch.mask == 1).nonzero().tolist():
        weight, value = batch.weights[i, t].item(), batch.values[i, t].item()
        old, target = batch.old_values[i, t].item(), batch.returns[i, t].item()
        error = (value - target) ** 2
        if clip is not None:
            near = (min(max(value, old - clip), old + clip) - target) ** 2
            expected["value_clip_fraction"] += weight * (near > error)
            error = max(error, near)
        expected["loss"] += weight * 0.5 * error
        expected["value_loss"] += weight * 0.5 * error
        expected["value"] += weight * value
    assert as_floats(value_loss(batch, clip)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_nothing_is_clipped_where_every_value_is_near_the_old_one() -> None:
    # Of two independent numbers, old + (new - old) is often not exactly new.
    old, new = 0.1 * torch.rand(2, 64, WIDTH, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(64, WIDTH)
    batch = ValueBatch(new, old, -old, mask, aggregation_weights(mask, "token-mean"))
    assert value_loss(batch, 0.2).metrics["value_clip_fraction"] == 0


@pytest.mark.parametrize("clip", [None, 0.3])
def test_value_loss_gradient_equals_finite_differences(clip: float | None) -> None:
    batch = random_value_batch([6, 2, 4], 13)
    assert torch.autograd.gradcheck(
        lambda values: value_loss(replace(batch, values=values), clip).loss, (batch.values,)
    )


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds, aggregations, st.integers(1, 3))
def test_micro_batches_add_up_to_the_mini_batch(
    lengths: list[int], seed: int, aggregation: str, size: int
) -> None:
    batch = random_value_batch(lengths, seed, aggregation)
    whole = value_loss(batch, clip=0.2)
    sums: dict[str, float] = {}
    gradient = torch.zeros_like(batch.values)
    for start in range(0, len(lengths), size):
        rows = {f.name: getattr(batch, f.name)[start : start + size] for f in fields(batch)}
        output = value_loss(ValueBatch(**rows), clip=0.2)
        for name, number in as_floats(output).items():
            sums[name] = sums.get(name, 0.0) + number
        gradient += torch.autograd.grad(output.loss, batch.values)[0]
    assert sums == pytest.approx(as_floats(whole), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.loss, batch.values)[0])


def test_only_values_carry_gradient() -> None:
    batch = random_value_batch([6, 3], 5)
    batch.returns.requires_grad_()
    batch.old_values.requires_grad_()
    value_loss(batch, clip=0.1).loss.backward()
    assert batch.values.grad is not None
    assert batch.returns.grad is None and batch.old_values.grad is None


def test_weights_of_each_aggregation() -> None:
    mask = right_padded_mask([1, 3, 0])
    assert aggregation_weights(mask, "token-mean")[:, :4].tolist() == [
        [0.25, 0, 0, 0],
        [0.25, 0.25, 0.25, 0],
        [0, 0, 0, 0],
    ]
    third = pytest.approx(1 / 6)
    rows = aggregation_weights(mask, "sequence-mean")[:, :4].tolist()
    assert rows == [[0.5, 0, 0, 0], [third, third, third, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="choose one of token-mean, sequence-mean"):
        aggregation_weights(mask, "mean")
    with pytest.raises(ValueError, match="mask holds no response token"):
        aggregation_weights(torch.zeros(2, 2), "token-mean")


@given(length_lists, aggregations)
@settings(deadline=None, max_examples=20)
def test_weights_sum_to_one(lengths: list[int], kind: str) -> None:
    weights = aggregation_weights(right_padded_mask(lengths), kind)
    assert weights.sum().item() == pytest.approx(1.0)


def test_a_bad_value_clip_is_refused() -> None:
    with pytest.raises(ValueError, match="value clip is 0"):
        value_loss(random_value_batch([2], 0), clip=0.0)
