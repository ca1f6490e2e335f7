"""What it costs to migrate a sample: with keys and values, and with its tokens only."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_rlhfuse.rollout.engine import EngineOptions, GenerationEngine
from megatron_rlhfuse.rollout.samples import GenerationRequest, SamplingOptions

CONTEXTS = (100, 400, 1600)
SAMPLES = 4
REPEATS = 2
RESPONSE = 24
"""Tokens that samples have when they leave; the rest of the context is the prompt."""


def transfer_costs(folder: Path) -> dict[str, Any]:
    """Per sample, medians: seconds at the source, and until the destination goes on."""
    sampling = SamplingOptions(max_new_tokens=400, ignore_eos=True)
    with _engine(folder, 0, sampling) as source, _engine(folder, 1, sampling) as destination:
        costs = {}
        for context in CONTEXTS:
            for way in ("kv", "tokens"):
                runs = [
                    _migrate(source, destination, context, way == "kv") for _ in range(REPEATS + 1)
                ]
                held, until, size, again = (
                    statistics.median(column) for column in zip(*runs[1:], strict=True)
                )
                costs[f"{way}_{context}"] = {
                    "source_ms": round(held * 1e3 / SAMPLES, 3),
                    "until_next_token_ms": round(until * 1e3 / SAMPLES, 3),
                    "kv_bytes": round(size / SAMPLES),
                    "recomputed_tokens": again / SAMPLES,
                }
                print(f"{way}, {context} tokens: {costs[f'{way}_{context}']}", file=sys.stderr)
    return {"transfer_costs": costs, "samples": SAMPLES}


def _migrate(
    source: GenerationEngine, destination: GenerationEngine, context: int, with_kv: bool
) -> tuple[float, float, int, int]:
    prompt = context - RESPONSE
    source.submit([GenerationRequest(i, (i + 1,) * prompt, i) for i in range(SAMPLES)])
    while min(length for _, _, length in source.lengths()) < RESPONSE:
        source.poll(0.01)
    before = destination.recomputed_tokens, destination.resumed
    ids = range(SAMPLES)
    left = source.extract(ids, ids if with_kv else ())
    began = time.perf_counter()
    destination.submit(left.samples)
    while destination.resumed - before[1] < SAMPLES:
        destination.poll(0.001)
    until = time.perf_counter() - began
    destination.extract(ids)
    source.forget_exports()
    again = destination.recomputed_tokens - before[0]
    for engine in (source, destination):
        engine.free_cache()  # or the next run finds the prompts in it
    return left.seconds, until, left.kv_bytes, again


@contextmanager
def _engine(folder: Path, instance: int, sampling: SamplingOptions) -> Iterator[GenerationEngine]:
    from safetensors.torch import load_file

    model = folder / "50m"
    engine = GenerationEngine(
        instance,
        EngineOptions(
            model=str(model),
            tensor_parallel_size=1,
            dtype="float32",
            max_model_len=2048,
            max_num_seqs=SAMPLES,
            kv_cache_bytes=512 << 20,
            gpu_memory_utilization=0.5,
            enforce_eager=True,
            block_size=None,
            seed=0,
            device="cpu",
            visible_devices=None,
            log_file=str(folder / f"engine{instance}.log"),
            start_timeout_s=300,
            step_timeout_s=300,
            enable_sleep=False,
            migrates=True,
        ),
        sampling,
    )
    engine.start()
    try:
        engine.update_weights(load_file(model / "model.safetensors").items(), 1)
        yield engine
    finally:
        engine.close()
