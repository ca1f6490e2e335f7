"""Log-probabilities and entropy of logits on one rank: numbers, gradients, memory.

tests/distributed/test_logits.py splits the logits over ranks.
"""

from __future__ import annotations

import math
import runpy
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.models import logits as module
from megatron_rlhfuse.models.logits import token_statistics

ROOT = Path(__file__).resolve().parents[2]
BENCHMARK = runpy.run_path(str(ROOT / "benchmarks/dispatch_logprob.py"))
TOLERANCE = 1e-5
VOCABULARY = 11

Group = dist.ProcessGroup
# What each result weighs in the loss; None: the loss does not use it.
weights = st.sampled_from([None, 1.0, -0.3])


@pytest.fixture(scope="module")
def group() -> Iterator[Group]:
    yield BENCHMARK["one_rank_group"]()
    dist.destroy_process_group()


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Logits, targets and the size of the vocabulary; padding would dominate if it took part."""
    batch, sequence = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    vocabulary, padding = draw(st.integers(1, 12)), draw(st.integers(0, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    logits = torch.randn(batch, sequence, vocabulary + padding, generator=generator) * 3
    logits[..., vocabulary:] = 30.0
    return logits, torch.randint(vocabulary, (batch, sequence), generator=generator), vocabulary


def some(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(VOCABULARY, (2, 5), generator=generator)
    return torch.randn(2, 5, VOCABULARY, generator=generator).to(dtype), targets


def plain(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)


def score(logits: Tensor, targets: Tensor, group: Group) -> Tensor:
    return token_statistics(logits, targets, logits.shape[-1], 1.0, group, with_entropy=False)[0]


def rows_at_a_time(rows: int, columns: int) -> mock._patch_dict:
    return mock.patch.dict(module.CHUNK_BYTES, cpu=4 * rows * columns)


@settings(deadline=None)
@given(cases(), st.sampled_from([0.3, 1.0, 1.7]), st.integers(1, 9), weights, weights)
def test_values_and_gradients_are_those_of_plain_torch_in_float64(
    group: Group,
    case: tuple[Tensor, Tensor, int],
    temperature: float,
    rows: int,
    of_log_probs: float | None,
    of_entropy: float | None,
) -> None:
    logits, targets, vocabulary = case
    exact, found = logits.double().requires_grad_(), logits.clone().requires_grad_()
    expected = plain(exact[..., :vocabulary], targets, temperature)
    with rows_at_a_time(rows, vocabulary):
        pair = token_statistics(found, targets, vocabulary, temperature, group, with_entropy=True)
        for ours, theirs in zip(pair, expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCE, rtol=TOLERANCE)
        assert torch.equal(found, logits)
        for results in (pair, expected):
            parts = zip(results, (of_log_probs, of_entropy), strict=True)
            loss = sum((part.cumsum(1) * w).sum() for part, w in parts if w is not None)
            if isinstance(loss, Tensor):
                loss.backward()
    if of_log_probs is None and of_entropy is None:
        assert found.grad is None
        return
    torch.testing.assert_close(found.grad.double(), exact.grad, atol=1e-4, rtol=TOLERANCE)
    assert not found.grad[..., vocabulary:].any()


@given(cases(), st.integers(1, 9))
def test_rows_at_a_time_change_nothing(
    group: Group, case: tuple[Tensor, Tensor, int], rows: int
) -> None:
    logits, targets, vocabulary = case
    results = []
    for chunk in (rows, targets.numel()):
        leaf = logits.clone().requires_grad_()
        with rows_at_a_time(chunk, vocabulary):
            pair = token_statistics(leaf, targets, vocabulary, 0.7, group, with_entropy=True)
            sum(each.sum() for each in pair).backward()
        results.append((*pair, leaf.grad))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_as_megatrons_cross_entropy(group: Group, temperature: float) -> None:
    from megatron_rlhfuse import compat, platform

    platform.prepare()
    compat.apply()
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    logits, targets = some()
    ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = -vocab_parallel_cross_entropy(theirs / temperature, targets, tp_group=group)
    found, entropy = token_statistics(
        ours, targets, VOCABULARY, temperature, group, with_entropy=False
    )
    assert entropy is None
    torch.testing.assert_close(found, expected)
    for each in (found, expected):
        each.square().sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(group: Group, dtype: torch.dtype) -> None:
    logits, targets = some(dtype)
    runs = []
    for leaf in (logits.clone().requires_grad_(), logits.float().requires_grad_()):
        pair = token_statistics(leaf, targets, VOCABULARY, 0.7, group, with_entropy=True)
        sum(each.sum() for each in pair).backward()
        runs.append((*pair, leaf.grad.to(dtype)))
    torch.testing.assert_close(*runs, atol=0, rtol=0)


@pytest.mark.parametrize("height", [0.0, 1e4, -1e4, 1e30])
def test_equal_logits_are_equally_likely_at_any_height(group: Group, height: float) -> None:
    logits = torch.full((1, 3, 1000), height, requires_grad=True)
    targets = torch.tensor([[0, 500, 999]])
    log_probs, entropy = token_statistics(logits, targets, 1000, 0.7, group, with_entropy=True)
    for found, expected in ((log_probs, -math.log(1000)), (entropy, math.log(1000))):
        torch.testing.assert_close(found, torch.full((1, 3), expected))
    (log_probs + entropy).sum().backward()
    expected = (torch.nn.functional.one_hot(targets, 1000) - 1e-3) / 0.7
    torch.testing.assert_close(logits.grad, expected, atol=1e-7, rtol=1e-5)


def test_a_height_in_common_loses_no_digits(group: Group) -> None:
    logits, targets = some()
    logits = (logits * 64).round() / 64  # so that the sums below are exact
    for height in (2.0**13, -(2.0**13)):
        results = []
        for each in (logits, logits + height):
            leaf = each.clone().requires_grad_()
            pair = token_statistics(leaf, targets, VOCABULARY, 0.7, group, with_entropy=True)
            sum(part.sum() for part in pair).backward()
            results.append((*pair, leaf.grad))
        torch.testing.assert_close(*results, atol=0, rtol=0)


def test_certain_and_impossible_tokens_stay_finite(group: Group) -> None:
    logits = torch.zeros(1, 2, VOCABULARY)
    logits[..., 4] = 1e4
    logits.requires_grad_()
    targets = torch.tensor([[4, 0]])
    pair = token_statistics(logits, targets, VOCABULARY, 1.0, group, with_entropy=True)
    assert [each.tolist() for each in pair] == [[[0.0, -1e4]], [[0.0, 0.0]]]
    sum(each.sum() for each in pair).backward()
    expected = torch.zeros(1, 2, VOCABULARY)
    expected[0, 1, 0], expected[0, 1, 4] = 1.0, -1.0
    assert torch.equal(logits.grad, expected)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("until", [None, -1])
def test_gradients_of_an_output_layer(
    group: Group, rows: int, contiguous: bool, until: int | None
) -> None:
    """[sequence, batch, ...] transposed, as Megatron does it: a view, or a copy."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, 2, 3, generator=generator)
    weight = torch.randn(VOCABULARY, 3, generator=generator)
    _, targets = some()
    gradients = []
    for ours in (True, False):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        logits = torch.nn.functional.linear(*leaves).transpose(0, 1)
        logits = (logits.contiguous() if contiguous else logits)[:, :until]
        if ours:
            with rows_at_a_time(rows, VOCABULARY):
                pair = token_statistics(
                    logits, targets[:, :until], VOCABULARY, 0.7, group, with_entropy=True
                )
                sum(each.square().sum() for each in pair).backward()
        else:
            pair = plain(logits, targets[:, :until], 0.7)
            sum(each.square().sum() for each in pair).backward()
        gradients.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*gradients, atol=TOLERANCE, rtol=TOLERANCE)


def test_columns_need_not_lie_side_by_side(group: Group) -> None:
    logits, targets = some()
    strided = logits.repeat_interleave(2, dim=-1)[..., ::2].requires_grad_()
    (found,) = torch.autograd.grad(score(strided, targets, group).sum(), strided)
    leaf = logits.clone().requires_grad_()
    plain(leaf, targets, 1.0)[0].sum().backward()
    torch.testing.assert_close(found, leaf.grad)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_tokens(group: Group, shape: tuple[int, int]) -> None:
    logits = torch.empty(*shape, VOCABULARY, requires_grad=True)
    targets = torch.empty(shape, dtype=torch.int64)
    pair = token_statistics(logits, targets, VOCABULARY, 1.0, group, with_entropy=True)
    assert [each.shape for each in pair] == [shape, shape]
    sum(each.sum() for each in pair).backward()
    assert logits.grad.shape == logits.shape


def test_the_gradient_takes_the_place_of_the_logits(group: Group) -> None:
    leaf, targets = some()
    leaf.requires_grad_()
    logits = leaf * 1
    (gradient,) = torch.autograd.grad(score(logits, targets, group).sum(), logits)
    assert gradient.data_ptr() == logits.data_ptr() and torch.equal(gradient, logits)


def test_a_second_backward_raises(group: Group) -> None:
    leaf, targets = some()
    leaf.requires_grad_()
    for logits in (leaf, leaf * 1, (leaf * 1).transpose(0, 1).transpose(0, 1)):
        loss = score(logits, targets, group).sum()
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_another_use_of_the_logits_raises(group: Group) -> None:
    leaf, targets = some()
    leaf.requires_grad_()
    logits = leaf * 1
    loss = logits.square().sum() + score(logits, targets, group).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_of_the_gradient_raises(group: Group) -> None:
    leaf, targets = some()
    leaf.requires_grad_()
    (gradient,) = torch.autograd.grad(
        score(leaf * 1, targets, group).square().sum(), leaf, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_temperature_must_be_above_0(group: Group) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_statistics(*some(), VOCABULARY, 0.0, group, with_entropy=False)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_peak_of_memory(group: Group, dtype: torch.dtype, transposed: bool) -> None:
    shape = (2, 1024, 32768)
    logits = torch.zeros(*(shape[i] for i in ((1, 0, 2) if transposed else (0, 1, 2))), dtype=dtype)
    logits = (logits.transpose(0, 1) if transposed else logits).requires_grad_()
    targets = torch.zeros(shape[:2], dtype=torch.int64)
    limit = logits.nbytes * 1.2
    with BENCHMARK["PeakBytes"](logits) as memory:
        pair = token_statistics(logits, targets, shape[-1], 0.7, group, with_entropy=True)
        sum(each.sum() for each in pair).backward()
        assert logits.nbytes < memory.peak < limit


def test_scoring_keeps_nothing_of_the_size_of_the_logits(group: Group) -> None:
    logits = torch.zeros(1, 1024, 32768)
    targets = torch.zeros(1, 1024, dtype=torch.int64)
    with torch.no_grad(), BENCHMARK["PeakBytes"](logits) as memory:
        score(logits, targets, group)
    assert memory.peak < 1.1 * logits.nbytes
