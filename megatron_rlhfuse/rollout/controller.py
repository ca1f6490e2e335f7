"""Decides, on rank 0 and for all instances, when the tail of an iteration migrates.

A thread of its own: rank 0's instance may have left generation long before the last sample is
there. A slow controller delays a migration, or misses it; nothing waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from megatron_rlhfuse.migration.case import RolloutCase
from megatron_rlhfuse.migration.lengths import LengthDistribution, LengthHistory
from megatron_rlhfuse.migration.meter import RateMeter
from megatron_rlhfuse.migration.planner import MigrationOptions, MigrationPlanner
from megatron_rlhfuse.migration.rates import Rates
from megatron_rlhfuse.migration.simulate import THRESHOLDS, choose_threshold
from megatron_rlhfuse.migration.state import (
    InstanceState,
    Migration,
    RolloutState,
    Unfinished,
)
from megatron_rlhfuse.rollout.board import MigrationBoard, Report

logger = logging.getLogger(__name__)

POLL_S = 0.01
"""A look at the number of finished samples; a decode step of a large model takes longer."""

LOOK_S = 0.25
"""Between two looks at the reports, until the threshold is near."""

SEED = 0
"""Of the lengths that a threshold is simulated with."""


@dataclass(frozen=True)
class Rollout:
    """What the controller knows of an iteration beforehand."""

    instances: int
    samples: int
    samples_per_prompt: int
    prompt_tokens: float
    """Mean."""
    max_num_seqs: int
    kv_capacity: int


@dataclass
class Decision:
    """What came of an iteration; predictions are of the whole stage, from its start."""

    threshold: float = 0.0
    migrations: list[Migration] = field(default_factory=list)
    migrated_at_s: float | None = None
    predicted_s: float | None = None
    predicted_serial_s: float | None = None


class MigrationController:
    """One per job, on rank 0."""

    def __init__(
        self,
        options: MigrationOptions,
        auto_threshold: bool,
        meter: RateMeter,
        history: LengthHistory,
    ) -> None:
        """options: its threshold counts where `auto_threshold` is False."""
        self.meter, self.history = meter, history
        self._options, self._auto = options, auto_threshold
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self.decision = Decision()

    def start(
        self, rollout: Rollout, board: MigrationBoard, finished: Callable[[], tuple[int, int]]
    ) -> None:
        """Watches an iteration. finished: samples finished and samples scored so far."""
        self._stop.clear()
        self._fault = None
        self.decision = Decision()
        self._thread = threading.Thread(
            target=self._run, args=(rollout, board, finished), name="migration", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch, also after an error elsewhere; idempotent."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self, lengths: Sequence[int]) -> Decision:
        """Ends the watch and remembers the iteration's lengths. Raises what went wrong in it."""
        self.stop()
        if self._fault is not None:
            raise self._fault
        self.history.add(lengths)
        return self.decision

    def _run(
        self, rollout: Rollout, board: MigrationBoard, finished: Callable[[], tuple[int, int]]
    ) -> None:
        try:
            self._watch(rollout, board, finished)
        except BaseException as error:
            self._fault = error

    def _watch(
        self, rollout: Rollout, board: MigrationBoard, finished: Callable[[], tuple[int, int]]
    ) -> None:
        began = time.monotonic()
        lengths = self.history.distribution()
        mean_tokens = rollout.prompt_tokens + lengths.mean
        planner: MigrationPlanner | None = None
        looked = -LOOK_S
        prefilled: set[int] = set()  # instances
        done = 0
        while done < rollout.samples and not self._stop.wait(POLL_S):
            done, scored = finished()
            near = planner is not None and rollout.samples - done <= planner.asks_at
            if not near and time.monotonic() - began - looked < LOOK_S:
                continue
            looked = time.monotonic() - began
            left = set(board.read().left)
            reports = board.reports([i for i in range(rollout.instances) if i not in left])
            for report in reports:
                self.meter.decode(report.step_sequences, report.step_seconds)
                if report.prefill_seconds > 0 and report.instance not in prefilled:
                    prefilled.add(report.instance)
                    self.meter.prefill(report.prefill_tokens, report.prefill_seconds)
            if planner is None:
                rates = self.meter.rates(mean_tokens)
                if rates is not None:
                    self._predict(rollout, rates)
                    planner = self._planner(rates, rollout.samples)
            elif near and reports and not _under_way(reports, self.decision.migrations):
                state = _state(reports, done - scored, looked)
                migration = planner.observe(state)
                if migration is None:
                    continue
                if board.publish(migration):
                    self.decision.migrations.append(migration)
                    self.decision.migrated_at_s = looked
                else:  # one of its instances has left: look again
                    assert rates is not None
                    planner = self._planner(rates, rollout.samples)

    def _planner(self, rates: Rates, samples: int) -> MigrationPlanner:
        options = replace(self._options, threshold=self.decision.threshold)
        return MigrationPlanner(options, rates, self.history.distribution(), samples)

    def _predict(self, rollout: Rollout, rates: Rates) -> None:
        """Chooses the threshold, where it is to be chosen, and predicts the stage."""
        lengths = self.history.distribution()
        case = self.case(rollout, rates, lengths)
        candidates = THRESHOLDS if self._auto else (self._options.threshold,)
        choice = choose_threshold(case, lengths, SEED, candidates=candidates)
        self.decision.threshold = choice.threshold
        self.decision.predicted_s = dict(choice.curve)[choice.threshold]
        self.decision.predicted_serial_s = choice.serial_s

    def case(
        self, rollout: Rollout, rates: Rates, lengths: LengthDistribution | tuple[int, ...]
    ) -> RolloutCase:
        """A rollout as the simulation takes it."""
        options = self._options
        return RolloutCase(
            instances=rollout.instances,
            samples=rollout.samples,
            prompt_tokens=max(1, round(rollout.prompt_tokens)),
            lengths=lengths,
            max_tokens=options.max_tokens,
            max_num_seqs=rollout.max_num_seqs,
            kv_capacity=rollout.kv_capacity,
            rates=rates,
            policy=options.policy,
            inference_instances=options.inference_instances,
            transfer=options.transfer,
            batch_capacity=options.batch_capacity,
            samples_per_prompt=rollout.samples_per_prompt,
        )


def _under_way(reports: Sequence[Report], migrations: Sequence[Migration]) -> bool:
    """Whether a source still has what the last migration takes away: it must move once only."""
    has = {(each[0], report.instance) for report in reports for each in report.unfinished}
    return any(
        (move.sample_id, move.source) in has for each in migrations[-1:] for move in each.moves
    )


def _state(reports: Sequence[Report], waiting: int, seconds: float) -> RolloutState:
    instances = tuple(
        InstanceState(
            report.instance,
            report.node,
            tuple(Unfinished(*each) for each in report.unfinished),
            report.kv_capacity,
        )
        for report in reports
    )
    return RolloutState(instances, max(0, waiting), seconds)
