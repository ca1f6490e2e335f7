"""Samples on their way from generation to inference to training, through one TCPStore.

Invariants
- A sample is handed to exactly one inference instance: tickets are drawn from a shared counter.
- Nothing is unpickled; a message is `Sample.to_bytes()` or `ScoredSample.to_bytes()`.
- Keys carry the iteration. They are deleted when the next one is collected, not before: a rank that
  has scored the last sample asks for another, perhaps after this one was collected, and without
  the counter of tickets it would wait for a sample that never comes.

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
# takes longer than this to score.
_POLL_S = 0.005


class StageTimeoutError(RuntimeError):
    """A stage did not finish in time; the message says what was waited for."""


class SampleQueue:
    """The queues of a job: finished samples, and scored ones. One object per rank."""

    def __init__(self, store: dist.TCPStore, timeout_s: float) -> None:
        self._store = store
        self._timeout_s = timeout_s

    @classmethod
    def connect(cls, timeout_s: float) -> SampleQueue:
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
        return cls(store, timeout_s)

    def push_finished(self, iteration: int, sample: Sample) -> None:
        """Offers a finished sample to the inference instances."""
        self._store.queue_push(f"{iteration}/finished", sample.to_bytes())
        self._store.add(f"{iteration}/finished_count", 1)

    def wait_finished(self, iteration: int, total: int) -> None:
        """Returns once all `total` samples of the iteration are finished."""
        key = f"{iteration}/finished_count"
        self._wait(
            lambda: self._store.add(key, 0) >= total,
            lambda: f"generation: {self._store.add(key, 0)} of {total} samples finished",
        )

    def take(self, iteration: int, total: int, count: int) -> list[Sample]:
        """Up to `count` finished samples, waiting for them; none once all are handed out."""
        last = self._store.add(f"{iteration}/tickets", count)
        tickets = max(0, min(last, total) - (last - count))
        return [Sample.from_bytes(self._pop(f"{iteration}/finished")) for _ in range(tickets)]

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

    def wait_scored(self, iteration: int, total: int) -> None:
        """Returns once all `total` samples of the iteration are scored.

        For ranks that have nothing more to score: in a collective they would wait under the time
        limit of its group, which knows nothing of how long a tail may take.
        """
        key = f"{iteration}/scored_count"
        self._wait(
            lambda: self._store.add(key, 0) >= total,
            lambda: f"inference: {self._store.add(key, 0)} of {total} samples scored",
        )

    def push_scored(self, iteration: int, scored: Sequence[ScoredSample]) -> None:
        """Hands scored samples on to training."""
        for sample in scored:
            self._store.queue_push(f"{iteration}/scored", sample.to_bytes())
        self._store.add(f"{iteration}/scored_count", len(scored))

    def collect(self, iteration: int, total: int) -> list[bytes]:
        """All scored samples as bytes, in the order of arrival; one rank calls this."""
        scored = [self._pop(f"{iteration}/scored") for _ in range(total)]
        self.delete(iteration - 1)
        return scored

    def delete(self, iteration: int) -> None:
        """Removes everything about an iteration; one rank calls this, and nobody asks any more."""
        for name in ("finished", "finished_count", "tickets", "scored", "scored_count"):
            self._store.delete_key(f"{iteration}/{name}")

    def _pop(self, key: str) -> bytes:
        popped: list[bytes] = []

        def ready() -> bool:
            try:
                popped.append(self._store.queue_pop(key, False))
            except dist.QueueEmptyError:
                return False
            return True

        self._wait(ready, lambda: f"queue {key}: nothing arrived")
        return popped[0]

    def _wait(self, ready: Callable[[], bool], describe: Callable[[], str]) -> None:
        deadline = time.monotonic() + self._timeout_s
        while not ready():
            if time.monotonic() > deadline:
                raise StageTimeoutError(
                    f"{describe()} within {self._timeout_s:.0f} s; a slow stage needs a larger "
                    "--rlhfuse-stage-timeout"
                )
            time.sleep(_POLL_S)
