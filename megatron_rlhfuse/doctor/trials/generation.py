"""A vLLM engine in its child process gets weights from here, and counts."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

TOKENS = 12
PROMPTS = ((3, 4, 5), (20, 21, 22, 23))
START_TIMEOUT_S = 540.0
STEP_TIMEOUT_S = 120.0
KV_CACHE_BYTES = 64 << 20
GPU_SHARE = 0.1
"""vLLM wants so much of a GPU to be free before it starts."""
REMEMBERED = Path.home() / ".cache/vllm/modelinfos"
"""What vLLM knows of its models: to find that out anew takes it ten seconds."""


def run(folder: Path) -> str:
    """The engine's own weights are random: only those that it is given make it count."""
    from megatron_rlhfuse import platform
    from megatron_rlhfuse.doctor.trials import tiny_model
    from megatron_rlhfuse.rollout.engine import EngineOptions, GenerationEngine
    from megatron_rlhfuse.rollout.samples import GenerationRequest, SamplingOptions

    if os.access(REMEMBERED, os.R_OK | os.X_OK):
        shutil.copytree(REMEMBERED, folder / REMEMBERED.name)  # folder is VLLM_CACHE_ROOT here
    model = folder / "model"
    tiny_model.write(model)
    machine = platform.engine_defaults()
    options = EngineOptions(
        model=str(model),
        tensor_parallel_size=1,
        dtype=machine["dtype"],
        max_model_len=tiny_model.LENGTH,
        max_num_seqs=len(PROMPTS),
        kv_cache_bytes=KV_CACHE_BYTES,
        gpu_memory_utilization=GPU_SHARE,
        enforce_eager=machine["enforce_eager"],
        block_size=None,
        seed=0,
        device=machine["device"],
        visible_devices=platform.visible_devices(0, 1),
        log_file=str(folder / "engine.log"),
        start_timeout_s=START_TIMEOUT_S,
        step_timeout_s=STEP_TIMEOUT_S,
        enable_sleep=machine["can_sleep"],
    )
    engine = GenerationEngine(0, options, SamplingOptions(max_new_tokens=TOKENS, ignore_eos=True))
    requests = [GenerationRequest(n, prompt, seed=n) for n, prompt in enumerate(PROMPTS)]
    try:
        engine.start()
        engine.update_weights(tiny_model.make_weights().items(), version=1)
        samples = engine.generate(requests)
    finally:
        engine.close()
    for sample in samples:
        first = sample.prompt[-1] + 1
        if sample.response != tuple(range(first, first + TOKENS)):
            raise RuntimeError(
                f"a model that counts went on after {sample.prompt} with {sample.response}: "
                "weights do not reach the engine as they are, or its kernels compute wrongly"
            )
    return f"{len(samples)} responses of {TOKENS} tokens after a weight update, on {options.device}"
