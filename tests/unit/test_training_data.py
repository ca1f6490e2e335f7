"""What a micro-batch gets of a rollout batch, against the rows of the experience itself."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.rlhf.losses import AGGREGATIONS, aggregation_weights
from megatron_rlhfuse.training.experience import Experience, build_experience
from megatron_rlhfuse.training.training_data import MicroBatch, MiniBatch, TrainingData
from tests.unit.scored_samples import OPTIONS, lengths, scored_samples, seeds

CPU = torch.device("cpu")
MODELS = ("reference_log_probs", "old_values", "returns")
"""What an experience lacks where there is no reference or no critic."""

layouts = st.booleans()


def made(response_lengths: list[int], seed: int) -> Experience:
    return build_experience(scored_samples(response_lengths, seed), OPTIONS, kl_coefficient=0.3)


def per_token(micro_batch: MicroBatch) -> dict[str, Tensor | None]:
    """Everything but the tokens, by name."""
    return {
        field.name: getattr(micro_batch, field.name)
        for field in fields(micro_batch)
        if field.name != "batch"
    }


@settings(deadline=None, max_examples=60)
@given(lengths, seeds, layouts, st.data())
def test_every_field_is_the_rows_cut_to_their_longest_response(
    response_lengths: list[int], seed: int, packed: bool, data: st.DataObject
) -> None:
    experience = made(response_lengths, seed)
    chosen = data.draw(
        st.lists(st.integers(0, len(response_lengths) - 1), min_size=1, max_size=4, unique=True)
    )
    rows = torch.tensor(chosen)
    weights = torch.rand(len(chosen), generator=torch.Generator().manual_seed(seed))
    micro_batch = TrainingData.of(experience, CPU).micro_batch(rows, weights, packed)
    width = max(response_lengths[row] for row in chosen)
    for name, found in per_token(micro_batch).items():
        wanted = getattr(experience, name)[rows, :width] if name != "weights" else None
        if wanted is None:
            wanted = weights.unsqueeze(1) * experience.mask[rows, :width]
        assert found is not None and found.dtype == torch.float32, name
        assert torch.equal(found, wanted), name
        assert not found[micro_batch.mask == 0].any(), name


@settings(deadline=None, max_examples=30)
@given(lengths, seeds, layouts, st.data())
def test_the_tokens_are_those_of_the_same_rows(
    response_lengths: list[int], seed: int, packed: bool, data: st.DataObject
) -> None:
    experience = made(response_lengths, seed)
    rows = torch.tensor(data.draw(st.permutations(range(len(response_lengths)))))
    found = TrainingData.of(experience, CPU).micro_batch(rows, torch.ones(len(rows)), packed)
    wanted = experience.sequences.batch(rows, packed)
    assert (found.batch.ends is not None) is packed
    for field in fields(wanted):
        mine, theirs = getattr(found.batch, field.name), getattr(wanted, field.name)
        assert mine is theirs or torch.equal(torch.as_tensor(mine), torch.as_tensor(theirs))


@pytest.mark.parametrize("name", MODELS)
def test_models_that_a_job_lacks_leave_no_tensors(name: str) -> None:
    experience = replace(made([2, 3, 1], 1), **{name: None})
    found = TrainingData.of(experience, CPU).micro_batch(
        torch.tensor([2, 0]), torch.ones(2), packed=True
    )
    absent = [field for field, value in per_token(found).items() if value is None]
    assert absent == [name]


@settings(deadline=None, max_examples=40)
@given(lengths, seeds, st.sampled_from(AGGREGATIONS), st.integers(1, 3), layouts)
def test_weights_of_all_micro_batches_sum_to_one(
    response_lengths: list[int], seed: int, kind: str, micro: int, packed: bool
) -> None:
    experience = made(response_lengths, seed)
    order = torch.randperm(len(response_lengths), generator=torch.Generator().manual_seed(seed))
    rows = order[: max(1, len(order) - 1)]  # a mini-batch is a part of the rollout batch
    weights = aggregation_weights(experience.mask[rows], kind)
    mini_batch = MiniBatch(TrainingData.of(experience, CPU), rows, weights[:, 0])
    parts = [
        mini_batch.micro_batch(samples.tolist(), packed)
        for samples in torch.arange(len(rows)).split(micro)
    ]
    total = sum(float(part.weights.double().sum()) for part in parts)
    assert math.isclose(total, 1.0, rel_tol=1e-5)
    # Not only in all: every token weighs what it does in the mini-batch.
    for part, samples in zip(parts, torch.arange(len(rows)).split(micro), strict=True):
        width = part.weights.shape[1]
        torch.testing.assert_close(part.weights, weights[samples, :width], rtol=0, atol=0)
        assert not weights[samples, width:].any()


@settings(deadline=None, max_examples=30)
@given(lengths, seeds, layouts, st.data())
def test_samples_of_a_mini_batch_are_counted_from_its_first(
    response_lengths: list[int], seed: int, packed: bool, data: st.DataObject
) -> None:
    experience = made(response_lengths, seed)
    training = TrainingData.of(experience, CPU)
    rows = torch.tensor(data.draw(st.permutations(range(len(response_lengths)))))
    weights = torch.arange(1.0, len(rows) + 1)
    mini_batch = MiniBatch(training, rows, weights)
    assert mini_batch.lengths == [int(experience.sequences.lengths[row]) for row in rows]
    samples = data.draw(
        st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=4, unique=True)
    )
    found = mini_batch.micro_batch(samples, packed)
    wanted = training.micro_batch(rows[samples], weights[samples], packed)
    assert torch.equal(found.batch.tokens, wanted.batch.tokens)
    for name, value in per_token(found).items():
        other = getattr(wanted, name)
        assert value is not None and torch.equal(value, other), name
    assert found.batch.longest == max(mini_batch.lengths[sample] for sample in samples)
