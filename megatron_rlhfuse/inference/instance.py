"""An inference instance: a block of ranks that pulls finished samples and scores them.

The four models of an instance share one layout. Frozen models (reference, reward) live in host
memory between stages. Actor and critic are the models in training where the layouts agree, else
copies in the inference layout, refreshed from the stream of trained weights.

One sample is the unit of work: at a micro-batch of one, its scores depend on nothing but the
weights and its tokens, whichever instance scores it and when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rlhfuse import platform
from megatron_rlhfuse.data import Prompt
from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.pipeline.broadcast import broadcast_messages
from megatron_rlhfuse.pipeline.groups import ModelGroups
from megatron_rlhfuse.pipeline.model import PipelinedModel
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.training.batches import RaggedTokens, TokenBatch
from megatron_rlhfuse.training.heads import PolicyHead, response_values, sequence_scores
from megatron_rlhfuse.training.steps import scoring_step


@dataclass(frozen=True)
class InferenceModels:
    """What scores a sample; None where the algorithm has no such model."""

    actor: PipelinedModel
    reference: PipelinedModel | None
    critic: PipelinedModel | None
    reward: PipelinedModel | None

    def to_host(self) -> None:
        """Moves the frozen models to host memory."""
        for model in (self.reference, self.reward):
            if model is not None:
                model.model.to("cpu")
        platform.release_memory()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Brings the frozen models in from host memory for the duration of a stage."""
        frozen = [model for model in (self.reference, self.reward) if model is not None]
        for model in frozen:
            model.model.to(platform.device())
        try:
            yield
        finally:
            self.to_host()


@dataclass(frozen=True)
class Scoring:
    """What an instance did in an iteration."""

    samples: int
    seconds: float
    """Without waiting for samples."""
    began: float
    """time.time() at the first sample; 0 without any."""


class InferenceInstance:
    """This rank's part of its inference instance."""

    def __init__(
        self,
        models: InferenceModels,
        groups: ModelGroups,
        head: PolicyHead,
        score_text: Callable[[Sample, Prompt], float] | None,
        micro_batch_size: int,
        pack_sequences: bool,
        tracer: Tracer,
    ) -> None:
        """`head` reads the actor's and the reference's logits; `score_text` is the reward
        function's score of a sample, None without one."""
        self._models = models
        self._groups = groups
        self._head = head
        self._score_text = score_text
        self._micro_batch_size = micro_batch_size
        self._pack_sequences = pack_sequences
        self._tracer = tracer
        block = torch.distributed.get_process_group_ranks(groups.pgc.mp)
        self.ranks = block
        """Of this instance."""
        self._leader = block[0]
        self._is_leader = torch.distributed.get_rank() == self._leader
        # Scores come out of the last stage; its first tensor-parallel rank reports them.
        self._is_reporter = models.actor.is_last_stage and groups.pgc.tp.rank() == 0

    def score_all(self, queue: SampleQueue, iteration: int, prompts: Sequence[Prompt]) -> Scoring:
        """Scores samples of the iteration until none is left.

        COLLECTIVE over the ranks of the instance. `prompts`: by sample id. Samples that are not
        finished yet are waited for.
        """
        pull = self._micro_batch_size * self._groups.layout.pp
        scored, seconds, began = 0, 0.0, 0.0
        with self._models.on_device(), torch.no_grad():
            while samples := self._pull(queue, iteration, pull):
                start = time.time()
                began = began or start
                with self._tracer.span("score", "inference", samples=len(samples)):
                    results = self._score(samples, prompts)
                if self._is_reporter:
                    queue.push_scored(iteration, results)
                scored += len(samples)
                seconds += time.time() - start
        return Scoring(scored, seconds, began)

    def _pull(self, queue: SampleQueue, iteration: int, count: int) -> list[Sample]:
        """The leader takes samples from the queue; its instance gets copies."""
        messages = None
        if self._is_leader:
            messages = [s.to_bytes() for s in queue.take(iteration, count)]
        messages = broadcast_messages(messages, self._leader, self._groups.pgc.mp)
        return [Sample.from_bytes(message) for message in messages]

    def _score(self, samples: Sequence[Sample], prompts: Sequence[Prompt]) -> list[ScoredSample]:
        """Runs every model over the samples; results on the reporter, nothing elsewhere."""
        # Those of like length share a micro-batch: it is padded to its longest.
        samples = sorted(samples, key=lambda each: len(each.prompt) + len(each.response))
        parts = [
            samples[start : start + self._micro_batch_size]
            for start in range(0, len(samples), self._micro_batch_size)
        ]
        batches = [
            RaggedTokens.of([s.prompt for s in part], [s.response for s in part]).batch(
                packed=self._pack_sequences
            )
            for part in parts
        ]
        models = self._models
        log_probs = _rows(models.actor, batches, self._head.log_probs)
        reference = _rows(models.reference, batches, self._head.log_probs)
        values = _rows(models.critic, batches, response_values)
        rewards = _rows(models.reward, batches, sequence_scores)
        if not self._is_reporter:
            return []
        results = []
        for row, sample in enumerate(samples):
            length = len(sample.response)
            score = float(rewards[row]) if rewards is not None else 0.0
            if self._score_text is not None:
                score += self._score_text(sample, prompts[sample.sample_id])
            assert log_probs is not None
            results.append(
                ScoredSample(
                    sample=sample,
                    log_probs=log_probs[row][:length].clone(),
                    reference_log_probs=None
                    if reference is None
                    else reference[row][:length].clone(),
                    values=None if values is None else values[row][:length].clone(),
                    score=score,
                )
            )
        return results


def _rows(
    model: PipelinedModel | None,
    batches: Sequence[TokenBatch],
    read: Callable[[Tensor, TokenBatch], Tensor],
) -> list[Tensor] | None:
    """One tensor per sample from a forward pass over the batches; None without the model.

    COLLECTIVE over the ranks of the model's replica; empty before its last stage.
    """
    if model is None:
        return None
    was_training = model.model.training
    model.model.eval()
    outputs = model.run(scoring_step(read), batches, forward_only=True)
    model.model.train(was_training)
    return [row for output in outputs for row in output]
