"""A generation instance as the trainer uses it: weights and prompts in, samples out.

The vLLM engine lives in a child process. If the child dies it is started again, gets the kept
weights and the unfinished requests again, and makes the same tokens: they depend on weights,
prompt and seed alone.

Invariants:
- every submitted request gives exactly one sample, whatever happens to the child in between:
  out of `poll` here or, once `extract` has returned it, wherever it was taken;
- an update that is refused has not touched the engine;
- after close(), EngineError or EngineHang no process of the instance is left.

Not thread-safe: one thread uses an instance.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from megatron_rlhfuse.rollout.messages import (
    Abort,
    Asleep,
    BucketLoaded,
    Configure,
    EngineOptions,
    Extract,
    Extracted,
    Finished,
    Forget,
    FreeCache,
    Progress,
    Ready,
    Request,
    Resumed,
    Sleep,
    Submit,
    UpdateWeights,
    WeightsLoaded,
)
from megatron_rlhfuse.rollout.samples import (
    GenerationRequest,
    PartialSample,
    Sample,
    SamplingOptions,
)
from megatron_rlhfuse.rollout.supervisor import EngineError, EngineHang, Supervisor
from megatron_rlhfuse.rollout.weight_buckets import WeightBuckets

__all__ = ["EngineError", "EngineHang", "EngineOptions", "GenerationEngine", "WeightUpdate"]

_WAIT_S = 0.5  # longest wait at a time in a loop that has no time limit of its own


@dataclass(frozen=True)
class WeightUpdate:
    """What an update cost."""

    seconds: float
    """From the start of the stream until the engine can generate."""
    bytes: int
    """Size of the weights, in the stream's dtype."""


@dataclass(frozen=True)
class Extraction:
    """Samples that left an engine, and what that cost."""

    samples: list[PartialSample]
    seconds: float
    """In which the engine did not generate."""
    kv_bytes: int


class GenerationEngine:
    """One generation instance. Its child is started by `start`, ended by `close`."""

    def __init__(self, instance: int, options: EngineOptions, sampling: SamplingOptions) -> None:
        self.instance = instance
        self.options = options
        self.sampling = sampling
        self.observations: Progress | None = None
        """The running child's latest, a few times a second while it generates."""
        self.resumed = self.recomputed_tokens = 0
        """Samples taken over that were gone on with, and the tokens computed again for it."""
        self._supervisor = Supervisor(Configure(instance, options, sampling), self._supply)
        self._built: Ready | None = None
        self._weights: WeightBuckets | None = None
        self._loaded: WeightBuckets | None = None  # what the running child has
        self._loading: WeightBuckets | None = None  # what it is about to have
        self._asleep = self._falling_asleep = False
        self._tickets = count()
        self._pending: dict[int, Request] = {}  # by ticket
        self._extracting: set[int] = set()  # tickets that the child was asked for
        self._extracted: Extracted | None = None
        self._finished: list[Sample] = []

    def start(self) -> None:
        """Starts the child process without waiting for it."""
        self._supervisor.start()

    def wait_until_ready(self) -> None:
        """Waits until the engine is built.

        Raises:
            EngineError: it cannot be built; shows the child's exception and the end of its log.
            EngineHang: it took longer than start_timeout_s.
        """
        self._wait(lambda: self._supervisor.ready is not None)
        self._built = self._supervisor.ready

    def close(self) -> None:
        """Ends the child and frees the kept weights; idempotent. Nothing may be called after it."""
        self._supervisor.close()
        if self._weights is not None:
            self._weights.close()
            self._weights = None

    @property
    def pid(self) -> int:
        """Process id of the running child."""
        return self._supervisor.pid

    @property
    def restarts(self) -> int:
        """How often the child was started again after it had died."""
        return self._supervisor.restarts

    @property
    def built(self) -> Ready:
        """What the child said of itself that was waited for last; one after it is built alike."""
        assert self._built is not None
        return self._built

    def lengths(self) -> list[tuple[int, int, int]]:
        """(sample, prompt tokens, response tokens) of unfinished samples, as last observed."""
        known = dict(self.observations.unfinished) if self.observations is not None else {}
        found = []
        for request in self._pending.values():
            origin = _origin(request)
            begun = len(request.response) if isinstance(request, PartialSample) else 0
            length = max(begun, known.get(origin.sample_id, 0))
            found.append((origin.sample_id, len(origin.prompt), length))
        return found

    @property
    def unfinished(self) -> int:
        """Samples submitted that `poll` has not returned yet."""
        return len(self._pending) + len(self._finished)

    def update_weights(
        self, tensors: Iterable[tuple[str, torch.Tensor]], version: int
    ) -> WeightUpdate:
        """Gives the engine a whole new version of its weights.

        The stream is consumed to its end before the engine is touched. A copy of it stays in host
        memory until the next update, for an engine that has to be started again (see
        weight_buckets).

        Args:
            tensors: (Hugging Face name, full tensor on any device) pairs, every tensor of the
                model once; a tied lm_head.weight left out.
            version: the number that samples made with these weights will carry.

        Raises:
            ValueError: tensors are missing, unexpected or doubled; names them. The engine keeps
                the weights it has.
            RuntimeError: samples are unfinished, or the engine is asleep.
            EngineError, EngineHang
        """
        started = time.monotonic()
        self._require_idle("update_weights")
        buckets = WeightBuckets(tensors, version)
        try:
            self.wait_until_ready()
            assert self._supervisor.ready is not None
            buckets.require_names(self._supervisor.ready.weight_names)
        except BaseException:
            buckets.close()
            raise
        outdated, self._weights = self._weights, buckets
        if outdated is not None:
            outdated.close()
        self._load_weights()
        self._wait(lambda: self._loaded is buckets)
        return WeightUpdate(time.monotonic() - started, buckets.bytes)

    def submit(self, requests: Sequence[Request]) -> None:
        """Hands requests to the engine; their samples come out of `poll`.

        What another engine has begun is gone on with, from its files of keys and values where they
        can be read, else from its tokens.

        Raises:
            ValueError: a prompt leaves no room for max_new_tokens; names the sample.
            RuntimeError: the engine has no weights yet, or is asleep.
            EngineError, EngineHang
        """
        self._require_awake("submit")
        if self._weights is None:
            raise RuntimeError(
                f"generation instance {self.instance} has no weights: call update_weights first"
            )
        for request in map(_origin, requests):
            needed = len(request.prompt) + self.sampling.max_new_tokens
            if needed > self.options.max_model_len:
                raise ValueError(
                    f"sample {request.sample_id}: a prompt of {len(request.prompt)} tokens and "
                    f"max_new_tokens {self.sampling.max_new_tokens} need max_model_len {needed}; "
                    f"it is {self.options.max_model_len}"
                )
        if self._loaded is None and self._loading is None:
            self._load_weights()  # discarded by sleep
        if not self._pending:
            self.observations = None  # they are of other samples, perhaps under the same numbers
        tickets = {next(self._tickets): request for request in requests}
        self._pending |= tickets
        self._supervisor.send(Submit(tuple(tickets.items())))

    def poll(self, timeout_s: float) -> list[Sample]:
        """Returns the samples that finished since the last call, in that order.

        Waits at most `timeout_s` for the first one, and not at all when none is unfinished. A
        child that has died is started again here, without waiting for it.

        Raises:
            EngineError: the engine raised, or died too often.
            EngineHang: samples are unfinished and the engine was silent for step_timeout_s.
        """
        deadline = time.monotonic() + timeout_s
        self._listen(0.0)
        while self._pending and not self._finished and time.monotonic() < deadline:
            self._listen(deadline - time.monotonic())
        samples, self._finished = self._finished, []
        return samples

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Sample]:
        """Makes the samples of all requests and returns them ordered by sample_id.

        Raises:
            RuntimeError: samples of an earlier submit are unfinished.
            What submit and poll raise.
        """
        self._require_idle("generate")
        self.submit(requests)
        samples: list[Sample] = []
        while self.unfinished:
            samples += self.poll(_WAIT_S)
        return sorted(samples, key=lambda sample: sample.sample_id)

    def extract(self, sample_ids: Iterable[int], with_kv: Iterable[int] = ()) -> Extraction:
        """Takes unfinished samples out of the engine, for another one to go on with.

        Those that have finished in the meantime stay, and come out of `poll`. If the child dies
        before it has answered, what it had made of them is lost: they leave as if just begun, and
        become the same samples.

        Args:
            with_kv: those of `sample_ids` that leave with their keys and values, which the child
                holds until `forget_exports`

        Raises:
            EngineError, EngineHang
        """
        leaving, exported = set(sample_ids), set(with_kv)
        tickets = {
            t: request
            for t, request in self._pending.items()
            if _origin(request).sample_id in leaving
        }
        if not tickets:
            return Extraction([], 0.0, 0)
        self._extracting, self._extracted = set(tickets), None
        wanted = tuple(t for t, r in tickets.items() if _origin(r).sample_id in exported)
        self._supervisor.send(Extract(tuple(tickets), wanted))
        self._wait(lambda: self._extracted is not None)
        assert self._extracted is not None
        for ticket, _ in self._extracted.samples:
            self._pending.pop(ticket, None)
        return Extraction(
            [sample for _, sample in self._extracted.samples],
            self._extracted.seconds,
            self._extracted.kv_bytes,
        )

    def forget_exports(self) -> None:
        """Frees the keys and values of extracted samples."""
        self._supervisor.send(Forget())

    def free_cache(self) -> None:
        """Gives the memory of an idle engine's KV cache back, where it cannot sleep."""
        self._require_idle("free_cache")
        self._supervisor.send(FreeCache())

    def abort(self, sample_ids: Iterable[int]) -> None:
        """Gives up unfinished samples: `poll` will not return them."""
        unwanted = set(sample_ids)
        tickets = [t for t, r in self._pending.items() if _origin(r).sample_id in unwanted]
        for ticket in tickets:
            del self._pending[ticket]
        self._supervisor.send(Abort(tuple(tickets)))

    def sleep(self) -> None:
        """Frees the engine's GPU memory, weights included. Does nothing without enable_sleep.

        Raises:
            RuntimeError: samples are unfinished.
            EngineError, EngineHang
        """
        if not self.options.enable_sleep or self._asleep:
            return
        self._require_idle("sleep")
        # A child that replaces one that died in between has to be told again.
        while not self._asleep:
            self._loaded = None
            self._falling_asleep = True
            self._supervisor.send(Sleep())
            self._wait(lambda: not self._falling_asleep)

    def wake(self) -> None:
        """Lets the engine take GPU memory again. Does nothing without enable_sleep.

        It takes the memory when weights are loaded next: by update_weights or, where requests come
        first, the kept ones.
        """
        self._asleep = False

    def _supply(self) -> None:
        """Gives a new child everything that the last one had."""
        self.observations = None
        self._loaded = self._loading = None
        self._asleep = self._falling_asleep = False
        if self._weights is not None:
            self._load_weights()
        if self._extracting:
            assert self._weights is not None
            lost = {t: self._pending.pop(t) for t in self._extracting if t in self._pending}
            version = self._weights.version
            self._extracting = set()
            self._extracted = Extracted(
                tuple((t, _begun(request, version)) for t, request in lost.items()), 0.0, 0
            )
        if self._pending:
            self._supervisor.send(Submit(tuple(self._pending.items())))

    def _load_weights(self) -> None:
        assert self._weights is not None
        self._loaded, self._loading = None, self._weights
        self._supervisor.send(UpdateWeights(self._weights.paths, self._weights.version))

    def _listen(self, timeout_s: float) -> None:
        """Takes in what the child says, waiting at most `timeout_s` for it to begin."""
        for message in self._supervisor.receive(timeout_s, self._due()):
            match message:
                case Finished():
                    for ticket, sample in message.samples:
                        # An aborted one may have been on its way.
                        if self._pending.pop(ticket, None) is not None:
                            self._finished.append(sample)
                case Progress():
                    self.observations = message
                case Resumed():
                    self.resumed += message.samples
                    self.recomputed_tokens += message.recomputed_tokens
                case Extracted():
                    self._extracting, self._extracted = set(), message
                case WeightsLoaded():
                    self._loaded, self._loading = self._loading, None
                case Asleep():
                    self._asleep, self._falling_asleep = True, False
                case BucketLoaded():
                    pass  # a sign of life, which the supervisor has noted
                case _:
                    raise TypeError(f"unknown message {message!r}")

    def _due(self) -> str | None:
        """Why the child must not be silent, if it must not."""
        if self._extracting:
            return f"{len(self._extracting)} samples are to be taken out of it"
        if self._loading is not None:
            return f"it is loading weight version {self._loading.version}"
        if self._falling_asleep:
            return "it is falling asleep"
        if self._pending:
            return f"{len(self._pending)} samples are unfinished"
        return None

    def _wait(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self._listen(_WAIT_S)

    def _require_idle(self, call: str) -> None:
        self._require_awake(call)
        if self.unfinished:
            raise RuntimeError(
                f"{call}: {self.unfinished} samples of generation instance {self.instance} are "
                "unfinished; poll them first"
            )

    def _require_awake(self, call: str) -> None:
        if self._asleep:
            raise RuntimeError(
                f"{call}: generation instance {self.instance} is asleep; call wake first"
            )


def _origin(request: Request) -> GenerationRequest:
    return request.request if isinstance(request, PartialSample) else request


def _begun(request: Request, weight_version: int) -> PartialSample:
    """A request as an engine gives it up that has not made anything of it."""
    if isinstance(request, PartialSample):
        return request
    return PartialSample(request, (), (), None, 0, (), weight_version, time.time())
