"""An instance's part in migrations: gives its samples away, takes others over, leaves when done.

Invariants
- a sample that leaves the engine is sent on before anything else happens, so it is always either
  in one engine or in the mailbox of one instance;
- for every sample that is to come exactly one message comes: the sample, or word that its source
  has finished it after all;
- it leaves when its engine is empty and nothing is to come, and then for good.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from megatron_rlhfuse.migration.state import Move
from megatron_rlhfuse.observe.trace import Tracer
from megatron_rlhfuse.rollout.board import MigrationBoard, Report
from megatron_rlhfuse.rollout.engine import GenerationEngine
from megatron_rlhfuse.rollout.samples import PartialSample

REPORT_S = 0.1
"""Between two reports, unless samples came, left or finished."""


class Relay(Protocol):
    """Brings files of keys and values to another node."""

    def send(self, sample: PartialSample, destination: int) -> None:
        """Begins to send the files of a sample."""

    def receive(self, sample: PartialSample, source: int) -> PartialSample:
        """The sample with files of this node."""


@dataclass
class MemberCounts:
    """What an instance did in an iteration."""

    given: int = 0
    taken: int = 0
    kv_bytes: int = 0
    extract_s: float = 0.0
    generation_end: float = 0.0
    """time.time() at which the engine was empty for good."""
    batches: list[tuple[float, int]] = field(default_factory=list)
    """(time.time(), decode batch)"""


class Member:
    """One instance, in one iteration."""

    def __init__(
        self,
        engine: GenerationEngine,
        board: MigrationBoard,
        nodes: Sequence[str],
        relay: Relay | None,
        tracer: Tracer,
    ) -> None:
        """nodes: of all instances; relay: for files that go to another node."""
        self._engine, self._board, self._relay, self._tracer = engine, board, relay, tracer
        self._instance, self._nodes = engine.instance, nodes
        self._migrations = 0  # known
        self._expected: dict[int, int] = {}  # by sample that is to come: its source
        self._leaving: list[Move] = []  # to be given away
        self._reported: tuple[float, frozenset[int]] = (0.0, frozenset())
        self._prefill = self._prefilled()
        self.counts = MemberCounts()

    @property
    def expects(self) -> bool:
        """Whether samples are on their way here."""
        return bool(self._expected)

    def step(self) -> None:
        """Does what the board asks for, and reports."""
        self._learn()
        if self._leaving:
            leaving, self._leaving = self._leaving, []
            self._give(leaving)
        if self._expected:
            self._take()
        self._report()

    def leave(self) -> bool:
        """Leaves, if its engine is empty and stays so."""
        if self._engine.unfinished or self._expected or self._leaving:
            return False
        if not self._board.leave(self._instance, self._migrations):
            return False
        self.counts.generation_end = time.time()
        return True

    def _learn(self) -> None:
        board = self._board.read()
        moves = board.moves(self._migrations)
        self._migrations = len(board.migrations)
        self._expected |= {m.sample_id: m.source for m in moves if m.destination == self._instance}
        self._leaving += [move for move in moves if move.source == self._instance]

    def _give(self, moves: Sequence[Move]) -> None:
        began = time.time()
        with_kv = [move.sample_id for move in moves if move.transfer == "kv"]
        left = self._engine.extract([move.sample_id for move in moves], with_kv)
        samples = {sample.sample_id: sample for sample in left.samples}
        for move in moves:
            sample = samples.get(move.sample_id)
            self._board.send(move.destination, move.sample_id, sample)
            if sample is not None and self._goes_far(sample, move.source, move.destination):
                assert self._relay is not None
                self._relay.send(sample, move.destination)
        self.counts.given += len(samples)
        self.counts.kv_bytes += left.kv_bytes
        self.counts.extract_s += left.seconds
        self._trace("migrate out", began, samples=len(samples), kv_bytes=left.kv_bytes)

    def _take(self) -> None:
        began = time.time()
        samples: list[PartialSample] = []
        while self._expected:
            message = self._board.receive(self._instance)
            if message is None:
                break
            sample_id = message if isinstance(message, int) else message.sample_id
            if sample_id not in self._expected:
                self._learn()  # of a migration that its source has seen earlier
            source = self._expected.pop(sample_id, None)
            if source is None:
                self._board.refuse(self._instance, f"sample {sample_id} is not to come here")
                continue
            if isinstance(message, int):
                continue
            if self._goes_far(message, source, self._instance):
                assert self._relay is not None
                message = self._relay.receive(message, source)
            samples.append(message)
        if samples:
            self._engine.submit(samples)
            self.counts.taken += len(samples)
            self._trace("migrate in", began, samples=len(samples))

    def _goes_far(self, sample: PartialSample, source: int, destination: int) -> bool:
        return bool(sample.kv_files) and self._nodes[source] != self._nodes[destination]

    def _report(self) -> None:
        lengths = self._engine.lengths()
        ids = frozenset(sample_id for sample_id, _, _ in lengths)
        when, reported = self._reported
        now = time.monotonic()
        if ids == reported and now - when < REPORT_S:
            return
        self._reported = now, ids
        seen = self._engine.observations
        tokens, seconds = self._prefilled()
        self.counts.batches.append((time.time(), seen.running if seen is not None else len(ids)))
        self._board.report(
            Report(
                instance=self._instance,
                node=self._nodes[self._instance],
                unfinished=tuple(lengths),
                kv_capacity=self._engine.built.kv_tokens,
                running=seen.running if seen is not None else 0,
                step_seconds=seen.step_seconds if seen is not None else 0.0,
                step_sequences=seen.step_sequences if seen is not None else 0.0,
                prefill_tokens=max(0, tokens - self._prefill[0]),
                prefill_seconds=max(0.0, seconds - self._prefill[1]),
            )
        )

    def _prefilled(self) -> tuple[int, float]:
        seen = self._engine.observations
        return (seen.prefill_tokens, seen.prefill_seconds) if seen is not None else (0, 0.0)

    def _trace(self, name: str, began: float, **fields: float) -> None:
        track = f"engine {self._instance}"
        self._tracer.add(name, began, time.time(), track=track, category="migration", **fields)
