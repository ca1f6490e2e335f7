"""Layouts of ragged samples, and which positions of a model's output belong to the response."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_rlhfuse import compat, platform
from megatron_rlhfuse.dispatch.packing import starts_of
from megatron_rlhfuse.training.batches import RaggedTokens, TokenBatch

tokens = st.integers(1, 99)  # not 0, which fills up
# (prompt, response) of each sample; a prompt has at least one token.
samples = st.lists(
    st.tuples(st.lists(tokens, min_size=1, max_size=6), st.lists(tokens, max_size=6)),
    min_size=1,
    max_size=5,
)
Samples = list[tuple[list[int], list[int]]]

both_layouts = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


def ragged(rows: Samples) -> RaggedTokens:
    return RaggedTokens.of([prompt for prompt, _ in rows], [response for _, response in rows])


def longest_of(rows: Samples) -> int:
    return max(len(prompt) + len(response) for prompt, response in rows)


def places(rows: Samples, packed: bool) -> list[range]:
    """Where each sequence lies in the flattened layout."""
    found, start = [], 0
    for number, (prompt, response) in enumerate(rows):
        begin = start if packed else number * longest_of(rows)
        found.append(range(begin, begin + len(prompt) + len(response)))
        start += len(found[-1])
    return found


def mask_of(rows: Samples) -> Tensor:
    """[batch, longest response] float32, 1 at tokens of a response."""
    width = max(len(response) for _, response in rows)
    return torch.tensor([[float(i < len(response)) for i in range(width)] for _, response in rows])


def same(a: Tensor | int | None, b: Tensor | int | None) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def equal(a: TokenBatch, b: TokenBatch) -> bool:
    return all(
        same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a)
    )


@given(samples)
def test_ragged_tokens_are_one_sequence_behind_the_other(rows: Samples) -> None:
    sequences = ragged(rows)
    expected = [token for prompt, response in rows for token in prompt + response]
    assert sequences.tokens.tolist() == expected
    assert sequences.prompt_lengths.tolist() == [len(prompt) for prompt, _ in rows]
    assert sequences.response_lengths.tolist() == [len(response) for _, response in rows]
    assert sequences.lengths.tolist() == [len(place) for place in places(rows, packed=True)]
    assert {tensor.dtype for tensor in vars(sequences).values()} == {torch.int64}


def test_prompts_and_responses_of_different_number_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        RaggedTokens.of([[1], [2]], [[3]])


@given(st.lists(st.integers(0, 9), max_size=8))
def test_a_start_is_the_sum_of_what_comes_before(lengths: list[int]) -> None:
    found = starts_of(torch.tensor(lengths, dtype=torch.int64))
    assert found.tolist() == [sum(lengths[:i]) for i in range(len(lengths))]


@both_layouts
@given(rows=samples)
def test_a_batch_holds_every_sequence_with_its_positions(rows: Samples, packed: bool) -> None:
    batch = ragged(rows).batch(packed=packed)
    found = places(rows, packed)
    shape = (1, found[-1].stop) if packed else (len(rows), longest_of(rows))
    wanted, positions = ([0] * (shape[0] * shape[1]) for _ in range(2))
    for (prompt, response), place in zip(rows, found, strict=True):
        wanted[place.start : place.stop] = prompt + response
        positions[place.start : place.stop] = range(len(place))
    assert batch.tokens.shape == batch.positions.shape == shape
    assert batch.tokens.dtype == batch.positions.dtype == torch.int64
    assert batch.tokens.flatten().tolist() == wanted
    assert batch.positions.flatten().tolist() == positions


@both_layouts
@given(rows=samples)
def test_a_batch_knows_where_its_sequences_are(rows: Samples, packed: bool) -> None:
    batch = ragged(rows).batch(packed=packed)
    found = places(rows, packed)
    assert batch.size == len(rows)
    assert batch.first.dtype == batch.last.dtype == torch.int64
    assert batch.first.tolist() == [
        place.start + len(prompt) - 1 for place, (prompt, _) in zip(found, rows, strict=True)
    ]
    assert batch.last.tolist() == [place[-1] for place in found]
    assert batch.longest == longest_of(rows)
    assert batch.longest_response == max(len(response) for _, response in rows)
    if packed:
        assert batch.ends is not None and batch.ends.dtype == torch.int32
        assert batch.ends.tolist() == [place.stop for place in found]
    else:
        assert batch.ends is None


@pytest.fixture(scope="module")
def megatron() -> None:
    """What has to come before a part of Megatron is imported."""
    platform.prepare()
    compat.apply()


@pytest.mark.usefixtures("megatron")
@settings(deadline=None)
@given(samples)
def test_attention_is_told_of_packed_sequences_only(rows: Samples) -> None:
    assert ragged(rows).batch().packed_seq_params() is None
    params = ragged(rows).batch(packed=True).packed_seq_params()
    assert params is not None and params.qkv_format == "thd"
    bounds = [0, *(place.stop for place in places(rows, packed=True))]
    for found in (params.cu_seqlens_q, params.cu_seqlens_kv):
        assert found.dtype == torch.int32 and found.tolist() == bounds
    assert params.max_seqlen_q == params.max_seqlen_kv == longest_of(rows)


@both_layouts
@given(rows=samples)
def test_the_response_is_read_at_the_positions_that_predict_it(rows: Samples, packed: bool) -> None:
    batch = ragged(rows).batch(packed=packed)
    # Position t of a causal model has seen tokens 0..t, so it predicts token t + 1.
    outputs = torch.arange(batch.tokens.numel()).view_as(batch.tokens).float()
    read = batch.gather_response(outputs)
    assert read.shape == (len(rows), batch.longest_response)
    for row, (prompt, response), place in zip(
        read.tolist(), rows, places(rows, packed), strict=True
    ):
        first = place.start + len(prompt) - 1
        assert row[: len(response)] == list(range(first, first + len(response)))
        assert set(row[len(response) :]) <= {float(place[-1])}


@both_layouts
@given(rows=samples)
def test_next_tokens_read_at_the_response_are_the_response(rows: Samples, packed: bool) -> None:
    batch = ragged(rows).batch(packed=packed)
    following = batch.next_tokens()
    assert following.shape == batch.tokens.shape
    # Everywhere it is a token that the model has.
    assert set(following.flatten().tolist()) <= set(batch.tokens.flatten().tolist())
    for row, (_, response) in zip(batch.gather_response(following).tolist(), rows, strict=True):
        assert row[: len(response)] == response


@both_layouts
@given(rows=samples)
def test_gradients_reach_the_positions_of_the_response_only(rows: Samples, packed: bool) -> None:
    batch = ragged(rows).batch(packed=packed)
    outputs = torch.zeros(batch.tokens.shape, requires_grad=True)
    (batch.gather_response(outputs) * mask_of(rows)).sum().backward()
    assert outputs.grad is not None
    expected = [0.0] * outputs.numel()
    for (prompt, response), place in zip(rows, places(rows, packed), strict=True):
        first = place.start + len(prompt) - 1
        expected[first : first + len(response)] = [1.0] * len(response)
    assert outputs.grad.flatten().tolist() == expected


@both_layouts
@given(rows=samples)
def test_the_last_token_of_each_sequence_is_read(rows: Samples, packed: bool) -> None:
    batch = ragged(rows).batch(packed=packed)
    read = batch.gather_last(batch.tokens)
    assert read.tolist() == [(prompt + response)[-1] for prompt, response in rows]


@both_layouts
@settings(deadline=None)
@given(rows=samples, data=st.data())
def test_chosen_rows_are_laid_out_as_if_there_were_no_others(
    rows: Samples, data: st.DataObject, packed: bool
) -> None:
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), min_size=1, max_size=6))
    subset = ragged(rows).batch(torch.tensor(chosen), packed)
    assert equal(subset, ragged([rows[i] for i in chosen]).batch(packed=packed))


@both_layouts
@given(rows=samples)
def test_to_the_same_device_is_the_same_batch(rows: Samples, packed: bool) -> None:
    sequences, cpu = ragged(rows), torch.device("cpu")
    batch = sequences.batch(packed=packed)
    assert equal(batch, batch.to(cpu))
    assert equal(batch, sequences.to(cpu).batch(packed=packed))
