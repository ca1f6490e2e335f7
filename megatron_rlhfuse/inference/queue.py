"""Samples on their way from generation to inference to training, through one TCPStore.

Invariants
- A sample is handed to exactly one inference instance: the store pops atomically.
- Generation instances close the queue, each once; when all have, no sample comes any more.
- Nothing is unpickled; a message is `Sample.to_bytes()` or `ScoredSample.to_bytes()`.
- Keys carry the iteration. They are deleted when the next one is collected, not before: a rank that
  has scored the last sample asks for another, perhaps after this one was collected, and would wait
  for ever if it did not find the queue closed.

The store is one of its own, apart from torch.distributed's: payloads are large, and a client that
waits holds its connection.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from megatron_rlhfuse import platform
from megatron_rlhfuse.inference.scored import ScoredSample
from megatron_rlhfuse.rollout.board import MigrationBoard
from megatron_rlhfuse.rollout.samples import Sample

# Polling keeps the interpreter responsive to signals, which a blocking pop does not; a sample
# takes longer than this to score. One that waits long asks less often: hundreds of ranks may.
_POLL_S = 0.005
_SLOWEST_POLL_S = 0.02

_QUEUES = ("finished", "scored")
_KEYS = ("finished_count", "ends", "closed", "scored_count", "lengths", "lengths_count")
"""Of an iteration."""


class StageTimeoutError(RuntimeError):
    """A stage did not finish in time; the message says what was waited for."""


class SampleQueue:
    """The queues of a job: finished samples, and scored ones. One object per rank."""

    def __init__(self, store: dist.TCPStore, timeout_s: float, instances: int) -> None:
        """instances: those that generate."""
        self._store = store
        self._timeout_s = timeout_s
        self._instances = instances

    @classmethod
    def connect(cls, timeout_s: float, instances: int) -> SampleQueue:
        """COLLECTIVE over all ranks: rank 0 hosts the store, the others connect to it."""
        wait = timedelta(seconds=timeout_s)
        host = os.environ["MASTER_ADDR"]  # torchrun's name for the machine of rank 0
        port = torch.zeros(1, dtype=torch.int64, device=platform.device())
        if dist.get_rank() == 0:
            store = dist.TCPStore(host, 0, None, True, wait, wait_for_workers=False)
            port.fill_(store.port)
        dist.broadcast(port, src=0)
        if dist.get_rank() != 0:
            store = dist.TCPStore(host, int(port), None, False, wait)
        return cls(store, timeout_s, instances)

    def push_finished(self, iteration: int, sample: Sample) -> None:
        """Offers a finished sample to the inference instances."""
        self._store.queue_push(f"{iteration}/finished", sample.to_bytes())
        self._store.add(f"{iteration}/finished_count", 1)

    def close(self, iteration: int) -> None:
        """A generation instance says that it has offered all its samples."""
        self._append(f"{iteration}/ends", f"{time.time()},")
        self._store.add(f"{iteration}/closed", 1)

    def generation_end(self, iteration: int) -> float:
        """time.time() at which the last instance closed; for after it has."""
        return max(map(float, self._store.get(f"{iteration}/ends").decode().split(",")[:-1]))

    def wait_finished(self, iteration: int) -> None:
        """Returns once all samples of the iteration are finished."""
        self._wait(
            lambda: self._is_closed(iteration),
            lambda: f"generation: {self._open(iteration)} still generate",
        )

    def take(self, iteration: int, count: int) -> list[Sample]:
        """Up to `count` finished samples, waiting for one; none once all are handed out."""
        samples: list[Sample] = []

        def ready() -> bool:
            closed = self._is_closed(iteration)  # before the look: what comes after it is seen
            while len(samples) < count:
                message = self._pop(f"{iteration}/finished")
                if message is None:
                    return closed or bool(samples)
                samples.append(Sample.from_bytes(message))
            return True

        self._wait(
            ready, lambda: f"inference: no sample arrived ({self._open(iteration)} generate)"
        )
        return samples

    def counts(self, iteration: int) -> tuple[int, int]:
        """Samples of the iteration that are finished, and those that are scored."""
        finished = self._store.add(f"{iteration}/finished_count", 0)
        return finished, self._store.add(f"{iteration}/scored_count", 0)

    def board(self, iteration: int) -> MigrationBoard:
        """Where the generation instances of the iteration meet."""
        return MigrationBoard(self._store, iteration)

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
        """Hands scored samples on to training."""
        for sample in scored:
            self._store.queue_push(f"{iteration}/scored", sample.to_bytes())
        self._store.add(f"{iteration}/scored_count", len(scored))

    def collect(self, iteration: int) -> list[bytes]:
        """All scored samples as bytes, in the order of arrival; one rank calls this.

        Generation has ended; samples that are still being scored are waited for.
        """
        total, _ = self.counts(iteration)
        messages: list[bytes] = []

        def ready() -> bool:
            while (message := self._pop(f"{iteration}/scored")) is not None:
                messages.append(message)
            return len(messages) >= total

        self._wait(ready, lambda: f"inference: {len(messages)} of {total} samples scored")
        self.delete(iteration - 1)
        return messages

    def note_length(self, iteration: int, tokens: int, prompt: int) -> None:
        """Tells all generation instances how long a prompt's longest response is."""
        self._append(f"{iteration}/lengths", f"{tokens} {prompt},")
        self._store.add(f"{iteration}/lengths_count", 1)

    def answered(self, iteration: int) -> int:
        """How many lengths were noted; cheap."""
        return self._store.add(f"{iteration}/lengths_count", 0)

    def lengths(self, iteration: int) -> list[tuple[int, int]]:
        """What was noted so far: (tokens, prompt)."""
        key = f"{iteration}/lengths"
        if not self._store.check([key]):
            return []
        notes = self._store.get(key).decode().split(",")[:-1]
        return [(int(tokens), int(prompt)) for tokens, prompt in map(str.split, notes)]

    def delete(self, iteration: int) -> None:
        """Removes everything about an iteration; one rank calls this, and nobody asks any more."""
        for name in _QUEUES:  # the store does not delete queues, but an empty one takes no room
            while self._pop(f"{iteration}/{name}") is not None:
                pass
        for name in _KEYS:
            self._store.delete_key(f"{iteration}/{name}")

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
                    f"{describe()} within {self._timeout_s:.0f} s; a slow stage needs a larger "
                    "--rlhfuse-stage-timeout"
                )
            time.sleep(pause)
            pause = min(1.05 * pause, _SLOWEST_POLL_S)
