"""Which prompts an iteration answers, and which of them it trains. PURE.

With extra prompts an iteration answers more than it trains: those whose longest response is the
shortest are trained, the others are deferred. As soon as enough prompts are deferred they make up
an iteration of their own, in which none is left out, so that long responses keep each other
company (tail batching, after RollPacker).

Invariants
- what is trained depends on the lengths of responses in tokens, never on time: where the same seed
  gives the same samples, it trains the same ones, whatever is fused;
- a prompt is deferred at most once: each that was drawn is trained exactly once, or is deferred;
- a deferred prompt keeps the seeds that it was drawn with. Its response is what newer weights make
  of the same random numbers; with new ones it would often be a short one, and long responses would
  become rarer in training than the policy makes them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

from megatron_rlhfuse.data import Prompt, PromptDataset, PromptSampler
from megatron_rlhfuse.rollout.samples import sample_seed

Length = tuple[int, int]
"""(tokens of a prompt's longest response, position of the prompt in its batch): a total order."""


@dataclass(frozen=True)
class DrawnPrompt:
    """A prompt, and when it was drawn."""

    prompt: Prompt
    iteration: int
    position: int
    """In the batch of that iteration."""


@dataclass(frozen=True)
class PromptBatch(Sequence[Prompt]):
    """What an iteration answers. A sequence of the prompt of every sample, by sample id."""

    drawn: tuple[DrawnPrompt, ...]
    copies: int
    """Samples of a prompt."""
    trained: int
    """Prompts that are trained; the others are deferred."""

    @property
    def leaves_out(self) -> bool:
        """Whether prompts are deferred."""
        return self.trained < len(self.drawn)

    def samples(self, position: int) -> range:
        """Those of the prompt at a position."""
        return range(position * self.copies, (position + 1) * self.copies)

    def seed(self, run_seed: int, sample_id: int) -> int:
        """Of a sample's random numbers."""
        drawn = self.drawn[sample_id // self.copies]
        return sample_seed(
            run_seed, drawn.iteration, drawn.position * self.copies + sample_id % self.copies
        )

    def __len__(self) -> int:
        return len(self.drawn) * self.copies

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        return self.drawn[index // self.copies].prompt


class PromptRounds:
    """The batches of a job."""

    def __init__(
        self, dataset: PromptDataset, sampler: PromptSampler, copies: int, trained: int
    ) -> None:
        """sampler: draws the prompts of an iteration, at least the `trained` ones."""
        self._dataset, self._sampler = dataset, sampler
        self._copies, self._trained = copies, trained
        self._deferred: list[DrawnPrompt] = []

    @property
    def deferred(self) -> int:
        """Prompts that wait for an iteration of their own."""
        return len(self._deferred)

    def next_batch(self, iteration: int) -> PromptBatch:
        """Newly drawn prompts, or deferred ones where there are enough.

        What a job has deferred that is gone on with without extra prompts comes first.
        """
        old: list[DrawnPrompt] = []
        if len(self._deferred) >= self._trained or self._sampler.batch_size == self._trained:
            old = self._deferred[: self._trained]
            del self._deferred[: self._trained]
        new = (self._trained if old else self._sampler.batch_size) - len(old)
        drawn = [
            DrawnPrompt(self._dataset[index], iteration, position)
            for position, index in enumerate(self._sampler.next_batch(new))
        ]
        return PromptBatch((*old, *drawn), self._copies, self._trained)

    def settle(self, batch: PromptBatch, lengths: Mapping[int, int]) -> set[int]:
        """The samples to be trained; defers all other prompts.

        Args: lengths: response tokens by sample id, of the prompts that were answered whole
        """
        chosen = shortest(longest_responses(batch, lengths), batch.trained)
        if batch.leaves_out:
            self._deferred += [
                drawn for position, drawn in enumerate(batch.drawn) if position not in chosen
            ]
        return {sample for position in chosen for sample in batch.samples(position)}

    def state_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints; the position in the data is the sampler's."""
        return {"deferred": [[d.prompt.index, d.iteration, d.position] for d in self._deferred]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues with the deferred prompts of a checkpoint; older ones know of none."""
        self._deferred = [
            DrawnPrompt(self._dataset[index], iteration, position)
            for index, iteration, position in state.get("deferred", ())
        ]


def extra_prompts(trained: int, fraction: float) -> int:
    """How many prompts an iteration answers beyond those it trains: rounded up."""
    return math.ceil(round(trained * fraction, 6))  # 100 * 0.07 is a little more than 7


def longest_responses(batch: PromptBatch, lengths: Mapping[int, int]) -> list[Length]:
    """Of the prompts whose samples are all there."""
    return [
        (max(lengths[sample] for sample in batch.samples(position)), position)
        for position in range(len(batch.drawn))
        if all(sample in lengths for sample in batch.samples(position))
    ]


def shortest(answered: Iterable[Length], count: int) -> set[int]:
    """Positions of the `count` prompts with the shortest longest response."""
    return {position for _, position in sorted(answered)[:count]}


def cutoff(answered: Iterable[Length], count: int) -> Length | None:
    """The largest length that is still among the `count` shortest; None before there are so many.

    It can only fall as more prompts are answered, so what is beyond it now stays so.
    """
    ordered = sorted(answered)
    return ordered[count - 1] if len(ordered) >= count else None


def is_beyond(tokens: int, position: int, limit: Length | None) -> bool:
    """Whether a prompt is left out of which an unfinished response has so many tokens.

    The response will have at least one token more.
    """
    return limit is not None and (tokens + 1, position) > limit
