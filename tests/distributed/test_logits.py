"""Log-probabilities and entropy of logits split over tensor ranks, and their gradients.

Against whole logits on one rank in float64, and against Megatron's own cross entropy.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.model_helpers import gather_columns

TEMPERATURE = 0.7
VOCABULARIES = (13, 16, 5)  # padded, whole, and ranks with padding only
DTYPES = ("float32", "bfloat16")

Results = list[dict[str, dict[str, float]]]


# ---------------------------------------------------------------- on every rank


def check_logits() -> dict[str, dict[str, float]]:
    from megatron_rlhfuse.models import logits

    found = {}
    for vocabulary in VOCABULARIES:
        for dtype in DTYPES:
            found[f"{vocabulary} {dtype}"] = _errors(vocabulary, getattr(torch, dtype))
    logits.CHUNK_BYTES["cpu"] = 1  # a row at a time; collectives stay as few
    found["by rows"] = _errors(13, torch.float32)
    return found


def _errors(vocabulary: int, dtype: torch.dtype) -> dict[str, float]:
    from megatron_rlhfuse.models.logits import token_statistics

    group = dist.group.WORLD
    assert group is not None
    ranks, rank = group.size(), group.rank()
    columns = 4 if vocabulary == 5 else -(-vocabulary // ranks)
    generator = torch.Generator().manual_seed(vocabulary)
    # Padding that would dominate the softmax if it took part.
    logits = torch.randn(2, 6, ranks * columns, generator=generator).mul(3).to(dtype)
    logits[..., vocabulary:] = 30.0
    targets = torch.randint(0, vocabulary, (2, 6), generator=generator)
    upstream = torch.randn(2, 2, 6, generator=generator)
    whole = logits.double().requires_grad_()
    log_p = torch.log_softmax(whole[..., :vocabulary] / TEMPERATURE, dim=-1)
    expected = log_p.gather(-1, targets[..., None]).squeeze(-1), -(log_p.exp() * log_p).sum(-1)

    errors = {}
    for name, weights in (
        ("log-probability", (1, 0)),
        ("entropy", (0, 1)),
        ("both", (1, 1)),
    ):
        shard = logits.chunk(ranks, dim=-1)[rank].clone().requires_grad_()
        pair = token_statistics(shard, targets, vocabulary, TEMPERATURE, group, with_entropy=True)
        errors["log-probabilities"] = _error(pair[0], expected[0])
        errors["entropies"] = _error(pair[1], expected[1])
        errors["changed"] = _error(shard, logits.chunk(ranks, dim=-1)[rank])
        (mine,) = torch.autograd.grad(_loss(pair, upstream, weights), shard)
        (theirs,) = torch.autograd.grad(
            _loss(expected, upstream, weights), whole, retain_graph=True
        )
        errors[f"gradient of {name}"] = _error(gather_columns(mine, group), theirs)
        errors[f"padding of {name}"] = _error(mine[..., max(vocabulary - rank * columns, 0) :], 0)

    shard = logits.chunk(ranks, dim=-1)[rank].clone().requires_grad_()
    scored = _by_megatron(shard, targets, vocabulary, group)
    errors["Megatron's log-probabilities"] = _error(scored, pair[0])
    mine = logits.chunk(ranks, dim=-1)[rank].clone().requires_grad_()
    ours, _ = token_statistics(mine, targets, vocabulary, TEMPERATURE, group, with_entropy=False)
    gradients = [
        torch.autograd.grad((each * upstream[0]).sum(), of)[0]
        for each, of in ((scored, shard), (ours, mine))
    ]
    errors["Megatron's gradient"] = _error(*gradients)
    return errors


def _by_megatron(
    shard: Tensor, targets: Tensor, vocabulary: int, group: dist.ProcessGroup
) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    real = max(vocabulary - group.rank() * shard.shape[-1], 0)
    padding = torch.arange(shard.shape[-1]) >= real
    scaled = (shard.float() / TEMPERATURE).masked_fill(padding, torch.finfo(torch.float32).min)
    return -vocab_parallel_cross_entropy(scaled, targets, tp_group=group)


def _loss(pair: Any, upstream: Tensor, weights: tuple[int, int]) -> Tensor:
    return sum((each * up).sum() for each, up, w in zip(pair, upstream, weights, strict=True) if w)


def _error(found: Tensor, expected: Any) -> float:
    difference = (found.detach().double() - expected).abs()
    return difference.max().item() if difference.numel() else 0.0


# ---------------------------------------------------------------- in the test process


@pytest.fixture(scope="module", params=(2, 4), ids=("tp2", "tp4"))
def results(run_ranks: Any, request: pytest.FixtureRequest) -> Results:
    return run_ranks(check_logits, request.param)


@pytest.mark.parametrize("case", [*(f"{each} float32" for each in VOCABULARIES), "by rows"])
def test_split_logits_give_what_whole_ones_give(results: Results, case: str) -> None:
    for result in results:
        errors = result[case]
        assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_arithmetic_of_bfloat16_logits_is_float32(results: Results, vocabulary: int) -> None:
    for result in results:
        errors = result[f"{vocabulary} bfloat16"]
        for name, error in errors.items():  # gradients are rounded to the logits' dtype
            assert error < (2e-2 if "gradient" in name else 1e-5), errors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocabulary", VOCABULARIES)
def test_padding_has_no_gradient_and_a_forward_changes_nothing(
    results: Results, vocabulary: int, dtype: str
) -> None:
    for result in results:
        errors = result[f"{vocabulary} {dtype}"]
        exact = [error for name, error in errors.items() if name.startswith(("padd", "changed"))]
        assert len(exact) == 4 and not any(exact), errors
