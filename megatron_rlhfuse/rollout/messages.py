"""What a trainer rank and its engine process say to each other, and how an engine is built.

Plain frozen data. It travels pickled over a socket pair that only these two processes hold; it
must never be read from anything that another user or another host can reach.

A ticket is the parent's own number for one submission of one request. Two submissions never share
one, so an answer that arrives late cannot be taken for the answer to a newer request.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlhfuse.rollout.samples import (
    GenerationRequest,
    PartialSample,
    Sample,
    SamplingOptions,
)


@dataclass(frozen=True)
class EngineOptions:
    """How one generation instance is built.

    Raises:
        ValueError: options that contradict each other; the message names the field.
    """

    model: str
    """Hugging Face folder; its config and tokenizer are read, its weights are not."""
    tensor_parallel_size: int
    dtype: str
    """"float32", "bfloat16" or "float16"."""
    max_model_len: int
    """Longest prompt plus response, in tokens."""
    max_num_seqs: int
    """Most sequences decoded at once."""
    kv_cache_bytes: int | None
    """KV cache per worker; None takes what gpu_memory_utilization leaves."""
    gpu_memory_utilization: float
    """Share of each GPU's memory that the engine may take."""
    enforce_eager: bool
    """Run without CUDA graphs and compilation."""
    block_size: int | None
    """Tokens per KV block; None is vLLM's choice."""
    seed: int
    device: str
    """"cpu" or "cuda"."""
    visible_devices: tuple[int, ...] | None
    """GPUs of this instance, as this rank counts them; None leaves all visible."""
    log_file: str
    """Takes everything the engine prints; appended to."""
    start_timeout_s: float
    """A start that takes longer is a hang."""
    step_timeout_s: float
    """An engine with work that says nothing for so long hangs; longer than any one step, any one
    bucket of a weight update and the reload after it."""
    enable_sleep: bool
    """Give GPU memory back between generations; see GenerationEngine.sleep."""
    migrates: bool = False
    """Be able to give away and to take over samples with their keys and values."""
    pace_s: float = 0.0
    """Least duration of a step, for measurements: an engine on a GPU below its saturation batch
    needs as long for a step of one sequence as for one of many. 0: as fast as it can."""

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise ValueError(f"device is {self.device!r}; it must be 'cpu' or 'cuda'")
        if self.device == "cpu" and self.kv_cache_bytes is None:
            # vLLM would take gpu_memory_utilization of the host's memory, once per instance.
            raise ValueError("kv_cache_bytes must be given on a CPU")
        if self.device == "cpu" and self.enable_sleep:
            raise ValueError("enable_sleep needs device 'cuda': sleeping frees no memory on a CPU")
        if self.visible_devices is not None and (
            len(self.visible_devices) != self.tensor_parallel_size
        ):
            raise ValueError(
                f"visible_devices {self.visible_devices} must name tensor_parallel_size "
                f"({self.tensor_parallel_size}) devices"
            )


@dataclass(frozen=True)
class Progress:
    """What an engine tells about itself a few times a second while it has work."""

    time: float
    """time.time() of the observation."""
    unfinished: tuple[tuple[int, int], ...]
    """(sample_id, response tokens so far) of every sample this engine has not finished."""
    running: int
    """Sequences in the decode batch."""
    waiting: int
    """Sequences not admitted yet."""
    kv_usage: float
    """Part of the KV cache in use, 0 to 1."""
    steps: int
    """Engine steps since the process started."""
    output_tokens: int
    """Response tokens of finished and unfinished samples since the process started."""
    step_seconds: float
    """Mean duration of the steps since the last observation."""
    step_sequences: float
    """Mean decode batch of those steps."""
    prefill_tokens: int
    prefill_seconds: float
    """Of the steps that admitted sequences since the process started, and their tokens."""


# To the engine process.


@dataclass(frozen=True)
class Configure:
    """First message: what to build."""

    instance: int
    options: EngineOptions
    sampling: SamplingOptions


Request = GenerationRequest | PartialSample
"""A response to begin, or to go on with."""


@dataclass(frozen=True)
class Submit:
    requests: tuple[tuple[int, Request], ...]
    """(ticket, request)"""


@dataclass(frozen=True)
class Abort:
    tickets: tuple[int, ...]


@dataclass(frozen=True)
class Extract:
    """Give up samples in the state they are in; answered by Extracted, even if none is left."""

    tickets: tuple[int, ...]
    with_kv: tuple[int, ...]
    """Those of the tickets whose keys and values are wanted too; they are kept until Forget."""


@dataclass(frozen=True)
class Forget:
    """Free the keys and values of extracted samples."""


@dataclass(frozen=True)
class FreeCache:
    """Give the memory of the KV cache back to the system, where the engine cannot sleep."""


@dataclass(frozen=True)
class UpdateWeights:
    """Load a whole version; answered by WeightsLoaded. Refused while samples are unfinished."""

    paths: tuple[str, ...]
    version: int


@dataclass(frozen=True)
class Sleep:
    """Discard weights and KV cache; answered by Asleep. The next UpdateWeights wakes the engine."""


@dataclass(frozen=True)
class Stop:
    """End at once, whatever is unfinished."""


# From the engine process.


@dataclass(frozen=True)
class Ready:
    weight_names: tuple[str, ...]
    """Hugging Face names of the tensors that an update must bring."""
    kv_tokens: int
    """What the KV cache holds."""
    kv_bytes_per_token: float
    """Of all layers and workers."""


@dataclass(frozen=True)
class Finished:
    samples: tuple[tuple[int, Sample], ...]
    """(ticket, sample)"""


@dataclass(frozen=True)
class Resumed:
    """Samples of another engine run here now."""

    samples: int
    recomputed_tokens: int
    """What was computed again for them, at least one token each."""


@dataclass(frozen=True)
class Extracted:
    samples: tuple[tuple[int, PartialSample], ...]
    """(ticket, sample); a ticket that finished in the meantime is missing."""
    seconds: float
    """What the engine could not generate in."""
    kv_bytes: int


@dataclass(frozen=True)
class BucketLoaded:
    """Sign of life during a weight update."""


@dataclass(frozen=True)
class WeightsLoaded:
    version: int


@dataclass(frozen=True)
class Asleep:
    """The GPU memory is free."""


@dataclass(frozen=True)
class Failed:
    """An exception in the engine process, which ends after it."""

    text: str
