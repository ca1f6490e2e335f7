"""Padding, and which positions of a model's output belong to the response."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse.training.batches import TokenBatch, pad_rows

PAD = 999
tokens = st.integers(0, 99)
# (prompt, response) of each sample; a prompt has at least one token, so has a response.
samples = st.lists(
    st.tuples(
        st.lists(tokens, min_size=1, max_size=6),
        st.lists(tokens, min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=5,
)
Samples = list[tuple[list[int], list[int]]]


def padded(rows: Samples) -> TokenBatch:
    return TokenBatch.pad([prompt for prompt, _ in rows], [r for _, r in rows], PAD)


def equal(a: TokenBatch, b: TokenBatch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "prompt_lengths", "response_lengths")
    )


@given(samples)
def test_pad_lays_prompt_response_and_padding_side_by_side(rows: Samples) -> None:
    batch = padded(rows)
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    assert batch.size == len(rows)
    assert batch.tokens.dtype == torch.int64 and batch.tokens.shape == (len(rows), longest)
    for row, (prompt, response) in zip(batch.tokens.tolist(), rows, strict=True):
        assert row == prompt + response + [PAD] * (longest - len(prompt) - len(response))
    assert batch.prompt_lengths.tolist() == [len(prompt) for prompt, _ in rows]
    assert batch.response_lengths.tolist() == [len(response) for _, response in rows]


def test_pad_refuses_prompts_and_responses_of_different_number() -> None:
    with pytest.raises(ValueError):
        TokenBatch.pad([[1], [2]], [[3]], PAD)


@given(samples)
def test_gather_response_reads_the_positions_that_predict_the_response(rows: Samples) -> None:
    batch = padded(rows)
    # Position t of a causal model has seen tokens 0..t, so it predicts token t + 1.
    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens).float()
    read = batch.gather_response(positions)
    assert read.shape == (len(rows), max(len(response) for _, response in rows))
    for row, (prompt, response) in zip(read, rows, strict=True):
        expected = [len(prompt) - 1 + i for i in range(len(response))]
        assert row[: len(response)].tolist() == expected


@given(samples)
def test_next_tokens_read_at_the_response_are_the_response(rows: Samples) -> None:
    batch = padded(rows)
    read = batch.gather_response(batch.next_tokens())
    for row, (_, response) in zip(read.tolist(), rows, strict=True):
        assert row[: len(response)] == response


@given(samples)
def test_gradients_reach_the_positions_of_the_response_only(rows: Samples) -> None:
    batch = padded(rows)
    outputs = torch.zeros(batch.tokens.shape, requires_grad=True)
    (batch.gather_response(outputs) * batch.response_mask()).sum().backward()
    assert outputs.grad is not None
    for row, (prompt, response) in zip(outputs.grad.tolist(), rows, strict=True):
        first, end = len(prompt) - 1, len(prompt) - 1 + len(response)
        assert row == [float(first <= t < end) for t in range(len(row))]


@given(samples)
def test_the_mask_counts_the_response_tokens(rows: Samples) -> None:
    mask = padded(rows).response_mask()
    assert mask.dtype == torch.float32
    for row, (_, response) in zip(mask.tolist(), rows, strict=True):
        assert row == [1.0] * len(response) + [0.0] * (len(row) - len(response))


@given(samples)
def test_last_positions_hold_the_last_token_of_the_response(rows: Samples) -> None:
    batch = padded(rows)
    last = batch.tokens.gather(1, batch.last_positions().unsqueeze(1)).squeeze(1)
    assert last.tolist() == [response[-1] for _, response in rows]


@given(samples)
def test_position_ids_count_from_zero_in_every_row(rows: Samples) -> None:
    batch = padded(rows)
    width = batch.tokens.shape[1]
    assert batch.position_ids().tolist() == [list(range(width))] * len(rows)


@settings(deadline=None)
@given(samples, st.data())
def test_select_is_padding_the_subset_anew(rows: Samples, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    subset = padded(rows).select(torch.tensor(chosen))
    assert equal(subset, padded([rows[i] for i in chosen]))


@given(samples)
def test_to_the_same_device_is_the_same_batch(rows: Samples) -> None:
    batch = padded(rows)
    assert equal(batch, batch.to(torch.device("cpu")))


@given(st.lists(st.lists(st.floats(-5, 5, width=32), max_size=4), min_size=1, max_size=4))
def test_pad_rows_puts_zeros_on_the_right(rows: list[list[float]]) -> None:
    width = 5
    result: Tensor = pad_rows([torch.tensor(row) for row in rows], width)
    assert result.dtype == torch.float32
    for row, values in zip(result.tolist(), rows, strict=True):
        assert row == values + [0.0] * (width - len(values))


def test_pad_rows_refuses_a_row_longer_than_the_width() -> None:
    with pytest.raises(RuntimeError):
        pad_rows([torch.zeros(3)], 2)
