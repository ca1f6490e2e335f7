"""All instances generate: who makes which sample, the state at any moment, and a migration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_rlhfuse.migration.case import RolloutCase
from megatron_rlhfuse.migration.decoding import Decoding, decode
from megatron_rlhfuse.migration.dispatch import Dispatch, dispatch_prompts
from megatron_rlhfuse.migration.scoring import Scoring
from megatron_rlhfuse.migration.state import InstanceState, Migration, RolloutState, Unfinished
from megatron_rlhfuse.migration.transfers import Transfers


@dataclass(frozen=True)
class Generation:
    """A rollout in which nothing moves.

    Attributes:
        decodings: by instance
        finished: seconds, by sample
        released: seconds at which an instance has no samples any more, by instance
    """

    decodings: tuple[Decoding, ...]
    finished: list[float]
    released: list[float]


@dataclass(frozen=True)
class Migrated:
    """The same rollout, but a migration at `time`.

    Attributes:
        leave, arrive: seconds for which sources send, and destinations wait, by instance
        decodings: of destinations that take samples, from when these have come
        finished, released: as in `Generation`
    """

    time: float
    migration: Migration
    leave: list[float]
    arrive: list[float]
    decodings: dict[int, Decoding]
    finished: list[float]
    released: list[float]


def generate(case: RolloutCase, lengths: Sequence[int], dispatch: Dispatch) -> Generation:
    """Args: lengths: of the responses, by sample. Raises ValueError if there are too few."""
    if len(lengths) != case.samples or min(lengths) < 1:
        raise ValueError(f"lengths: want {case.samples} of at least 1, got {len(lengths)}")
    steps = _steps(case)
    decodings = [
        decode(
            samples,
            [float(lengths[sample]) for sample in samples],
            len(samples) * case.prompt_tokens / case.rates.prefill_tokens_per_s,
            case.max_num_seqs,
            steps,
        )
        for samples in _dispatch(case, lengths, dispatch)
    ]
    finished = [0.0] * case.samples
    for decoding in decodings:
        _note(decoding, finished)
    return Generation(tuple(decodings), finished, [decoding.end for decoding in decodings])


def state_at(
    case: RolloutCase, generation: Generation, scoring: Scoring, time: float
) -> RolloutState:
    """What an observer sees right after `time`, before any migration."""
    instances = []
    for instance, decoding in enumerate(generation.decodings):
        unfinished = []
        if decoding.end > time:
            progress = decoding.progress(time)
            unfinished = [
                Unfinished(sample, case.prompt_tokens, int(tokens))
                for sample, tokens, end in zip(
                    decoding.samples, progress, decoding.finished, strict=True
                )
                if end > time
            ]
        instances.append(
            InstanceState(instance, case.node(instance), tuple(unfinished), case.kv_capacity)
        )
    waiting = sum(
        finished <= time <= start
        for finished, start in zip(generation.finished, scoring.start, strict=True)
    )
    return RolloutState(tuple(instances), waiting, time)


def migrate(
    case: RolloutCase,
    generation: Generation,
    scoring: Scoring,
    state: RolloutState,
    migration: Migration,
) -> Migrated:
    """Carries the migration out: destinations go on once all that they take has come.

    A destination that is scoring a sample, as a designated one may be, ends that first.
    """
    time, rates = state.time, case.rates
    transfers = _transfers(case, state, migration)
    leave = transfers.leave(case.instances, rates).tolist()
    arrive = transfers.arrive(case.instances, rates).tolist()
    left: dict[int, float] = {}  # tokens still to be made, of every sample
    for decoding in generation.decodings:
        if decoding.end > time:
            for sample, tokens, done in zip(
                decoding.samples, decoding.tokens, decoding.progress(time), strict=True
            ):
                left[sample] = tokens - done
    finished, released = list(generation.finished), list(generation.released)
    held = {each.instance: [one.sample_id for one in each.unfinished] for each in state.instances}
    taking = {move.destination for move in migration.moves}
    for move in migration.moves:
        held[move.destination].append(move.sample_id)
        released[move.source] = time + leave[move.source]
    steps = _steps(case)
    decodings: dict[int, Decoding] = {}
    busy = scoring.busy_until(time, case.instances, rates.inference_s)
    for instance in sorted(taking):
        samples = held[instance]
        begin = max(time, generation.decodings[instance].times[0], busy[instance])
        remaining = [left[sample] for sample in samples]
        decodings[instance] = decode(
            samples, remaining, begin + arrive[instance], case.max_num_seqs, steps
        )
        _note(decodings[instance], finished)
        released[instance] = decodings[instance].end
    return Migrated(time, migration, leave, arrive, decodings, finished, released)


def _dispatch(case: RolloutCase, lengths: Sequence[int], dispatch: Dispatch) -> list[list[int]]:
    """The samples of each instance, in the order in which they are admitted."""
    copies = case.samples_per_prompt
    of_prompt = [range(s, min(s + copies, case.samples)) for s in range(0, case.samples, copies)]
    tokens = [float(sum(lengths[sample] for sample in samples)) for samples in of_prompt]
    return [
        [sample for prompt in prompts for sample in of_prompt[prompt]]
        for prompts in dispatch_prompts(tokens, case.instances, dispatch)
    ]


def _transfers(case: RolloutCase, state: RolloutState, migration: Migration) -> Transfers:
    moves = migration.moves
    nodes = [each.node for each in state.instances]
    tokens = {
        sample.sample_id: sample.prompt_tokens + sample.response_tokens
        for each in state.instances
        for sample in each.unfinished
    }
    return Transfers(
        source=np.array([move.source for move in moves], dtype=np.int64),
        destination=np.array([move.destination for move in moves], dtype=np.int64),
        tokens=np.array([tokens[move.sample_id] for move in moves], dtype=np.int64),
        same_node=np.array([nodes[move.source] == nodes[move.destination] for move in moves]),
        kv=np.array([move.transfer == "kv" for move in moves]),
    )


def _steps(case: RolloutCase) -> list[float]:
    return case.rates.step_table(min(case.max_num_seqs, case.samples)).tolist()


def _note(decoding: Decoding, finished: list[float]) -> None:
    for sample, end in zip(decoding.samples, decoding.finished, strict=True):
        finished[sample] = end
