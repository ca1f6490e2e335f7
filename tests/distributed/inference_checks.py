"""The ranks' part of test_inference.py: what inference instances make of finished samples."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.samples import Sample
from tests.distributed.job_helpers import changed, make_folders, make_sample, parse_job
from tests.distributed.model_helpers import seed_megatron

SAMPLES = 11  # no multiple of instances, stages or micro-batches
TEMPERATURE = 0.7
WORDS = 90  # tokens from here on decode to nothing
FLAGS = f"""
    --pipeline-model-parallel-size 2 --critic-pipeline-model-parallel-size 1
    --rollout-batch-size {SAMPLES + 1} --global-batch-size 4 --micro-batch-size 2 --train-iters 2
    --lr 1e-2 --rollout-temperature {TEMPERATURE}
    --reward-function tests.distributed.inference_checks:count_words
"""
Results = dict[str, Any]


def count_words(prompt: str, response: str, fields: dict[str, Any]) -> float:
    """A user's reward function."""
    return 100.0 * len(response.split()) + 10.0 * len(prompt.split()) + fields["bonus"]


def check_inference(folder: str) -> Results:
    root = Path(folder)
    if dist.get_rank() == 0:
        make_folders(root)
    dist.barrier()
    args = parse_job(root, *FLAGS.split())
    seed_megatron()
    # The actor is trained in two stages, the critic in two replicas: the one or the other, or
    # both, are scored with copies.
    layouts = {"two instances": (1, 1), "one pipeline": (1, 2), "one with TP": (2, 1)}
    return {
        name: _Job(args, tensor, pipeline).check() for name, (tensor, pipeline) in layouts.items()
    }


class _Job:
    """Trained models, and inference instances in a layout of their own."""

    def __init__(self, args: Namespace, tensor: int, pipeline: int) -> None:
        from transformers import AutoTokenizer

        from megatron_rlhfuse.assembly import build_trained_models
        from megatron_rlhfuse.inference.queue import SampleQueue

        self.args = changed(
            args,
            rlhfuse_inference_tensor_parallel_size=tensor,
            rlhfuse_inference_pipeline_parallel_size=pipeline,
        )
        self.tokenizer = AutoTokenizer.from_pretrained(args.actor_model)
        self.models = build_trained_models(self.args)
        self.queue = SampleQueue.connect(60, 1)
        self.instances = dist.get_world_size() // (tensor * pipeline)
        self.iteration = 0
        self.samples = [make_sample(i, 100 + i) for i in range(SAMPLES)]
        self.prompts = _prompts(self.samples)

    def check(self) -> Results:
        inference = self._build_inference(micro_batch_size=1)
        in_order = list(range(SAMPLES))
        scored = self._score(inference, in_order)
        ways = [self._score(inference, [7, 0, 10, 3, 1, 9, 2, 8, 4, 6, 5])]
        if self.instances > 1:
            ways += [self._score(inference, in_order, instance) for instance in (0, 1)]
        together = self._score(self._build_inference(micro_batch_size=3), in_order)
        reference = _Reference(self.args)
        results: Results = {
            "ways": [all(_equal(a, b) for a, b in zip(scored, w, strict=True)) for w in ways],
            "together": _largest(scored, together),
            "errors": _largest(scored, reference.score(self.samples)),
            "sums": [item.score - reference.rewards[i] for i, item in enumerate(scored)],
            "wanted sums": [
                count_words(p.text, " ".join("w" for t in s.response if t < WORDS), dict(p.fields))
                for s, p in zip(self.samples, self.prompts, strict=True)
            ],
        }
        self._train(scored)
        inference.refresh()
        fresh = self._score(inference, in_order)
        reference.take_weights(self.models)
        return results | {
            "change": _largest(scored, fresh),
            "errors after training": _largest(fresh, reference.score(self.samples)),
            "in training mode": [m.model.training for m in self.models.by_name().values()],
        }

    def _build_inference(self, micro_batch_size: int) -> Any:
        from megatron_rlhfuse.assembly import Inference
        from megatron_rlhfuse.observe.trace import Tracer

        args = changed(self.args, rlhfuse_inference_micro_batch_size=micro_batch_size)
        tracer = Tracer("unused", 0, enabled=False)
        inference = Inference(args, self.models, self.tokenizer, tracer)
        inference.refresh()
        return inference

    def _score(self, inference: Any, order: list[int], only: int | None = None) -> list[Any]:
        """All samples, put into the queue in this order; `only` one instance may take them.

        Every rank gets the results, by sample id.
        """
        from megatron_rlhfuse.inference.scored import ScoredSample
        from megatron_rlhfuse.pipeline.broadcast import broadcast_messages

        self.iteration += 1
        if dist.get_rank() == 0:
            for sample_id in order:
                self.queue.push_finished(self.iteration, self.samples[sample_id])
            self.queue.close(self.iteration)
        if only is None or only == dist.get_rank():
            inference.instance.score_all(self.queue, self.iteration, self.prompts)
        collected = None
        if dist.get_rank() == 0:
            collected = self.queue.collect(self.iteration)
        messages = broadcast_messages(collected, 0)
        dist.barrier()
        scored = [ScoredSample.from_bytes(message) for message in messages]
        return sorted(scored, key=lambda item: item.sample.sample_id)

    def _train(self, scored: list[Any]) -> None:
        from megatron_rlhfuse.observe.trace import Tracer
        from megatron_rlhfuse.training.experience import build_experience
        from megatron_rlhfuse.training.ppo import PPO, advantage_options

        experience = build_experience(scored[:8], advantage_options(self.args), 0.1)
        PPO(self.args, self.models, Tracer("unused", 0, enabled=False)).update(1, experience, 0.1)


def _prompts(samples: list[Sample]) -> list[Any]:
    from megatron_rlhfuse.data import Prompt

    return [
        Prompt(i, sample.prompt, " ".join("w" for _ in sample.prompt), {"bonus": i / 8})
        for i, sample in enumerate(samples)
    ]


class _Reference:
    """The four models in transformers, one unpadded sample at a time."""

    def __init__(self, args: Namespace) -> None:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        load, classify = AutoModelForCausalLM, AutoModelForSequenceClassification
        self.actor = load.from_pretrained(args.actor_model)
        self.reference = load.from_pretrained(args.reference_model)
        self.critic = classify.from_pretrained(args.critic_model)
        self.reward = classify.from_pretrained(args.reward_model)
        self.rewards: list[float] = []

    def take_weights(self, models: Any) -> None:
        """COLLECTIVE. Actor and critic become what was trained."""
        for name, model in models.by_name().items():
            getattr(self, name).load_state_dict(dict(model.hf_weights()))

    @torch.no_grad()
    def score(self, samples: list[Sample]) -> list[ScoredSample]:
        results = []
        self.rewards = []
        for sample in samples:
            tokens = torch.tensor([[*sample.prompt, *sample.response]])
            # What predicts the first response token, up to what predicts the last one.
            read = slice(len(sample.prompt) - 1, -1)
            response = torch.tensor(sample.response).unsqueeze(1)
            log_probs, reference = (
                (model(tokens).logits[0, read] / TEMPERATURE)
                .log_softmax(-1)
                .gather(1, response)
                .squeeze(1)
                for model in (self.actor, self.reference)
            )
            hidden = self.critic.model(tokens).last_hidden_state
            values = self.critic.score(hidden)[0, read, 0]
            reward = float(self.reward(tokens).logits)
            self.rewards.append(reward)
            results.append(ScoredSample(sample, log_probs, reference, values, reward))
        return results


def _tensors(item: ScoredSample) -> dict[str, Tensor]:
    assert item.reference_log_probs is not None and item.values is not None
    return {
        "log_probs": item.log_probs,
        "reference_log_probs": item.reference_log_probs,
        "values": item.values,
    }


def _equal(a: ScoredSample, b: ScoredSample) -> bool:
    same = all(torch.equal(x, _tensors(b)[name]) for name, x in _tensors(a).items())
    return same and a.score == b.score and a.sample == b.sample


def _largest(one: list[ScoredSample], other: list[ScoredSample]) -> dict[str, float]:
    """The largest difference of any sample's tensors, by name."""
    pairs = [(_tensors(a), _tensors(b)) for a, b in zip(one, other, strict=True)]
    return {
        name: max(float((a[name] - b[name]).abs().max()) for a, b in pairs) for name in pairs[0][0]
    }
