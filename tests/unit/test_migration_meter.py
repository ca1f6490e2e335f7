"""The meter of rates: assumptions until something was observed, then observations, the latest most.

What is right follows from the definition of each rate, amount per time.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.migration.meter import (
    ASSUMED_BYTES_PER_S,
    ASSUMED_LATENCY_S,
    FORGETTING,
    KEPT,
    MODELS,
    RateMeter,
)
from megatron_rlhfuse.migration.rates import Rates

KV_BYTES_PER_TOKEN = 512.0
TOKENS = 100.0  # of a sample, on average
amounts = st.floats(1e-3, 1e9)


@pytest.fixture
def meter() -> RateMeter:
    """Has seen one decode step: 4 samples in 10 ms."""
    return decoding()


def decoding() -> RateMeter:
    made = RateMeter(KV_BYTES_PER_TOKEN)
    made.decode(4, 0.01)
    return made


def rates(meter: RateMeter, mean_tokens: float = TOKENS) -> Rates:
    found = meter.rates(mean_tokens)
    assert found is not None
    return found


def test_without_a_decode_step_there_are_no_rates() -> None:
    meter = RateMeter(KV_BYTES_PER_TOKEN)
    meter.prefill(1000, 1)
    meter.transfer(1e6, 1, same_node=True)
    meter.inference(3, 1)
    assert meter.rates(TOKENS) is None
    meter.decode(1, 0.01)
    assert meter.rates(TOKENS) is not None


@pytest.mark.parametrize(("batch", "seconds"), [(0, 0.01), (4, 0), (-1, 0.01), (4, -1)])
def test_what_is_no_decode_step_does_not_count(batch: float, seconds: float) -> None:
    meter = RateMeter(KV_BYTES_PER_TOKEN)
    meter.decode(batch, seconds)
    assert meter.rates(TOKENS) is None


def test_decode_steps_become_a_curve(meter: RateMeter) -> None:
    meter.decode(64, 0.05)
    found = rates(meter)
    assert found.step_seconds(4) == pytest.approx(0.01)
    assert found.step_seconds(64) == pytest.approx(0.05)
    assert found.step_seconds(34) == pytest.approx(0.03)  # half way


def test_the_oldest_decode_steps_are_forgotten(meter: RateMeter) -> None:
    """Their median is of the ones that are kept."""
    for _ in range(KEPT):
        meter.decode(4, 0.02)
    assert rates(meter).decode == ((4, 0.02),)
    for _ in range(KEPT // 2 + 1):
        meter.decode(4, 0.03)
    assert rates(meter).decode == ((4, 0.03),)


def test_assumptions_stand_for_what_was_not_observed(meter: RateMeter) -> None:
    found = rates(meter)
    assert found.kv_bytes_per_token == KV_BYTES_PER_TOKEN
    assert found.kv_bytes_per_s == found.kv_bytes_per_s_between_nodes == ASSUMED_BYTES_PER_S
    assert found.transfer_latency_s == ASSUMED_LATENCY_S
    # A prompt's token takes a decode step at most.
    assert found.prefill_tokens_per_s == pytest.approx(1 / 0.01)
    assert found.inference_s == pytest.approx(MODELS * TOKENS / found.prefill_tokens_per_s)


def test_unobserved_inference_follows_the_observed_prefill(meter: RateMeter) -> None:
    meter.prefill(5000, 2)
    found = rates(meter, mean_tokens=50)
    assert found.prefill_tokens_per_s == pytest.approx(2500)
    assert found.inference_s == pytest.approx(MODELS * 50 / 2500)


def test_observed_inference_is_seconds_per_sample(meter: RateMeter) -> None:
    """Of any length: that is what was observed."""
    meter.inference(8, 2)
    assert rates(meter, 10).inference_s == rates(meter, 1000).inference_s == pytest.approx(0.25)


def test_transfers_within_and_between_nodes_are_apart(meter: RateMeter) -> None:
    meter.transfer(6e9, 2, same_node=True)
    found = rates(meter)
    assert found.kv_bytes_per_s == pytest.approx(3e9)
    # Faster than what is assumed within a node says nothing about the way to another one.
    assert found.kv_bytes_per_s_between_nodes == ASSUMED_BYTES_PER_S
    meter.transfer(1e6, 2, same_node=False)
    found = rates(meter)
    assert found.kv_bytes_per_s == pytest.approx(3e9)
    assert found.kv_bytes_per_s_between_nodes == pytest.approx(5e5)


def test_between_nodes_is_not_assumed_faster_than_within(meter: RateMeter) -> None:
    meter.transfer(1e6, 1, same_node=True)
    assert rates(meter).kv_bytes_per_s_between_nodes == pytest.approx(1e6)


@pytest.mark.parametrize("amount_seconds", [(0.0, 1.0), (1.0, 0.0), (0.0, 0.0)])
def test_nothing_observed_changes_nothing(
    meter: RateMeter, amount_seconds: tuple[float, float]
) -> None:
    """An instance that gave no samples away, or scored none."""
    meter.prefill(100, 1)
    before = rates(meter)
    meter.prefill(*amount_seconds)
    meter.transfer(*amount_seconds, same_node=True)
    meter.transfer(*amount_seconds, same_node=False)
    meter.inference(*amount_seconds)
    assert rates(meter) == before


def test_an_iteration_weighs_half_of_the_next(meter: RateMeter) -> None:
    meter.inference(8, 1)
    meter.inference(4, 1)
    wanted = (FORGETTING * 8 + 4) / (FORGETTING + 1)
    assert 1 / rates(meter).inference_s == pytest.approx(wanted)


@given(st.tuples(amounts, amounts), st.tuples(amounts, amounts))
def test_a_change_is_followed(old: tuple[float, float], new: tuple[float, float]) -> None:
    """The rate lies between the old and the new one, and ends at the new one."""
    meter = decoding()
    meter.prefill(*old)
    meter.prefill(*new)
    before, after = old[0] / old[1], new[0] / new[1]
    low, high = sorted((before, after))
    assert low * (1 - 1e-9) <= rates(meter).prefill_tokens_per_s <= high * (1 + 1e-9)
    for _ in range(150):
        meter.prefill(*new)
    assert rates(meter).prefill_tokens_per_s == pytest.approx(after)
