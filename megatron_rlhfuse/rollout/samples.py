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
from dataclasses import asdict, dataclass, fields
from typing import Any

_MEMORY_FILE = re.compile(r"/proc/[0-9]+/fd/[0-9]+")

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
        return json.dumps(asdict(self), allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Sample:
        """Decode what `to_bytes` made.

        Raises:
            ValueError: the bytes are no JSON object with exactly the fields of a sample.
        """
        values = _fields(cls, data)
        for name in ("prompt", "response", "log_probs"):
            values[name] = tuple(values[name])
        return cls(**values)


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
        values = asdict(self)
        if self.generator is not None:
            values["generator"] = base64.b64encode(self.generator).decode()
        return json.dumps(values, allow_nan=False, separators=(",", ":")).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> PartialSample:
        """Decode what `to_bytes` made.

        Raises:
            ValueError: the bytes are no JSON object with exactly the fields of a partial sample.
        """
        values = _fields(cls, data)
        request = values["request"]
        if not isinstance(request, dict) or request.keys() != {"sample_id", "prompt", "seed"}:
            raise ValueError(f"a request needs sample_id, prompt and seed, got {request!r:.200}")
        request["prompt"] = tuple(request["prompt"])
        values["request"] = GenerationRequest(**request)
        if values["generator"] is not None:
            values["generator"] = base64.b64decode(values["generator"], validate=True)
        for name in ("response", "log_probs", "kv_files"):
            values[name] = tuple(values[name])
        for path in values["kv_files"]:
            # A message must not make an engine open any other file.
            if not isinstance(path, str) or not _MEMORY_FILE.fullmatch(path):
                raise ValueError(f"kv_files: want paths of memory files, got {path!r:.200}")
        return cls(**values)


def sample_seed(run_seed: int, iteration: int, sample_id: int) -> int:
    """Seed of one sample, the same in every process and on every machine.

    A hash rather than a sum, so that neighbouring samples and iterations share no seeds.

    Returns:
        An integer in [0, 2**63).
    """
    packed = struct.pack("<qqq", run_seed, iteration, sample_id)
    return int.from_bytes(hashlib.blake2b(packed, digest_size=8).digest(), "little") >> 1


def _fields(cls: type[Sample] | type[PartialSample], data: bytes) -> dict[str, Any]:
    values = json.loads(data)
    names = {field.name for field in fields(cls)}
    if not isinstance(values, dict) or values.keys() != names:
        raise ValueError(f"a sample needs the fields {sorted(names)}, got {data[:200]!r}")
    return values


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value!r}; it must be {wanted}")
