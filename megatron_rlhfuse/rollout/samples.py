"""What goes into a generation instance and what comes out of it.

Pure data, no torch and no vLLM: these types are shared by the trainer, the engine processes and
the queues between ranks.

Invariants:
- a sample's tokens are a function of (weights, prompt, seed), and its seed is a function of
  (run seed, iteration, position in the rollout batch), so a sample can be made again anywhere;
- a sample has one log-probability per response token;
- bytes on the wire are JSON, so that reading a message from another rank never runs code.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
from dataclasses import dataclass, fields

from megatron_rlhfuse.rollout.wire import (
    ANYTHING,
    Limits,
    MalformedMessageError,
    a_list,
    numbers,
    one_error,
    parse_object,
    real,
    tokens,
    whole,
)

_MEMORY_FILE = re.compile(r"/proc/[0-9]{1,10}/fd/[0-9]{1,10}")

_MOST_WORKERS = 1024
"""Of an engine: files of a partial sample."""

_GENERATOR_BYTES = 64 << 10
"""State of a random generator; torch's largest takes 5 KB."""

STOP_REASONS = ("stop", "length")


@dataclass(frozen=True)
class SamplingOptions:
    """How every response of a run is drawn.

    Raises:
        ValueError: an option lies outside its range; the message names it.
    """

    temperature: float = 1.0
    """In [0, 2]; 0 takes the likeliest token, with its log-probability at temperature 1."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with at least this probability; in (0, 1]."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    max_new_tokens: int = 512
    """Longest response; the stop token counts."""
    min_new_tokens: int = 0
    """No stop token is drawn before so many response tokens."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response besides the model's end-of-sequence tokens."""
    ignore_eos: bool = False
    """Do not end a response at an end-of-sequence token."""

    def __post_init__(self) -> None:
        _require(0.0 <= self.temperature <= 2.0, "temperature", self.temperature, "in [0, 2]")
        _require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        _require(self.top_k >= 0, "top_k", self.top_k, "at least 1, or 0 for all tokens")
        _require(
            self.repetition_penalty > 0.0, "repetition_penalty", self.repetition_penalty, "above 0"
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            _require(-2.0 <= value <= 2.0, name, value, "in [-2, 2]")
        _require(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        _require(
            0 <= self.min_new_tokens <= self.max_new_tokens,
            "min_new_tokens",
            self.min_new_tokens,
            f"from 0 to max_new_tokens ({self.max_new_tokens})",
        )


@dataclass(frozen=True)
class GenerationRequest:
    """One response to be made."""

    sample_id: int
    """Position in the rollout batch."""
    prompt: tuple[int, ...]
    """Token ids; at least one."""
    seed: int
    """From `sample_seed`; below 2**63."""

    def __post_init__(self) -> None:
        _require(len(self.prompt) > 0, "prompt", self.prompt, "at least one token")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "in [0, 2**63)")


@dataclass(frozen=True)
class Sample:
    """One prompt with its response."""

    sample_id: int
    """Position in the rollout batch."""
    prompt: tuple[int, ...]
    response: tuple[int, ...]
    """Token ids; a stop token that ended the response is its last one."""
    log_probs: tuple[float, ...]
    """Natural log-probability of each response token under the distribution it was drawn from:
    after temperature, penalties, top-k and top-p."""
    stop_reason: str
    """"stop": the response ended at a stop token; "length": it was cut at max_new_tokens."""
    weight_version: int
    """Version of the actor weights that made it."""
    instance: int
    """Generation instance that finished it."""
    started: float
    """time.time() at which that instance took the request."""
    finished: float
    """time.time() at which its last token was there."""

    def __post_init__(self) -> None:
        if len(self.response) != len(self.log_probs):
            raise ValueError(
                f"sample {self.sample_id}: {len(self.response)} response tokens need as many "
                f"log_probs, got {len(self.log_probs)}"
            )
        _require(self.stop_reason in STOP_REASONS, "stop_reason", self.stop_reason, "stop|length")

    def to_bytes(self) -> bytes:
        """Encode as JSON; floats survive exactly.

        Raises:
            ValueError: a log-probability is infinite or NaN, which JSON does not hold.
        """
        return json.dumps(vars(self), allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    @one_error
    def from_bytes(cls, data: bytes, limits: Limits = ANYTHING) -> Sample:
        """Decode what `to_bytes` made.

        Raises:
            MalformedMessageError: the bytes are nothing that a rank of a job within these limits
                can have made.
        """
        values = parse_object(data, limits.sample_bytes, _SAMPLE_FIELDS, "a sample")
        most = limits.response_tokens
        return cls(
            sample_id=whole(values["sample_id"], "sample_id", limits.samples),
            prompt=tokens(values["prompt"], "prompt", limits.prompt_tokens, limits.vocabulary),
            response=tokens(values["response"], "response", most, limits.vocabulary),
            log_probs=numbers(values["log_probs"], "log_probs", most),
            stop_reason=values["stop_reason"],
            weight_version=whole(values["weight_version"], "weight_version"),
            instance=whole(values["instance"], "instance", limits.instances),
            started=real(values["started"], "started"),
            finished=real(values["finished"], "finished"),
        )


@dataclass(frozen=True)
class PartialSample:
    """A response that one engine has begun and another one goes on with.

    The tokens so far stay response tokens: penalties, min_new_tokens and max_new_tokens count them.
    """

    request: GenerationRequest
    response: tuple[int, ...]
    """Token ids so far, without a stop token; may be empty."""
    log_probs: tuple[float, ...]
    """As in Sample."""
    generator: bytes | None
    """State of the request's random generator after the last token; None where a draw depends on
    (seed, position) alone, or nothing was drawn yet."""
    kv_tokens: int
    """Tokens whose keys and values `kv_files` hold, from the first token of the prompt; the last
    token so far is not among them. 0 without files."""
    kv_files: tuple[str, ...]
    """A file for each tensor-parallel worker, on this machine; see kv_connector."""
    weight_version: int
    started: float
    """time.time() at which the first engine took the request."""

    def __post_init__(self) -> None:
        if len(self.response) != len(self.log_probs):
            raise ValueError(
                f"sample {self.request.sample_id}: {len(self.response)} response tokens need as "
                f"many log_probs, got {len(self.log_probs)}"
            )
        known = len(self.request.prompt) + len(self.response)
        _require(0 <= self.kv_tokens < known, "kv_tokens", self.kv_tokens, f"from 0, below {known}")

    @property
    def sample_id(self) -> int:
        return self.request.sample_id

    def to_bytes(self) -> bytes:
        """Encode as JSON; floats survive exactly."""
        values = vars(self) | {"request": vars(self.request)}
        if self.generator is not None:
            values["generator"] = base64.b64encode(self.generator).decode()
        return json.dumps(values, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    @one_error
    def from_bytes(cls, data: bytes, limits: Limits = ANYTHING) -> PartialSample:
        """Decode what `to_bytes` made.

        Raises:
            MalformedMessageError: as `Sample.from_bytes`.
        """
        values = parse_object(data, limits.sample_bytes, _PARTIAL_FIELDS, "a sample")
        most = limits.response_tokens
        return cls(
            request=_request(values["request"], limits),
            response=tokens(values["response"], "response", most, limits.vocabulary),
            log_probs=numbers(values["log_probs"], "log_probs", most),
            generator=_generator(values["generator"]),
            kv_tokens=whole(values["kv_tokens"], "kv_tokens"),
            kv_files=tuple(
                map(_memory_file, a_list(values["kv_files"], "kv_files", _MOST_WORKERS))
            ),
            weight_version=whole(values["weight_version"], "weight_version"),
            started=real(values["started"], "started"),
        )


_SAMPLE_FIELDS = frozenset(field.name for field in fields(Sample))
_PARTIAL_FIELDS = frozenset(field.name for field in fields(PartialSample))
_REQUEST_FIELDS = frozenset(field.name for field in fields(GenerationRequest))


def _request(values: object, limits: Limits) -> GenerationRequest:
    if not isinstance(values, dict) or values.keys() != _REQUEST_FIELDS:
        raise MalformedMessageError(
            f"a request needs sample_id, prompt and seed, got {values!r:.200}"
        )
    return GenerationRequest(
        sample_id=whole(values["sample_id"], "sample_id", limits.samples),
        prompt=tokens(values["prompt"], "prompt", limits.prompt_tokens, limits.vocabulary),
        seed=whole(values["seed"], "seed"),
    )


def _generator(value: object) -> bytes | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise MalformedMessageError(f"generator must be base64, got {value!r:.80}")
    state = base64.b64decode(value, validate=True)
    if len(state) > _GENERATOR_BYTES:
        raise MalformedMessageError(f"generator has {len(state)} bytes; {_GENERATOR_BYTES} at most")
    return state


def _memory_file(path: object) -> str:
    # A message must not make an engine open any other file (memory_file.open_memory_file looks
    # at what stands there).
    if not isinstance(path, str) or not _MEMORY_FILE.fullmatch(path):
        raise MalformedMessageError(f"kv_files: want paths of memory files, got {path!r:.200}")
    return path


def sample_seed(run_seed: int, iteration: int, sample_id: int) -> int:
    """Seed of one sample, the same in every process and on every machine.

    A hash rather than a sum, so that neighbouring samples and iterations share no seeds.

    Returns:
        An integer in [0, 2**63).
    """
    packed = struct.pack("<qqq", run_seed, iteration, sample_id)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r:.80}; it must be {wanted}")
