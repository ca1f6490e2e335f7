"""How long responses are: a distribution, and a memory of it over iterations.

Invariants:
- lengths are whole, from 0 to `max_tokens`; a response cut at the limit counts as that long;
- an iteration weighs `decay` times as much as the next one, however many samples it had before;
- the prior counts only until the first lengths are there.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from megatron_rlhfuse.schedule.errors import ProblemError, show
from megatron_rlhfuse.schedule.fields import Fields, is_whole

PRIOR_MEDIAN = 1 / 8
"""Of `max_tokens`: limits are set generously."""
PRIOR_SIGMA = 1.0

LOG_NORMAL_POINTS = 10_000
"""Lengths of equal weight that stand for a log-normal: enough for its 99.9th percentile."""

FORGOTTEN = 1e-4
"""Weight, in samples, below which a length is dropped."""


class LengthDistribution:
    """Lengths, ascending, with weights; `weights` sum to 1."""

    def __init__(self, lengths: ArrayLike, weights: ArrayLike | None = None) -> None:
        """Args: weights: above 0, by length; None gives all the same. Raises ValueError."""
        values = np.asarray(lengths, dtype=np.int64)
        masses = np.ones(values.shape) if weights is None else np.asarray(weights, dtype=float)
        if values.ndim != 1 or not len(values) or masses.shape != values.shape:
            raise ValueError("lengths: want at least one, and a weight for each")
        if not (masses > 0).all() or not np.isfinite(masses).all() or values.min() < 0:
            raise ValueError("lengths: want them of at least 0, with weights above 0")
        self.lengths, place = np.unique(values, return_inverse=True)
        self.weights: NDArray[np.float64] = np.zeros(len(self.lengths))
        np.add.at(self.weights, place, masses / masses.sum())
        self._cumulative = np.concatenate(([0.0], np.cumsum(self.weights)))
        self._cumulative[-1] = 1.0
        # Of lengths from one on upwards: their weight, and their sum by weight.
        self._above = np.append(np.cumsum(self.weights[::-1])[::-1], 0.0)
        self._above_tokens = np.append(np.cumsum((self.weights * self.lengths)[::-1])[::-1], 0.0)

    @classmethod
    def log_normal(cls, median: float, sigma: float, max_tokens: int) -> LengthDistribution:
        """Cut at `max_tokens`: what would be longer is that long."""
        levels = (np.arange(LOG_NORMAL_POINTS) + 0.5) / LOG_NORMAL_POINTS
        normal = np.array([NormalDist().inv_cdf(level) for level in levels])
        # Cut before rounding: an extreme sigma overflows.
        tokens = np.exp(np.minimum(np.log(median) + sigma * normal, np.log(max_tokens)))
        return cls(np.clip(np.rint(tokens), 1, max_tokens))

    @property
    def mean(self) -> float:
        return float(self.lengths @ self.weights)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` independent lengths."""
        return self._at(rng.random(count))

    def quantile(self, q: float) -> int:
        """The least length that a share of at least `q` does not exceed."""
        return int(self._at(np.array(q - 1e-12)))

    def expected_remaining(self, so_far: float) -> float:
        """Mean of L - so_far over lengths L > so_far; 1 where none is known."""
        first = int(np.searchsorted(self.lengths, so_far, side="right"))
        if first == len(self.lengths):
            return 1.0
        return float(self._above_tokens[first] / self._above[first]) - so_far

    def remaining(
        self, so_far: NDArray[np.int64], levels: NDArray[np.float64]
    ) -> NDArray[np.int64]:
        """Quantiles of L - so_far given L > so_far, 1 where none is known.

        Args: so_far: [samples]; levels: [..., samples], within (0, 1).
        """
        below = self._cumulative[np.searchsorted(self.lengths, so_far, side="right")]
        longer = self._at(below + levels * (1 - below))
        return np.maximum(longer - so_far, 1)

    def _at(self, levels: NDArray[np.float64]) -> NDArray[np.int64]:
        place = np.searchsorted(self._cumulative[1:], levels, side="right")
        return self.lengths[np.minimum(place, len(self.lengths) - 1)]


class LengthHistory:
    """Response lengths of recent iterations, the older the lighter."""

    def __init__(self, max_tokens: int, decay: float = 0.7) -> None:
        """Raises ValueError naming the argument."""
        if max_tokens < 1:
            raise ValueError(f"max_tokens is {max_tokens}; it must be at least 1")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; it must be from 0 to 1")
        self._max_tokens = max_tokens
        self._decay = decay
        self._weights = np.zeros(max_tokens + 1)

    def add(self, lengths: Iterable[int]) -> None:
        """The lengths of one iteration. Raises ValueError for one out of range."""
        new = np.fromiter(lengths, dtype=np.int64)
        if not len(new):
            return
        if new.min() < 0 or new.max() > self._max_tokens:
            raise ValueError(
                f"lengths from {new.min()} to {new.max()}; they must be from 0 to "
                f"max_tokens ({self._max_tokens})"
            )
        self._weights *= self._decay
        self._weights += np.bincount(new, minlength=self._max_tokens + 1)
        self._weights[self._weights < FORGOTTEN] = 0.0

    def distribution(self) -> LengthDistribution:
        """What is known; before the first iteration a log-normal prior."""
        seen = np.flatnonzero(self._weights)
        if len(seen):
            return LengthDistribution(seen, self._weights[seen])
        median = max(1.0, PRIOR_MEDIAN * self._max_tokens)
        return LengthDistribution.log_normal(median, PRIOR_SIGMA, self._max_tokens)

    def state_dict(self) -> dict[str, Any]:
        """What JSON can hold, for checkpoints."""
        seen = np.flatnonzero(self._weights)
        return {"lengths": seen.tolist(), "weights": self._weights[seen].tolist()}

    def load_state_dict(self, state: Any) -> None:
        """Takes the place of what is known; lengths above this `max_tokens` are cut to it.

        Raises ProblemError naming the field.
        """
        fields = Fields(state, "", {"lengths", "weights"}, set(), what="length history")
        lengths = fields.get("lengths")
        if not isinstance(lengths, list):
            raise ProblemError("lengths", f"want a list, got {show(lengths)}")
        for i, length in enumerate(lengths):
            if not is_whole(length) or not 0 <= length <= 2**31:
                raise ProblemError(f"lengths[{i}]", f"want a whole number, got {show(length)}")
        if not isinstance(fields.get("weights"), list):
            raise ProblemError("weights", f"want a list, got {show(fields.get('weights'))}")
        weights = fields.numbers("weights", len(lengths), "length", above=0.0)
        places = np.minimum(np.array(lengths, dtype=np.int64), self._max_tokens)
        self._weights = np.zeros(self._max_tokens + 1)
        np.add.at(self._weights, places, weights)
