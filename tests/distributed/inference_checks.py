"""The ranks' part of test_inference.py: what inference instances make of finished samples."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rlhfuse.rollout.samples import Sample
from tests.distributed.job_helpers import changed, make_folders, make_sample, parse_job
from tests.distributed.model_helpers import seed_megatron

SAMPLES = 11  # no multiple of instances, stages or micro-batches
TEMPERATURE = 0.7
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
        _Reference(root).score(_samples(1), root / "expected.pt")
    dist.barrier()
    args = parse_job(root, *FLAGS.split())
    seed_megatron()
    # Training is PP 2 for the actor and DP 2 for the critic.
    layouts = {"two instances": (1, 1), "one pipeline": (1, 2), "one with TP": (2, 1)}
    results: Results = {}
    for name, (tensor, pipeline) in layouts.items():
        job = _Job(
            changed(
                args,
                rlhfuse_inference_tensor_parallel_size=tensor,
                rlhfuse_inference_pipeline_parallel_size=pipeline,
            )
        )
        results[name] = job.check(root)
    return results


def _samples(iteration: int) -> list[Sample]:
    return [make_sample(i, 100 * iteration + i) for i in range(SAMPLES)]


def _prompts(samples: list[Sample]) -> list[Any]:
    from megatron_rlhfuse.data import Prompt

    words = [" ".join(f"w{token}" for token in s.prompt) for s in samples]
    return [
        Prompt(i, s.prompt, text, {"bonus": float(i)})
        for i, (s, text) in enumerate(zip(samples, words, strict=True))
    ]


class _Job:
    """Trained models and the inference instances of one layout."""

    def __init__(self, args: Namespace) -> None:
        from transformers import AutoTokenizer

        from megatron_rlhfuse.assembly import Inference, build_trained_models
        from megatron_rlhfuse.inference.queue import SampleQueue
        from megatron_rlhfuse.observe.trace import Tracer

        self.args = args
        self.tracer = Tracer("unused", 0, enabled=False)
        self.tokenizer = AutoTokenizer.from_pretrained(args.actor_model)
        self.models = build_trained_models(args)
        self.inference = Inference(args, self.models, self.tokenizer, self.tracer)
        self.inference.refresh()
        self.queue = SampleQueue.connect(60)
        self.iteration = 0

    def check(self, root: Path) -> Results:
        samples = _samples(1)
        scored = self.score(samples, list(range(SAMPLES)))
        shuffled = self.score(samples, [7, 0, 10, 3, 1, 9, 2, 8, 4, 6, 5])
        results: Results = {"bitwise": _equal(scored, shuffled)}
        results["together"] = _difference(scored, self._in_one_micro_batch(samples))
        if dist.get_rank() == 0:
            results["errors"] = _errors(scored, torch.load(root / "expected.pt"), samples)
        before = self._trained()
        self._train(scored)
        trained = self._trained()
        results["moved"] = max(float((trained[n] - before[n]).abs().max()) for n in trained)
        results["stale"] = _equal(scored, self.score(samples, list(range(SAMPLES))))
        self.inference.refresh()
        results["copies"] = self._copies_equal(trained)
        fresh = self.score(samples, list(range(SAMPLES)))
        results["fresh"] = _equal(fresh, self._scored_by_a_new_job(trained, samples))
        results["changed"] = not _equal(scored, fresh)
        results["modes"] = [m.model.training for m in self.models.by_name().values()]
        return results

    def score(self, samples: list[Sample], order: list[int]) -> list[Any]:
        """All samples through the queue; every rank gets the results, by sample id."""
        from megatron_rlhfuse.inference.broadcast import broadcast_messages
        from megatron_rlhfuse.inference.scored import ScoredSample

        self.iteration += 1
        if dist.get_rank() == 0:
            for sample_id in order:
                self.queue.push_finished(self.iteration, samples[sample_id])
        self.inference.instance.score_all(
            self.queue, self.iteration, SAMPLES, _prompts(samples)
        )
        collected = None
        if dist.get_rank() == 0:
            collected = self.queue.collect(self.iteration, SAMPLES)
        messages = broadcast_messages(collected, 0)
        dist.barrier()
        scored = [ScoredSample.from_bytes(message) for message in messages]
        return sorted(scored, key=lambda item: item.sample.sample_id)
