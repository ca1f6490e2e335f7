"""How long the responses to each prompt were, in earlier epochs: what the next are expected to be.

Invariants:
- a prompt that was never answered is expected to be answered like the average one;
- what is known depends on samples alone, so it is the same on every rank and after a resume.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

WEIGHT = 0.5
"""Of the latest epoch, against all before: the policy changes, and single responses are noise."""


class PromptLengths:
    """Mean response tokens by prompt, the older the lighter."""

    def __init__(self) -> None:
        self._means: dict[int, float] = {}
        self._sum = 0.0

    def add(self, lengths: Iterable[tuple[int, int]]) -> None:
        """The responses of one iteration: (prompt, tokens), several of a prompt averaged."""
        by_prompt: dict[int, list[int]] = {}
        for prompt, tokens in lengths:
            by_prompt.setdefault(prompt, []).append(tokens)
        for prompt, responses in by_prompt.items():
            new = math.fsum(responses) / len(responses)
            known = self._means.get(prompt)
            self._means[prompt] = new if known is None else known + WEIGHT * (new - known)
        self._sum = math.fsum(self._means.values())

    def expected(self, prompt: int) -> float:
        """Tokens of a response."""
        mean = self._sum / len(self._means) if self._means else 1.0
        return self._means.get(prompt, mean)

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints."""
        return {"prompts": list(self._means), "means": list(self._means.values())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes the place of what is known."""
        self._means = dict(zip(state["prompts"], state["means"], strict=True))
        self._sum = math.fsum(self._means.values())
