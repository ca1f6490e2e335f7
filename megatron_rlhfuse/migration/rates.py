"""How fast instances decode, prefill, send KV caches and score: measured, or assumed.

Invariants of `Rates`:
- batch sizes of `decode` ascend, their seconds do not descend: a step of more samples is no faster;
- every rate is above 0, every duration at least 0.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_rlhfuse.migration.state import Transfer
from megatron_rlhfuse.schedule.errors import ProblemError, show
from megatron_rlhfuse.schedule.fields import Fields, is_whole

BUCKETS_PER_DOUBLING = 2
"""Of `fit_decode`: sizes within a factor of about 1.4 are one point of the curve."""

_ABOVE_ZERO = (
    "prefill_tokens_per_s",
    "kv_bytes_per_token",
    "kv_bytes_per_s",
    "kv_bytes_per_s_between_nodes",
)
_AT_LEAST_ZERO = ("transfer_latency_s", "inference_s")


@dataclass(frozen=True)
class Rates:
    """What the planner and the simulation know about the machine and the models.

    Attributes:
        decode: (batch size, seconds of a decode step); between the points linear, constant below
            the first, beyond the last as between the last two
        prefill_tokens_per_s: of one instance
        kv_bytes_per_token: of all layers
        kv_bytes_per_s: between instances of one node
        transfer_latency_s: of one sample, however it travels
        inference_s: an instance's time for one sample of mean length, all models together

    Raises:
        ProblemError: `decode` breaks the invariant.
    """

    decode: tuple[tuple[int, float], ...]
    prefill_tokens_per_s: float
    kv_bytes_per_token: float
    kv_bytes_per_s: float
    kv_bytes_per_s_between_nodes: float
    transfer_latency_s: float
    inference_s: float

    def __post_init__(self) -> None:
        _check_decode(self.decode, "decode")
        for name in _ABOVE_ZERO + _AT_LEAST_ZERO:
            value = getattr(self, name)
            if not (value > 0 or (value == 0 and name in _AT_LEAST_ZERO)):
                least = "above 0" if name in _ABOVE_ZERO else "of at least 0"
                raise ProblemError(name, f"want a number {least}, got {show(value)}")

    def step_seconds(self, batch: float) -> float:
        """Duration of a decode step of `batch` samples."""
        sizes, seconds = zip(*self.decode, strict=True)
        if batch > sizes[-1] and len(sizes) > 1:
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            return float(seconds[-1] + slope * (batch - sizes[-1]))
        return float(np.interp(batch, sizes, seconds))

    def step_table(self, most: int) -> NDArray[np.float64]:
        """`step_seconds` of 0, 1, ..., `most` samples, [most + 1]."""
        sizes, seconds = (np.array(column) for column in zip(*self.decode, strict=True))
        batches = np.arange(most + 1)
        table = np.interp(batches, sizes, seconds)
        if len(sizes) > 1:
            slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
            table += slope * np.maximum(batches - sizes[-1], 0)
        return table

    def saturation_batch(self, slack: float = 0.1) -> int:
        """BSmax: the largest measured batch whose step is at most (1 + slack) x the first's.

        Up to it decoding is bound by memory: more samples cost next to nothing.
        """
        limit = (1 + slack) * self.decode[0][1]
        return max(size for size, seconds in self.decode if seconds <= limit)

    def transfer_seconds(self, tokens: float, same_node: bool, transfer: Transfer) -> float:
        """Time until a sample of `tokens`, prompt included, can go on elsewhere."""
        if transfer == "kv":
            return float(self.kv_seconds(np.array(tokens), np.array(same_node)))
        return self.transfer_latency_s + tokens / self.prefill_tokens_per_s

    def kv_seconds(self, tokens: NDArray[Any], same_node: NDArray[np.bool_]) -> NDArray[np.float64]:
        """`transfer_seconds` of KV caches, by sample."""
        speed = np.where(same_node, self.kv_bytes_per_s, self.kv_bytes_per_s_between_nodes)
        return self.transfer_latency_s + tokens * self.kv_bytes_per_token / speed

    def cheaper_transfer(self, tokens: float, same_node: bool) -> Transfer:
        """The faster of the two; where they are equal the KV cache, which costs no computation."""
        kv = self.transfer_seconds(tokens, same_node, "kv")
        return "kv" if kv <= self.transfer_seconds(tokens, same_node, "tokens") else "tokens"

    def to_json(self) -> dict[str, Any]:
        """`from_json` makes equal rates of it."""
        data: dict[str, Any] = {"decode": [list(point) for point in self.decode]}
        return data | {name: getattr(self, name) for name in _ABOVE_ZERO + _AT_LEAST_ZERO}

    @classmethod
    def from_json(cls, data: Any, path: str = "") -> Rates:
        """Rates from their JSON form, which is at `path`. Raises ProblemError naming the field."""
        names = {"decode", *_ABOVE_ZERO, *_AT_LEAST_ZERO}
        fields = Fields(data, path, names, set(), what="rates")
        listed, where = fields.get("decode"), fields.path("decode")
        if not isinstance(listed, list) or not all(
            isinstance(point, list) and len(point) == 2 for point in listed
        ):
            raise ProblemError(where, "want a list of [batch size, seconds of a decode step]")
        _check_decode(listed, where)
        return cls(
            decode=tuple((size, float(seconds)) for size, seconds in listed),
            **{name: fields.number(name, above=0.0) for name in _ABOVE_ZERO},
            **{name: fields.number(name, lowest=0.0) for name in _AT_LEAST_ZERO},
        )


def fit_decode(observations: Iterable[tuple[float, float]]) -> tuple[tuple[int, float], ...]:
    """The `decode` of `Rates` from observed (batch size, seconds) of steps.

    One point per bucket of similar sizes, at the median of both: a step that was held up by
    something else does not count. Made nondecreasing by pooling neighbours that are out of order
    (weighted means: isotonic regression). Empty where no observation has a sample and a duration.
    """
    buckets: dict[int, list[tuple[float, float]]] = {}
    for batch, seconds in observations:
        if batch > 0 and 0 < seconds < np.inf:
            bucket = round(BUCKETS_PER_DOUBLING * np.log2(max(batch, 1.0)))
            buckets.setdefault(bucket, []).append((batch, seconds))
    sizes: dict[int, list[float]] = {}
    for _, seen in sorted(buckets.items()):
        size = max(1, round(median(batch for batch, _ in seen)))
        sizes.setdefault(size, []).extend(seconds for _, seconds in seen)
    points = [(size, median(seconds), len(seconds)) for size, seconds in sorted(sizes.items())]
    return tuple(zip([size for size, _, _ in points], _nondecreasing(points), strict=True))


def _nondecreasing(points: list[tuple[int, float, int]]) -> list[float]:
    """Seconds of the points by weighted isotonic regression, pool-adjacent-violators."""
    pools: list[tuple[float, int, int]] = []  # mean, weight, points
    for _, seconds, weight in points:
        mean, count = seconds, 1
        while pools and pools[-1][0] > mean:
            before, heavy, held = pools.pop()
            mean = (before * heavy + mean * weight) / (heavy + weight)
            weight, count = weight + heavy, count + held
        pools.append((mean, weight, count))
    return [mean for mean, _, count in pools for _ in range(count)]


def _check_decode(points: Any, path: str) -> None:
    if not points:
        raise ProblemError(path, "want at least one [batch size, seconds of a decode step]")
    before = (0, 0.0)
    for i, (size, seconds) in enumerate(points):
        if not is_whole(size) or size <= before[0]:
            raise ProblemError(
                f"{path}[{i}]", f"want a batch size above {before[0]}, got {show(size)}"
            )
        number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
        if not number or not 0 < seconds < 1e9 or seconds < before[1]:
            least = f"of at least the {before[1]:g} of the smaller batch" if i else "above 0"
            raise ProblemError(f"{path}[{i}]", f"want seconds {least}, got {show(seconds)}")
        before = (size, seconds)
