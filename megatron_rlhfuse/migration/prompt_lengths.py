"""How long the responses to each prompt were, in earlier epochs: what the next are expected to be.

A prompt's mean is believed as far as such means have told lengths so far: expectations are those of
a regression of new lengths on old means. Where lengths do not follow prompts, all prompts are
expected to be alike; differences that are noise would deal prompts out unevenly for nothing.

Invariants:
- a prompt that was never answered is expected to be answered like the average one, and so is every
  prompt until one has been answered twice;
- what is known depends on samples alone, so it is the same on every rank and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

WEIGHT = 0.5
"""Of the latest epoch, against all before: the policy changes, and single responses are noise."""

DECAY = 0.8
"""Of what earlier iterations say of the regression."""


class PromptLengths:
    """Mean response tokens by prompt, the older the lighter."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._mean = 1.0
        self._spread = self._agreement = 0.0
        """Of known means about their average: squares, and products with what then came."""

    def add(self, lengths: Iterable[tuple[int, int]]) -> None:
        """The responses of one iteration: (prompt, tokens), several of a prompt averaged."""
        by_prompt: dict[int, list[int]] = {}
        for prompt, tokens in lengths:
            by_prompt.setdefault(prompt, []).append(tokens)
        new = {prompt: math.fsum(each) / len(each) for prompt, each in by_prompt.items()}
        self._regress([(self._means[p], mean) for p, mean in new.items() if p in self._means])
        for prompt, mean in new.items():
            known = self._means.get(prompt)
            self._means[prompt] = mean if known is None else known + WEIGHT * (mean - known)
        self._average()

    @property
    def slope(self) -> float:
        """How much longer a response is for each token that its prompt's mean is: 0 to 1."""
        return min(1.0, max(0.0, self._agreement / self._spread)) if self._spread else 0.0

    def expected(self, prompt: int) -> float:
        """Tokens of a response."""
        return self._mean + self.slope * (self._means.get(prompt, self._mean) - self._mean)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {
            "prompts": list(self._means),
            "means": list(self._means.values()),
            "regression": [self._spread, self._agreement],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the place of what is known."""
        self._means = dict(zip(state["prompts"], state["means"], strict=True))
        self._spread, self._agreement = state["regression"]
        self._average()

    def _average(self) -> None:
        # fsum: the order in which prompts came must not show.
        means = self._means.values()
        self._mean = math.fsum(means) / len(means) if means else 1.0

    def _regress(self, pairs: Sequence[tuple[float, float]]) -> None:
        """Takes in what was known of prompts, and what then came."""
        if len(pairs) < 2:
            return
        old, new = (math.fsum(column) / len(pairs) for column in zip(*pairs, strict=True))
        squares = math.fsum((x - old) ** 2 for x, _ in pairs)
        products = math.fsum((x - old) * (y - new) for x, y in pairs)
        self._spread = DECAY * self._spread + squares
        self._agreement = DECAY * self._agreement + products
