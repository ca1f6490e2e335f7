"""The policy loss against a scalar loop, finite differences and the policy gradient."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.losses import (
    LossOutput,
    PolicyBatch,
    PolicyLossOptions,
    aggregation_weights,
    policy_loss,
)

EVERYTHING = PolicyLossOptions(
    clip_low=0.2,
    clip_high=0.3,
    dual_clip=1.5,
    tis_cap=1.2,
    entropy_coefficient=0.01,
    kl_coefficient=0.1,
    kl_estimator="k3",
)
option_sets = st.builds(
    PolicyLossOptions,
    clip_low=st.sampled_from([0.1, 0.2]),
    clip_high=st.sampled_from([0.2, 0.4]),
    dual_clip=st.sampled_from([None, 1.5]),
    tis_cap=st.sampled_from([None, 0.9, 2.0]),
    entropy_coefficient=st.sampled_from([0.0, 0.05]),
    kl_coefficient=st.sampled_from([0.0, 0.2]),
    kl_estimator=st.sampled_from(["k1", "k2", "k3"]),
)
length_lists = st.lists(st.integers(1, 6), min_size=1, max_size=5)
aggregations = st.sampled_from(["token-mean", "sequence-mean"])
seeds = st.integers(0, 2**31)
WIDTH = 6


def right_padded_mask(lengths: list[int]) -> Tensor:
    return torch.tensor(
        [[float(t < length) for t in range(WIDTH)] for length in lengths], dtype=torch.float64
    )


def random_policy_batch(
    lengths: list[int], seed: int, aggregation: str = "token-mean"
) -> PolicyBatch:
    """Float64, so that loops and finite differences can be compared tightly."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), WIDTH)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mask = right_padded_mask(lengths)
    old = normal() - 2
    return PolicyBatch(
        log_probs=(old + 0.4 * normal()).requires_grad_(),
        old_log_probs=old,
        advantages=normal(),
        mask=mask,
        weights=aggregation_weights(mask, aggregation),
        rollout_log_probs=old + 0.4 * normal(),
        reference_log_probs=old + 0.4 * normal(),
        entropy=normal().abs().requires_grad_(),
    )


def detached(batch: PolicyBatch) -> dict[str, Tensor]:
    return {f.name: getattr(batch, f.name).detach() for f in fields(batch)}


def policy_by_loop(batch: PolicyBatch, options: PolicyLossOptions) -> dict[str, float]:
    """Token by token, in Python floats, from the papers' formulas as objectives to maximise."""
    tensors = detached(batch)
    sums: dict[str, float] = {}

    def add(name: str, amount: float) -> None:
        sums[name] = sums.get(name, 0.0) + weight * amount

    for i, t in (batch.mask == 1).nonzero().tolist():
        x = {name: tensor[i, t].item() for name, tensor in tensors.items()}
        weight, advantage = x["weights"], x["advantages"]
        ratio = math.exp(x["log_probs"] - x["old_log_probs"])
        clipped_ratio = max(1 - options.clip_low, min(1 + options.clip_high, ratio))
        objective = min(ratio * advantage, clipped_ratio * advantage)
        add("clip_fraction", float(clipped_ratio * advantage < ratio * advantage))
        if options.dual_clip is not None:
            cut = advantage < 0 and objective < options.dual_clip * advantage
            add("dual_clip_fraction", float(cut))
            if cut:
                objective = options.dual_clip * advantage
        if options.tis_cap is not None:
            tis = math.exp(x["old_log_probs"] - x["rollout_log_probs"])
            add("tis_truncated_fraction", float(tis > options.tis_cap))
            add("tis_weight", min(tis, options.tis_cap))
            objective *= min(tis, options.tis_cap)
        add("ratio", ratio)
        add("approx_kl", ratio - 1 - math.log(ratio))
        add("policy_loss", -objective)
        add("entropy", x["entropy"])
        total = -objective - options.entropy_coefficient * x["entropy"]
        if options.kl_coefficient:
            log_r = x["reference_log_probs"] - x["log_probs"]
            kl = {"k1": -log_r, "k2": log_r**2 / 2, "k3": math.exp(log_r) - 1 - log_r}
            add("kl_loss", kl[options.kl_estimator])
            total += options.kl_coefficient * kl[options.kl_estimator]
        add("loss", total)
    return sums


def as_floats(output: LossOutput) -> dict[str, float]:
    return {"loss": output.loss.item()} | {k: v.item() for k, v in output.metrics.items()}


@settings(deadline=None, max_examples=60)
@given(length_lists, seeds, option_sets, aggregations)
def test_policy_loss_and_metrics_equal_the_loop(
    lengths: list[int], seed: int, options: PolicyLossOptions, aggregation: str
) -> None:
    batch = random_policy_batch(lengths, seed, aggregation)
    got = as_floats(policy_loss(batch, options))
    assert got == pytest.approx(policy_by_loop(batch, options), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_policy_loss_gradient_equals_finite_differences(kind: str) -> None:
    batch = random_policy_batch([6, 2, 4], 11)
    options = replace(EVERYTHING, kl_estimator=kind)

    def loss(log_probs: Tensor, entropy: Tensor) -> Tensor:
        return policy_loss(replace(batch, log_probs=log_probs, entropy=entropy), options).loss

    assert batch.entropy is not None
    assert torch.autograd.gradcheck(loss, (batch.log_probs, batch.entropy))


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds, aggregations)
def test_first_step_is_the_policy_gradient(lengths: list[int], seed: int, aggregation: str) -> None:
    """At ratio 1 the loss is -mean(A), and its gradient that of -mean(A * log pi)."""
    batch = random_policy_batch(lengths, seed, aggregation)
    batch = replace(batch, old_log_probs=batch.log_probs.detach())
    output = policy_loss(batch, PolicyLossOptions())
    expected = -(batch.weights * batch.advantages).sum()
    torch.testing.assert_close(output.loss, expected)
    (gradient,) = torch.autograd.grad(output.loss, batch.log_probs)
    torch.testing.assert_close(gradient, -batch.weights * batch.advantages)
    assert output.metrics["clip_fraction"].item() == 0.0
    assert output.metrics["approx_kl"].item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "ratio", "dual_clip", "slope"),
    [
        (1.0, 1.1, None, -1.1),  # inside: d(-A r) / d log pi = -A r
        (1.0, 1.5, None, 0.0),  # gain already taken
        (1.0, 0.5, None, -0.5),  # worse than before: never clipped
        (-1.0, 0.5, None, 0.0),
        (-1.0, 1.5, None, 1.5),
        (-1.0, 1.5, 1.4, 0.0),  # the dual clip bounds it
        (1.0, 0.5, 1.4, -0.5),  # and leaves positive advantages alone
    ],
)
def test_gradient_of_a_token_by_region(
    advantage: float, ratio: float, dual_clip: float | None, slope: float
) -> None:
    one = torch.ones(1, 1)
    log_probs = torch.full((1, 1), math.log(ratio), requires_grad=True)
    batch = PolicyBatch(log_probs, 0 * one, advantage * one, mask=one, weights=one)
    loss = policy_loss(batch, PolicyLossOptions(dual_clip=dual_clip)).loss
    (gradient,) = torch.autograd.grad(loss, log_probs)
    assert gradient.item() == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("log_prob", [-1e4, 1e4])
def test_a_policy_run_away_gives_finite_loss_and_gradient(
    advantage: float, log_prob: float
) -> None:
    one = torch.ones(1, 1)
    log_probs = torch.full((1, 1), log_prob, requires_grad=True)
    batch = PolicyBatch(
        log_probs,
        0 * one,
        advantage * one,
        mask=one,
        weights=one,
        rollout_log_probs=-log_probs.detach(),
        reference_log_probs=0 * one,
    )
    options = PolicyLossOptions(kl_coefficient=0.1, tis_cap=2.0)
    output = policy_loss(batch, options)
    output.loss.backward()
    assert log_probs.grad is not None and log_probs.grad.isfinite().all()
    assert all(math.isfinite(number) for number in as_floats(output).values())


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds, option_sets, aggregations, st.integers(1, 3))
def test_micro_batches_add_up_to_the_mini_batch(
    lengths: list[int], seed: int, options: PolicyLossOptions, aggregation: str, size: int
) -> None:
    batch = random_policy_batch(lengths, seed, aggregation)
    whole = policy_loss(batch, options)
    sums: dict[str, float] = {}
    gradient = torch.zeros_like(batch.log_probs)
    for start in range(0, len(lengths), size):
        rows = {f.name: getattr(batch, f.name)[start : start + size] for f in fields(batch)}
        output = policy_loss(PolicyBatch(**rows), options)
        for name, number in as_floats(output).items():
            sums[name] = sums.get(name, 0.0) + number
        gradient += torch.autograd.grad(output.loss, batch.log_probs)[0]
    assert sums == pytest.approx(as_floats(whole), rel=1e-9, abs=1e-12)
    torch.testing.assert_close(gradient, torch.autograd.grad(whole.loss, batch.log_probs)[0])


@settings(deadline=None, max_examples=30)
@given(length_lists, seeds, aggregations)
def test_order_of_the_samples_does_not_matter(
    lengths: list[int], seed: int, aggregation: str
) -> None:
    batch = random_policy_batch(lengths, seed, aggregation)
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed))
    shuffled = PolicyBatch(**{name: x[order] for name, x in detached(batch).items()})
    assert as_floats(policy_loss(shuffled, EVERYTHING)) == pytest.approx(
        as_floats(policy_loss(batch, EVERYTHING)), rel=1e-9, abs=1e-12
    )


def test_only_log_probs_and_entropy_carry_gradient() -> None:
    batch = random_policy_batch([6, 3], 5)
    leaves = {name: x.requires_grad_() for name, x in detached(batch).items() if name != "mask"}
    output = policy_loss(PolicyBatch(mask=batch.mask, **leaves), EVERYTHING)
    output.loss.backward()
    assert {n for n, x in leaves.items() if x.grad is not None} == {"log_probs", "entropy"}
    assert not any(metric.requires_grad for metric in output.metrics.values())


@pytest.mark.parametrize(
    ("missing", "option"),
    [
        ("entropy", "entropy_coefficient"),
        ("reference_log_probs", "kl_coefficient"),
        ("rollout_log_probs", "tis_cap"),
    ],
)
def test_a_missing_input_names_the_option_that_needs_it(missing: str, option: str) -> None:
    batch = replace(random_policy_batch([2], 0), **{missing: None})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"{option} is set, so {missing} is needed"):
        policy_loss(batch, EVERYTHING)


@pytest.mark.parametrize(
    "field",
    [
        {"clip_low": -0.1},
        {"clip_low": 1.1},
        {"clip_high": -0.1},
        {"dual_clip": 1.0},
        {"tis_cap": 0.0},
        {"kl_coefficient": -1.0},
        {"entropy_coefficient": math.nan},
        {"kl_estimator": "k4"},
    ],
)
def test_bad_options_are_refused_by_name(field: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        PolicyLossOptions(**field)  # type: ignore[arg-type]
