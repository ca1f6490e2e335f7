"""The generation stage: every generation instance's engine, driven by the rank that leads it.

Ranks are cut into as many equal blocks as there are instances; the first rank of a block leads
the instance. Which instance makes a sample depends on its prompt alone, so responses to one
prompt share its cached prefix.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from megatron_rlhfuse import platform
from megatron_rlhfuse.data import Prompt
from megatron_rlhfuse.inference.queue import SampleQueue
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.rollout.engine import EngineOptions, GenerationEngine, WeightUpdate
from megatron_rlhfuse.rollout.samples import (
    GenerationRequest,
    Sample,
    SamplingOptions,
    sample_seed,
)

# How long a leader listens to its engine before it looks at signals again.
_POLL_S = 0.5


class GenerationStage:
    """This rank's part of generation: an engine on a leader, nothing on other ranks."""

    def __init__(self, args: argparse.Namespace, tracer: Tracer) -> None:
        block = args.world_size // args.rollout_instances
        self._instances = args.rollout_instances
        self._samples_per_prompt = args.rollout_samples_per_prompt
        self._seed = args.seed
        self._tracer = tracer
        self._engine: GenerationEngine | None = None
        self._restarts_seen = 0
        if args.rank % block == 0:
            instance = args.rank // block
            self._engine = GenerationEngine(
                instance, engine_options(args, instance), sampling_options(args)
            )
            self._instance = instance

    def start(self) -> None:
        """Starts the engine without waiting: it loads while the models are built."""
        if self._engine is not None:
            self._engine.start()

    def make_room(self) -> None:
        """Lets an engine that shares its GPU with training finish its start, and sleep.

        vLLM measures the free memory while it starts: nothing may be allocated beside it then.
        On a machine without GPUs engines go on loading while the models are built.
        """
        if self._engine is not None and self._engine.options.enable_sleep:
            self._engine.wait_until_ready()
            self._engine.sleep()

    def wait_until_ready(self) -> None:
        """Waits for this rank's engine. Raises EngineError naming it and its log."""
        if self._engine is not None:
            self._engine.wait_until_ready()

    def generate(
        self, queue: SampleQueue, iteration: int, prompts: Sequence[Prompt]
    ) -> list[Sample]:
        """Makes this instance's samples of the iteration and offers each as it finishes.

        `prompts`: by sample id. Returns the samples made by this rank's engine.
        """
        if self._engine is None:
            return []
        requests = [
            GenerationRequest(
                sample_id, prompt.token_ids, sample_seed(self._seed, iteration, sample_id)
            )
            for sample_id, prompt in enumerate(prompts)
            if sample_id // self._samples_per_prompt % self._instances == self._instance
        ]
        self._engine.submit(requests)
        made: list[Sample] = []
        while self._engine.unfinished:
            for sample in self._engine.poll(_POLL_S):
                queue.push_finished(iteration, sample)
                made.append(sample)
                self._trace(sample)
        return made

    def update_weights(
        self, stream: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> WeightUpdate | None:
        """Gives the engine new weights; every rank must consume the collective stream."""
        if self._engine is None:
            for _ in stream:
                pass
            return None
        return self._engine.update_weights(stream, version)

    def sleep(self) -> None:
        """Gives the engine's memory back to training, where it can."""
        if self._engine is not None:
            self._engine.sleep()

    def wake(self) -> None:
        """Takes that memory again, before new weights arrive."""
        platform.release_memory()
        if self._engine is not None:
            self._engine.wake()

    def observe(self) -> dict[str, float]:
        """`peak_bytes` of this rank's engine and its `restarts` since the last call."""
        if self._engine is None:
            return {"peak_bytes": 0, "restarts": 0}
        restarts = self._engine.restarts - self._restarts_seen
        self._restarts_seen = self._engine.restarts
        return {
            "peak_bytes": platform.peak_resident_bytes(self._engine.pid),
            "restarts": restarts,
        }

    def close(self) -> None:
        """Ends the engine; leaves no process."""
        if self._engine is not None:
            self._engine.close()

    def _trace(self, sample: Sample) -> None:
        self._tracer.add(
            f"sample {sample.sample_id}",
            sample.started,
            sample.finished,
            track=f"engine {self._instance} samples",
            category="sample",
            tokens=len(sample.response),
            stop_reason=sample.stop_reason,
        )


def sampling_options(args: argparse.Namespace) -> SamplingOptions:
    """The `--rollout-*` sampling flags."""
    return SamplingOptions(
        temperature=args.rollout_temperature,
        top_p=args.rollout_top_p,
        top_k=args.rollout_top_k,
        repetition_penalty=args.rollout_repetition_penalty,
        presence_penalty=args.rollout_presence_penalty,
        frequency_penalty=args.rollout_frequency_penalty,
        max_new_tokens=args.rollout_max_new_tokens,
        min_new_tokens=args.rollout_min_new_tokens,
        stop_token_ids=tuple(args.rollout_stop_token_ids),
        ignore_eos=args.rollout_ignore_eos,
    )


def engine_options(args: argparse.Namespace, instance: int) -> EngineOptions:
    """How an instance's engine runs on this machine."""
    machine = platform.engine_defaults()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    log = Path(args.rlhfuse_run_dir) / "logs" / f"engine{instance}.log"
    return EngineOptions(
        model=args.actor_model,
        tensor_parallel_size=args.rollout_tensor_parallel_size,
        dtype=args.rollout_dtype,
        max_model_len=args.seq_length,
        max_num_seqs=args.rollout_max_num_seqs,
        kv_cache_bytes=args.rollout_kv_cache_bytes,
        gpu_memory_utilization=args.rollout_gpu_memory_utilization,
        enforce_eager=machine["enforce_eager"],
        block_size=None,
        seed=args.seed,
        device=machine["device"],
        visible_devices=platform.visible_devices(local_rank, args.rollout_tensor_parallel_size),
        log_file=str(log),
        start_timeout_s=args.rollout_start_timeout,
        step_timeout_s=args.rollout_step_timeout,
        enable_sleep=machine["can_sleep"],
    )
