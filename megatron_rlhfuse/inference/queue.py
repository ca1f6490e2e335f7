"""Samples on their way from generation to inference to training, through one TCPStore.

Invariants
- A sample is handed to exactly one inference instance: the store pops atomically.
- Generation instances close the queue, each once; when all have, no sample comes any more.
- Nothing is unpickled; a message is `Sample.to_bytes()` or `ScoredSample.to_bytes()`.
- What no rank of the job can have sent is dropped with a line in the log, and so is a sample that
  has been there already; neither ends a wait, and neither ends a rank.
- Keys carry the iteration. They are deleted when the next one is collected, not before: a rank that
  has scored the last sample asks for another, perhaps after this one was collected, and would wait
  for ever if it did not find the queue closed.

The store is one of its own, apart from torch.distributed's: payloads are large, and a client that
waits holds its connection. Counters and queues are the store's own types: who changes a counter can
stall a stage until its time is over (docs/security.md).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from datetime import timedelta

import torch.distributed as dist

from megatron_rlhfuse import network
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.board import MigrationBoard
from megatron_rlhfuse.rollout.samples import Sample
from megatron_rlhfuse.rollout.wire import (
    ANYTHING,
    MESSAGE_BYTES,
    DropLog,
    Limits,
    MalformedMessageError,
    one_error,
    real,
    whole,
)

# Polling keeps the interpreter responsive to signals, which a blocking pop does not; a sample
# takes longer than this to score. One that waits long asks less often: hundreds of ranks may.
_POLL_S = 0.005
_SLOWEST_POLL_S = 0.02

# Messages looked at between two looks at the clock: a flood of them must not hold a time-out up.
_LOOK = 1000

_NOTE_BYTES = 48
"""Of a note of a length or of an end; what is beyond what notes can take is not read."""

_QUEUES = ("finished", "scored")
_KEYS = ("finished_count", "ends", "closed", "scored_count", "lengths", "lengths_count")
"""Of an iteration."""


class StageTimeoutError(RuntimeError):
    """A stage did not finish in time; the message says what was waited for."""


class SampleQueue:
    """The queues of a job: finished samples, and scored ones. One object per rank."""

    def __init__(
        self,
        store: dist.TCPStore,
        timeout_s: float,
        instances: int,
        limits: Limits = ANYTHING,
    ) -> None:
        """instances: those that generate; limits: what does not keep them is dropped."""
        self._store = store
        self._timeout_s = timeout_s
        self._instances = instances
        self._limits = limits
        self._drops = DropLog()
        self._taken: dict[int, set[int]] = {}
        """By iteration: samples that this rank was handed."""

    @classmethod
    def connect(cls, timeout_s: float, instances: int, limits: Limits = ANYTHING) -> SampleQueue:
        """COLLECTIVE over all ranks: rank 0 hosts the store, the others connect to it."""
        store = network.connect_store(timedelta(seconds=timeout_s))
        return cls(store, timeout_s, instances, limits)

    def push_finished(self, iteration: int, sample: Sample) -> None:
        """Offers a finished sample to the inference instances.

        Raises ValueError for one that the store does not take: its bytes are too many.
        """
        self._push(f"{iteration}/finished", sample.sample_id, sample.to_bytes())
        self._store.add(f"{iteration}/finished_count", 1)

    def close(self, iteration: int) -> None:
        """A generation instance says that it has offered all its samples."""
        self._append(f"{iteration}/ends", f"{time.time()},")
        self._store.add(f"{iteration}/closed", 1)

    def generation_end(self, iteration: int) -> float:
        """time.time() at which the last instance closed; for after it has."""
        ends = self._notes(f"{iteration}/ends", self._instances, _read_end)
        return max(ends, default=time.time())

    def wait_finished(self, iteration: int) -> None:
        """Returns once all samples of the iteration are finished."""
        self._wait(
            lambda: self._is_closed(iteration),
            lambda: f"generation: {self._open(iteration)} still generate",
        )

    def take(self, iteration: int, count: int) -> list[Sample]:
        """Up to `count` finished samples, waiting for one; none once all are handed out."""
        samples: list[Sample] = []
        key = f"{iteration}/finished"
        for old in [each for each in self._taken if each < iteration - 1]:
            del self._taken[old]
        taken = self._taken.setdefault(iteration, set())

        def ready() -> bool:
            closed = self._is_closed(iteration)  # before the look: what comes after it is seen
            for _ in range(_LOOK):
                if len(samples) == count:
                    return True
                message = self._pop(key)
                if message is None:
                    return closed or bool(samples)
                try:
                    sample = Sample.from_bytes(message, self._limits)
                    _require_new(sample, taken)
                except MalformedMessageError as fault:
                    self._drops.add(key, fault)
                    continue
                taken.add(sample.sample_id)
                samples.append(sample)
            return bool(samples)

        self._wait(
            ready, lambda: f"inference: no sample arrived ({self._open(iteration)} generate)"
        )
        return samples

    def counts(self, iteration: int) -> tuple[int, int]:
        """Samples of the iteration that are finished, and those that are scored."""
        finished = self._store.add(f"{iteration}/finished_count", 0)
        finished = min(finished, self._limits.samples)
        return finished, self._store.add(f"{iteration}/scored_count", 0)

    def board(self, iteration: int) -> MigrationBoard:
        """Where the generation instances of the iteration meet."""
        return MigrationBoard(self._store, iteration, self._limits)

    def wait_released(self, iteration: int, instance: int) -> None:
        """Returns once a generation instance has no samples any more, and no memory."""
        board = self.board(iteration)
        self._wait(
            lambda: board.is_released(instance),
            lambda: f"generation instance {instance}: not released",
        )

    def wait_scored(self, iteration: int) -> None:
        """Returns once all samples of the iteration are finished and scored.

        For ranks that have nothing more to score: in a collective they would wait under the time
        limit of its group, which knows nothing of how long a tail may take.
        """

        def ready() -> bool:
            if not self._is_closed(iteration):
                return False
            finished, scored = self.counts(iteration)
            return scored >= finished

        self._wait(
            ready,
            lambda: "inference: {1} of {0} samples scored ({2} generate)".format(
                *self.counts(iteration), self._open(iteration)
            ),
        )

    def push_scored(self, iteration: int, scored: Sequence[ScoredSample]) -> None:
        """Hands scored samples on to training.

        Raises ValueError for one with NaN, or that the store does not take.
        """
        for each in scored:
            self._push(f"{iteration}/scored", each.sample.sample_id, each.to_bytes())
        self._store.add(f"{iteration}/scored_count", len(scored))

    def collect(self, iteration: int) -> list[bytes]:
        """All scored samples as bytes, each once, in the order of arrival; one rank calls this.

        Generation has ended; samples that are still being scored are waited for.
        """
        total, _ = self.counts(iteration)
        key = f"{iteration}/scored"
        messages: dict[int, bytes] = {}

        def ready() -> bool:
            for _ in range(_LOOK):
                message = self._pop(key) if len(messages) < total else None
                if message is None:
                    break
                try:
                    sample = ScoredSample.from_bytes(message, self._limits).sample
                    _require_new(sample, messages)
                except MalformedMessageError as fault:
                    self._drops.add(key, fault)
                    continue
                messages[sample.sample_id] = message
            return len(messages) >= total

        self._wait(ready, lambda: f"inference: {len(messages)} of {total} samples scored")
        self.delete(iteration - 1)
        return list(messages.values())

    def note_length(self, iteration: int, tokens: int, prompt: int) -> None:
        """Tells all generation instances how long a prompt's longest response is."""
        self._append(f"{iteration}/lengths", f"{tokens} {prompt},")
        self._store.add(f"{iteration}/lengths_count", 1)

    def answered(self, iteration: int) -> int:
        """How many lengths were noted; cheap."""
        return self._store.add(f"{iteration}/lengths_count", 0)

    def lengths(self, iteration: int) -> list[tuple[int, int]]:
        """What was noted so far: (tokens, prompt), each prompt once."""
        limits = self._limits

        def read(note: str) -> tuple[int, int]:
            tokens, prompt = map(int, note.split())
            whole(tokens, "tokens", limits.response_tokens + 1)
            return tokens, whole(prompt, "prompt", limits.samples)

        found: dict[int, int] = {}
        for tokens, prompt in self._notes(f"{iteration}/lengths", limits.samples, read):
            found.setdefault(prompt, tokens)
        return [(tokens, prompt) for prompt, tokens in found.items()]

    def delete(self, iteration: int) -> None:
        """Removes everything about an iteration; one rank calls this, and nobody asks any more."""
        for name in _QUEUES:  # the store does not delete queues, but an empty one takes no room
            for _ in range(self._store.queue_len(f"{iteration}/{name}")):
                self._pop(f"{iteration}/{name}")
        for name in _KEYS:
            self._store.delete_key(f"{iteration}/{name}")

    def _push(self, key: str, sample_id: int, message: bytes) -> None:
        if len(message) > MESSAGE_BYTES:
            raise ValueError(
                f"sample {sample_id} takes {len(message)} bytes, more than the {MESSAGE_BYTES} "
                "that a TCPStore takes: lower --rollout-max-new-tokens"
            )
        self._store.queue_push(key, message)

    def _notes[T](self, key: str, most: int, read: Callable[[str], T]) -> list[T]:
        """What was appended to a key, without what no rank can have appended."""
        if not self._store.check([key]):
            return []
        raw: bytes = self._store.get(key)
        size = most * _NOTE_BYTES
        if len(raw) > size:
            self._drops.add(key, f"{len(raw)} bytes of notes; {size} are possible", b"size")
        checked = one_error(read)
        found = []
        for note in raw[:size].split(b",")[:-1]:
            try:
                found.append(checked(note[:_NOTE_BYTES].decode(errors="replace")))
            except MalformedMessageError as fault:
                self._drops.add(key, fault, note)
        return found

    def _append(self, key: str, text: str) -> None:
        self._store.append(key, text)  # type: ignore[attr-defined]  # torch's stubs lack it

    def _is_closed(self, iteration: int) -> bool:
        return self._store.add(f"{iteration}/closed", 0) >= self._instances

    def _open(self, iteration: int) -> str:
        left = self._instances - self._store.add(f"{iteration}/closed", 0)
        return f"{left} of {self._instances} instances"

    def _pop(self, key: str) -> bytes | None:
        try:
            message: bytes = self._store.queue_pop(key, False)
        except dist.QueueEmptyError:
            return None
        return message

    def _wait(self, ready: Callable[[], bool], describe: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._timeout_s
        pause = _POLL_S
        while not ready():
            if time.monotonic() > deadline:
                raise StageTimeoutError(
                    f"{describe()} within {self._timeout_s:.0f} s ({self._drops.total} messages "
                    "dropped, see the log); a slow stage needs a larger --rlhfuse-stage-timeout"
                )
            time.sleep(pause)
            pause = min(1.05 * pause, _SLOWEST_POLL_S)


def _read_end(note: str) -> float:
    return real(float(note), "the end of generation")


def _require_new(sample: Sample, known: Container[int]) -> None:
    if sample.sample_id in known:
        raise MalformedMessageError(f"sample {sample.sample_id} has been there already")
