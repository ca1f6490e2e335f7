"""Rates: decode times by batch size, transfers, the fit of observed steps, the JSON form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlhfuse.migration.rates import Rates, fit_decode
from megatron_rlhfuse.schedule.errors import ProblemError

RATES = Rates(
    decode=((2, 1.0), (4, 1.05), (8, 1.5), (16, 3.5)),
    prefill_tokens_per_s=1000.0,
    kv_bytes_per_token=100.0,
    kv_bytes_per_s=1e6,
    kv_bytes_per_s_between_nodes=1e4,
    transfer_latency_s=0.25,
    inference_s=0.5,
)

curves = st.lists(st.tuples(st.integers(1, 50), st.floats(0.0, 2.0)), min_size=1, max_size=6).map(
    lambda rises: tuple(
        zip(
            np.cumsum([size for size, _ in rises]).tolist(),
            (0.01 + np.cumsum([rise for _, rise in rises])).tolist(),
            strict=True,
        )
    )
)


@pytest.mark.parametrize(
    ("batch", "seconds"),
    [(1, 1.0), (2, 1.0), (3, 1.025), (4, 1.05), (6, 1.275), (16, 3.5), (20, 4.5)],
)
def test_steps_are_linear_between_points_and_beyond_the_last(batch: float, seconds: float) -> None:
    assert RATES.step_seconds(batch) == pytest.approx(seconds)


def test_one_point_is_a_constant() -> None:
    flat = replace(RATES, decode=((4, 2.0),))
    assert flat.step_seconds(1) == flat.step_seconds(400) == 2.0
    assert flat.step_table(9).tolist() == [2.0] * 10


@given(curves)
def test_the_table_is_step_seconds_and_never_falls(decode: tuple[tuple[int, float], ...]) -> None:
    rates = replace(RATES, decode=decode)
    table = rates.step_table(120)
    assert table == pytest.approx([rates.step_seconds(batch) for batch in range(121)])
    assert (np.diff(table) >= -1e-9).all()


@given(curves, st.floats(0.0, 1.0))
def test_saturation_is_the_last_point_within_the_slack(
    decode: tuple[tuple[int, float], ...], slack: float
) -> None:
    rates = replace(RATES, decode=decode)
    batch = rates.saturation_batch(slack)
    limit = (1 + slack) * decode[0][1]
    assert dict(decode)[batch] <= limit
    assert all(seconds > limit for size, seconds in decode if size > batch)


def test_saturation_by_hand() -> None:
    assert RATES.saturation_batch() == 4
    assert RATES.saturation_batch(0.0) == 2
    assert RATES.saturation_batch(0.5) == 8


def test_transfers_by_hand() -> None:
    assert RATES.transfer_seconds(500, True, "kv") == pytest.approx(0.25 + 0.05)
    assert RATES.transfer_seconds(500, False, "kv") == pytest.approx(0.25 + 5.0)
    assert RATES.transfer_seconds(500, False, "tokens") == pytest.approx(0.25 + 0.5)
    assert RATES.cheaper_transfer(500, True) == "kv"
    assert RATES.cheaper_transfer(500, False) == "tokens"


@given(st.integers(1, 10_000), st.booleans(), st.floats(1.0, 1e6))
def test_the_cheaper_transfer_is_no_slower(tokens: int, same_node: bool, prefill: float) -> None:
    rates = replace(RATES, prefill_tokens_per_s=prefill)
    chosen = rates.cheaper_transfer(tokens, same_node)
    times = [rates.transfer_seconds(tokens, same_node, way) for way in ("kv", "tokens")]
    assert rates.transfer_seconds(tokens, same_node, chosen) == min(times)


def test_json_goes_there_and_back() -> None:
    assert Rates.from_json(RATES.to_json()) == RATES


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("decode", [], "at.decode: want at least one"),
        ("decode", 3, "at.decode: want a list"),
        ("decode", [[1]], "at.decode: want a list"),
        ("decode", [[0, 1]], r"at.decode\[0\]: want a batch size above 0"),
        ("decode", [[1, 1], [1, 2]], r"at.decode\[1\]: want a batch size above 1"),
        ("decode", [[1, 1], [2, 0.5]], r"at.decode\[1\]: want seconds of at least the 1"),
        ("decode", [[1, 0]], r"at.decode\[0\]: want seconds above 0"),
        ("decode", [[1, "x"]], r"at.decode\[0\]: want seconds above 0, got 'x'"),
        ("kv_bytes_per_s", 0, "at.kv_bytes_per_s: want a number above 0"),
        ("transfer_latency_s", -1, "at.transfer_latency_s: want a number of at least 0"),
        ("speed", 1, "at.speed: unknown field"),
    ],
)
def test_bad_fields_are_named(field: str, value: Any, says: str) -> None:
    with pytest.raises(ProblemError, match=says):
        Rates.from_json({**RATES.to_json(), field: value}, "at")


def test_rates_made_by_code_are_checked_too() -> None:
    with pytest.raises(ProblemError, match="decode"):
        replace(RATES, decode=())
    with pytest.raises(ProblemError, match="inference_s"):
        replace(RATES, inference_s=-1.0)


observations = st.lists(st.tuples(st.floats(0.0, 600.0), st.floats(0.0, 10.0)), max_size=80)


@given(observations)
def test_a_fit_makes_valid_rates(seen: list[tuple[float, float]]) -> None:
    points = fit_decode(seen)
    usable = [(batch, seconds) for batch, seconds in seen if batch > 0 and seconds > 0]
    assert bool(points) == bool(usable)
    if points:
        replace(RATES, decode=points)
        times = [seconds for _, seconds in usable]
        assert all(min(times) * 0.999 <= seconds <= max(times) * 1.001 for _, seconds in points)


def test_a_fit_finds_the_curve_despite_outliers() -> None:
    seen = [(float(batch), 0.01 * batch) for batch in (1, 4, 16, 64) for _ in range(9)]
    seen += [(float(batch), 5.0) for batch in (1, 4, 16, 64)]
    assert fit_decode(seen) == ((1, 0.01), (4, 0.04), (16, 0.16), (64, 0.64))


def test_sizes_out_of_order_are_pooled() -> None:
    assert fit_decode([(1, 2.0), (4, 1.0), (4, 1.0), (16, 3.0)]) == (
        (1, pytest.approx(4 / 3)),
        (4, pytest.approx(4 / 3)),
        (16, 3.0),
    )
