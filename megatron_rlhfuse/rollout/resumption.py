"""A request that goes on where another engine has left off.

vLLM knows requests that begin. Three things make one go on instead: its response tokens so far are
response tokens here too (else penalties, min_tokens and the length budget would go wrong), its
random generator stands where the other one stood, and its log-probabilities are handed on beside
it. In vLLM's V2 model runner, which draws by (seed, position) and gets all tokens from the
scheduler, the first is enough.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch

from megatron_rlhfuse.rollout.samples import PartialSample

RESPONSE, GENERATOR = "rlhfuse_response", "rlhfuse_generator"
"""Of a request's sampling_params.extra_args."""

FILES, TOKENS = "rlhfuse_kv_files", "rlhfuse_kv_tokens"
"""Of its kv_transfer_params: a file for each worker, and how many tokens they hold."""


def extra_args(before: PartialSample | None, kv_files: tuple[str, ...]) -> dict[str, Any] | None:
    """Of a request's sampling parameters; None for one that begins."""
    if before is None or not before.response:
        return None
    extra: dict[str, Any] = {RESPONSE: list(before.response), GENERATOR: before.generator}
    if kv_files:
        extra["kv_transfer_params"] = {FILES: list(kv_files), TOKENS: before.kv_tokens}
    return extra


def resume_in_scheduler(core: Any) -> None:
    """Lets an engine core take requests with a response so far."""
    preprocess = core.preprocess_add_request

    @functools.wraps(preprocess)
    def with_response(request: Any) -> Any:
        made, wave = preprocess(request)
        response = _extra(made.sampling_params).get(RESPONSE)
        if response:
            made.append_output_token_ids(list(response))
            made.prefill_stats = None  # they would take the response for a part of the prompt
        return made, wave

    core.preprocess_add_request = with_response


def resume_in_worker() -> None:
    """Lets the V1 model runner of this process take such requests."""
    from vllm.v1.worker import gpu_model_runner

    known: type = gpu_model_runner.CachedRequestState
    if not issubclass(known, _Resumable):
        made = type("ResumedRequestState", (_Resumable, known), {})
        setattr(gpu_model_runner, known.__name__, made)


class _Resumable:
    """What a runner keeps of a request, from its extra arguments on."""

    sampling_params: Any
    output_token_ids: list[int]
    generator: torch.Generator | None

    def __post_init__(self) -> None:
        extra = _extra(self.sampling_params)
        if RESPONSE in extra and not self.output_token_ids:
            self.output_token_ids.extend(extra[RESPONSE])
            state = extra.get(GENERATOR)
            if self.generator is not None and state is not None:
                self.generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
        super().__post_init__()  # type: ignore[misc]


def generator_states(worker: Any, request_ids: Sequence[str]) -> list[bytes | None]:
    """Runs in a worker: the states of requests' generators, None where there is none."""
    requests = getattr(worker.model_runner, "requests", {})
    states = []
    for request_id in request_ids:
        generator = getattr(requests.get(request_id), "generator", None)
        states.append(None if generator is None else generator.get_state().numpy().tobytes())
    return states


def is_resumed(sampling_params: Any) -> bool:
    """Whether a request goes on with a response."""
    return RESPONSE in _extra(sampling_params)


def _extra(sampling_params: Any) -> dict[str, Any]:
    return (sampling_params.extra_args if sampling_params is not None else None) or {}
