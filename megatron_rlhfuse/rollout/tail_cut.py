"""An instance's part in leaving the longest prompts of an iteration out.

Instances tell each other how long the answered prompts are (prompt_rounds says which are trained).
As soon as enough are answered, each gives up its samples that are certain to be left out.

Invariants
- a sample is offered to inference only when all samples of its prompt are there and the prompt is
  not beyond the cut-off known then; so all that are trained are offered, and few others;
- an instance has ended when each of its prompts is answered whole or given up.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.rollout.engine import GenerationEngine
from megatron_rlhfuse.rollout.prompt_rounds import (
    Length,
    PromptBatch,
    cutoff,
    is_beyond,
)
from megatron_rlhfuse.rollout.samples import Sample

LOOK_S = 0.1
"""Between two looks at the noted lengths: they are long, and many instances read them."""


class TailCut:
    """One instance, in one iteration. All samples of a prompt are made by one instance."""

    def __init__(
        self, engine: GenerationEngine, queue: SampleQueue, iteration: int, batch: PromptBatch
    ) -> None:
        self._engine, self._queue = engine, queue
        self._iteration, self._batch = iteration, batch
        self._waiting: dict[int, Sample] = {}  # by sample id: its prompt is not answered whole
        self._lost: set[int] = set()  # prompts given up
        self._limit: Length | None = None
        self._answered = 0  # prompts, when the limit was last looked up
        self._looked = float("-inf")
        self.discarded_tokens = 0
        """Of samples that were given up, or finished and not offered."""

    def finished(self, samples: Sequence[Sample]) -> list[Sample]:
        """Takes samples that are finished; returns those to be offered to inference."""
        offered: list[Sample] = []
        for sample in samples:
            prompt = sample.sample_id // self._batch.copies
            if prompt in self._lost:  # it was on its way
                self._discard([len(sample.response)])
                continue
            self._waiting[sample.sample_id] = sample
            mine = self._batch.samples(prompt)
            if not all(each in self._waiting for each in mine):
                continue
            whole = [self._waiting.pop(each) for each in mine]
            lengths = [len(each.response) for each in whole]
            length = (max(lengths), prompt)
            self._queue.note_length(self._iteration, *length)
            if self._limit is not None and length > self._limit:
                self._discard(lengths)
            else:
                offered += whole
        return offered

    def step(self) -> None:
        """Gives up what is certain to be left out."""
        answered = self._queue.answered(self._iteration)
        if answered < self._batch.trained:
            return
        if answered > self._answered and time.monotonic() - self._looked > LOOK_S:
            self._answered, self._looked = answered, time.monotonic()
            self._limit = cutoff(self._queue.lengths(self._iteration), self._batch.trained)
        unfinished = {sample: tokens for sample, _, tokens in self._engine.lengths()}
        reached = unfinished | {s: len(each.response) - 1 for s, each in self._waiting.items()}
        lost = {
            sample // self._batch.copies
            for sample, tokens in reached.items()
            if is_beyond(tokens, sample // self._batch.copies, self._limit)
        }
        if not lost:
            return
        self._lost |= lost
        given_up = [each for each in unfinished if each // self._batch.copies in lost]
        self._engine.abort(given_up)
        self._discard(unfinished[each] for each in given_up)
        for each in [s for s in self._waiting if s // self._batch.copies in lost]:
            self._discard([len(self._waiting.pop(each).response)])

    def _discard(self, tokens: Iterable[int]) -> None:
        self.discarded_tokens += sum(tokens)
