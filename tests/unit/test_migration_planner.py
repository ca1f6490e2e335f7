"""The invariants in the header of megatron_rlhfuse/migration/planner.py, and hand-made cases."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse.migration import placement as placement_module
from megatron_rlhfuse.migration import predict
from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.placement import Tail, place
from megatron_rlhfuse.migration.planner import MigrationOptions, MigrationPlanner, plan_migration
from megatron_rlhfuse.migration.rates import Rates
from megatron_rlhfuse.migration.state import InstanceState, Migration, RolloutState, Unfinished

MAX_TOKENS = 100

FLAT = Rates(
    decode=((1, 0.01), (64, 0.01)),
    prefill_tokens_per_s=1e9,
    kv_bytes_per_token=1.0,
    kv_bytes_per_s=1e12,
    kv_bytes_per_s_between_nodes=1e11,
    transfer_latency_s=0.0,
    inference_s=1.0,
)
"""Free transfers, a step as long for 64 samples as for one: what could be migrated pays."""

LENGTHS = LengthDistribution(range(1, MAX_TOKENS + 1))

OPTIONS = MigrationOptions(threshold=0.5, max_tokens=MAX_TOKENS, batch_capacity=8)


def make_state(
    prompts: list[list[int]],
    *,
    so_far: int = 10,
    kv_capacity: int = 10**6,
    waiting: int = 50,
    per_node: int = 2,
    first: int = 0,
) -> RolloutState:
    """Args: prompts: tokens of the prompt of every sample, by instance."""
    numbers = itertools.count(1000)
    return RolloutState(
        tuple(
            InstanceState(
                first + position,
                f"node{position // per_node}",
                tuple(Unfinished(next(numbers), prompt, so_far) for prompt in held),
                kv_capacity,
            )
            for position, held in enumerate(prompts)
        ),
        waiting,
    )


def spread(*counts: int) -> RolloutState:
    return make_state([[20] * count for count in counts])


def after(state: RolloutState, migration: Migration) -> dict[int, list[Unfinished]]:
    """Who has which samples once the moves are carried out; fails for a move that cannot be."""
    held = {each.instance: {s.sample_id: s for s in each.unfinished} for each in state.instances}
    for move in migration.moves:
        held[move.destination][move.sample_id] = held[move.source].pop(move.sample_id)
    return {instance: list(samples.values()) for instance, samples in held.items()}


states = st.builds(
    make_state,
    st.lists(st.lists(st.integers(1, 200), max_size=6), min_size=1, max_size=9),
    so_far=st.integers(0, MAX_TOKENS),
    kv_capacity=st.integers(301, 3000),
    waiting=st.integers(0, 100),
    per_node=st.integers(1, 4),
    first=st.integers(0, 5),
)
rates = st.builds(
    Rates,
    decode=st.sampled_from([FLAT.decode, ((1, 0.01), (4, 0.0105), (16, 0.02))]),
    prefill_tokens_per_s=st.sampled_from([100.0, 1e6]),
    kv_bytes_per_token=st.just(1e3),
    kv_bytes_per_s=st.sampled_from([1e5, 1e9]),
    kv_bytes_per_s_between_nodes=st.sampled_from([1e4, 1e8]),
    transfer_latency_s=st.sampled_from([0.0, 0.1]),
    inference_s=st.sampled_from([0.001, 1.0]),
)
options = st.builds(
    MigrationOptions,
    threshold=st.just(0.5),
    max_tokens=st.just(MAX_TOKENS),
    policy=st.just("busiest"),
    transfer=st.sampled_from(["auto", "kv", "tokens"]),
    kv_between_nodes=st.booleans(),
    batch_capacity=st.one_of(st.none(), st.integers(1, 12)),
    max_num_seqs=st.one_of(st.none(), st.integers(1, 12)),
) | st.builds(
    MigrationOptions,
    threshold=st.just(0.5),
    max_tokens=st.just(MAX_TOKENS),
    policy=st.just("inference"),
    inference_instances=st.sets(st.integers(0, 12), min_size=1).map(tuple),
    batch_capacity=st.integers(1, 12),
)


@settings(deadline=None, max_examples=300)
@given(states, options, rates)
def test_plans_keep_every_invariant(
    state: RolloutState, options: MigrationOptions, rates: Rates
) -> None:
    migration = plan_migration(state, options, rates, LENGTHS)
    if migration is None:
        return
    assert migration.moves and migration.stage_with_s < migration.stage_without_s
    before = {each.instance: each for each in state.instances}
    held = after(state, migration)
    # No sample is lost or doubled, and none moves twice.
    everyone = Counter(s.sample_id for each in state.instances for s in each.unfinished)
    assert Counter(s.sample_id for samples in held.values() for s in samples) == everyone
    assert max(Counter(move.sample_id for move in migration.moves).values()) == 1
    # Who keeps samples is a destination, and an instance is released.
    assert migration.destinations == tuple(sorted(migration.destinations))
    assert {instance for instance, samples in held.items() if samples} <= {*migration.destinations}
    assert len(migration.destinations) < sum(bool(each.unfinished) for each in state.instances)
    # Destinations do not move what they have; what they take is within the capacity.
    assert not {move.source for move in migration.moves} & {*migration.destinations}
    for instance in {move.destination for move in migration.moves}:
        assert len(held[instance]) <= options.capacity(rates)
        tokens = sum(sample.prompt_tokens + MAX_TOKENS for sample in held[instance])
        assert tokens <= before[instance].kv_capacity
    # KV caches leave a node only where they can, and transfers are of the kind asked for.
    for move in migration.moves:
        same = before[move.source].node == before[move.destination].node
        if move.transfer == "kv":
            assert options.transfer != "tokens" and (same or options.kv_between_nodes)
        else:
            assert options.transfer != "kv" or not same


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 5), min_size=2, max_size=7), st.integers(1, 12), st.integers(0, 1000)
)
def test_no_other_choice_of_as_many_destinations_moves_fewer(
    counts: list[int], capacity: int, waiting: int
) -> None:
    state = replace(spread(*counts), finished_waiting=waiting)
    asked = replace(OPTIONS, batch_capacity=capacity)
    placement = place(Tail.of(state), asked, capacity)
    unfinished, active = sum(counts), sum(count > 0 for count in counts)
    m = math.ceil(unfinished / capacity)
    if placement is None:
        assert m >= active  # memory is no constraint here
        return
    assert len(placement.destinations) == m
    fewest = min(unfinished - sum(chosen) for chosen in itertools.combinations(counts, m))
    assert len(placement.moved) == fewest


def fewest_destinations(prompts: list[list[int]], kv_capacity: int, capacity: int) -> int | None:
    """The rule in the header of placement.py, word for word; None where no instance is released."""
    order = sorted(range(len(prompts)), key=lambda each: (-len(prompts[each]), each))
    active = sum(map(bool, prompts))
    for m in range(math.ceil(sum(map(len, prompts)) / capacity), active):
        kept = order[:m]
        counts = {each: len(prompts[each]) for each in kept}
        room = {each: kv_capacity - sum(p + MAX_TOKENS for p in prompts[each]) for each in kept}
        for prompt in sorted((p for each in order[m:] for p in prompts[each]), reverse=True):
            fits = [
                each
                for each in kept
                if room[each] >= prompt + MAX_TOKENS and counts[each] < capacity
            ]
            if not fits:
                break
            best = min(fits, key=lambda each: (counts[each], each))
            counts[best] += 1
            room[best] -= prompt + MAX_TOKENS
        else:
            return m
    return None


@settings(deadline=None, max_examples=200)
@given(
    st.lists(st.lists(st.integers(1, 50), max_size=4), min_size=2, max_size=5),
    st.integers(150, 900),
    st.integers(1, 9),
)
def test_there_are_as_few_destinations_as_capacity_and_memory_permit(
    prompts: list[list[int]], kv_capacity: int, capacity: int
) -> None:
    tail = Tail.of(make_state(prompts, kv_capacity=kv_capacity))
    placement = place(tail, OPTIONS, capacity) if len(tail.sample_id) else None
    found = None if placement is None else len(placement.destinations)
    assert found == (fewest_destinations(prompts, kv_capacity, capacity) if any(prompts) else None)


@given(st.lists(st.integers(0, 6), min_size=2, max_size=8), st.integers(1, 10), st.integers(1, 40))
def test_filling_with_and_without_memory_in_sight_agree(
    counts: list[int], capacity: int, moved: int
) -> None:
    """The fast way for ample memory places as the careful one does."""
    tail = Tail.of(spread(*counts))
    destinations = np.arange(len(counts))
    moved = min(moved, sum(max(capacity - count, 0) for count in counts))
    need, room = np.full(moved, 120), np.full(len(counts), 10**6)
    within = placement_module._fill_within(destinations, need, room, tail, capacity)
    assert within is not None
    evenly = placement_module._fill_evenly(destinations, moved, tail, capacity)
    assert evenly.tolist() == within.tolist()


def test_the_busiest_keep_the_tail_and_ties_go_to_the_lower_number() -> None:
    migration = plan_migration(spread(1, 3, 0, 3, 2), OPTIONS, FLAT, LENGTHS)
    assert migration is not None
    assert migration.destinations == (1, 3)
    # Samples 1000 and 1007, 1008 move; always to the one with fewer, then the lower number.
    assert [(m.sample_id, m.source, m.destination) for m in migration.moves] == [
        (1000, 0, 1),
        (1007, 4, 3),
        (1008, 4, 1),
    ]


def test_designated_instances_take_the_tail_though_they_are_empty() -> None:
    designated = replace(OPTIONS, policy="inference", inference_instances=(2, 4))
    migration = plan_migration(spread(2, 3, 0, 3, 1), designated, FLAT, LENGTHS)
    assert migration is not None
    assert migration.destinations == (2, 4)
    one = plan_migration(spread(2, 3, 0, 1, 1), designated, FLAT, LENGTHS)
    assert one is not None and one.destinations == (4,)
    more = replace(designated, batch_capacity=4)
    three = plan_migration(spread(2, 3, 0, 3, 1), more, FLAT, LENGTHS)
    assert three is not None and three.destinations == (1, 2, 4)


def test_memory_asks_for_more_destinations() -> None:
    state = make_state([[20] * 2 for _ in range(4)], kv_capacity=4 * (20 + MAX_TOKENS))
    migration = plan_migration(state, OPTIONS, FLAT, LENGTHS)
    assert migration is not None and migration.destinations == (0, 1)
    tight = make_state([[20] * 2 for _ in range(4)], kv_capacity=3 * (20 + MAX_TOKENS))
    migration = plan_migration(tight, OPTIONS, FLAT, LENGTHS)
    assert migration is not None and migration.destinations == (0, 1, 2)
    full = make_state([[20] * 2 for _ in range(4)], kv_capacity=2 * (20 + MAX_TOKENS))
    assert plan_migration(full, OPTIONS, FLAT, LENGTHS) is None


def test_what_has_nowhere_to_go_or_nothing_to_gain_stays() -> None:
    assert plan_migration(spread(0, 0), OPTIONS, FLAT, LENGTHS) is None
    assert plan_migration(spread(5), OPTIONS, FLAT, LENGTHS) is None
    assert plan_migration(spread(0, 5, 0), OPTIONS, FLAT, LENGTHS) is None
    assert plan_migration(spread(8, 8), OPTIONS, FLAT, LENGTHS) is None


def test_a_migration_that_does_not_pay_is_refused() -> None:
    state = replace(spread(2, 2, 2, 2), finished_waiting=0)
    assert plan_migration(state, OPTIONS, FLAT, LENGTHS) is not None
    costly = replace(
        FLAT,
        inference_s=1e-6,
        prefill_tokens_per_s=0.1,
        kv_bytes_per_s=0.1,
        kv_bytes_per_s_between_nodes=0.1,
    )
    assert plan_migration(state, OPTIONS, costly, LENGTHS) is None
    slow = replace(FLAT, decode=((1, 0.01), (8, 1.0)), inference_s=1e-6)
    assert plan_migration(state, OPTIONS, slow, LENGTHS) is None


def test_transfers_are_the_cheaper_by_where_the_sample_goes() -> None:
    state = spread(1, 3, 1, 0)  # 0 and 1 share a node, 2 is on another
    near = replace(
        FLAT, kv_bytes_per_s=1e9, kv_bytes_per_s_between_nodes=1.0, prefill_tokens_per_s=1e5
    )

    def ways(options: MigrationOptions, rates: Rates) -> dict[int, str]:
        migration = plan_migration(state, options, rates, LENGTHS)
        assert migration is not None
        return {move.source: move.transfer for move in migration.moves}

    assert ways(OPTIONS, near) == {0: "kv", 2: "tokens"}
    assert ways(OPTIONS, FLAT) == {0: "kv", 2: "kv"}
    assert ways(replace(OPTIONS, kv_between_nodes=False), FLAT) == {0: "kv", 2: "tokens"}
    assert ways(replace(OPTIONS, transfer="tokens"), FLAT) == {0: "tokens", 2: "tokens"}
    apart = replace(OPTIONS, transfer="kv", kv_between_nodes=False)
    assert ways(apart, FLAT) == {0: "kv", 2: "tokens"}


def test_it_migrates_once_and_only_from_the_threshold_on() -> None:
    planner = MigrationPlanner(OPTIONS, FLAT, LENGTHS, total=16)
    assert planner.asks_at == 8
    assert planner.observe(spread(3, 3, 3)) is None
    assert planner.observe(spread(3, 3, 2)) is not None
    assert planner.asks_at == 0
    assert planner.observe(spread(2, 2, 2)) is None


def test_threshold_zero_never_migrates() -> None:
    planner = MigrationPlanner(replace(OPTIONS, threshold=0.0), FLAT, LENGTHS, total=16)
    assert planner.observe(spread(1, 1, 1)) is None
    assert planner.observe(spread(0, 0, 0)) is None


def test_thresholds_are_not_short_by_rounding() -> None:
    options = replace(OPTIONS, threshold=0.29)
    assert MigrationPlanner(options, FLAT, LENGTHS, total=100).asks_at == 29


def test_after_a_refusal_it_asks_again_once_fewer_are_left() -> None:
    planner = MigrationPlanner(OPTIONS, FLAT, LENGTHS, total=40)
    assert planner.observe(spread(9, 9)) is None  # two instances are needed for 18
    assert planner.asks_at == 13
    assert planner.observe(spread(7, 7)) is None
    assert planner.observe(spread(3, 5)) is not None


def test_rebalancing_may_migrate_again() -> None:
    planner = MigrationPlanner(replace(OPTIONS, rebalance=True), FLAT, LENGTHS, total=40)
    assert planner.observe(spread(5, 5, 5)) is not None
    assert planner.observe(spread(0, 6, 6)) is None
    assert planner.observe(spread(0, 4, 4)) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threshold", 1.5),
        ("policy", "idlest"),
        ("transfer", "pigeon"),
        ("batch_capacity", 0),
        ("max_num_seqs", 0),
        ("max_tokens", 0),
    ],
)
def test_bad_options_are_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{field} is {value!r}"):
        MigrationOptions(**{**vars(OPTIONS), field: value})  # type: ignore[arg-type]


def test_policy_inference_wants_instances() -> None:
    with pytest.raises(ValueError, match="inference_instances"):
        replace(OPTIONS, policy="inference")


def test_the_capacity_is_the_flat_part_of_the_curve_within_max_num_seqs() -> None:
    free = replace(OPTIONS, batch_capacity=None)
    assert free.capacity(FLAT) == 64
    assert replace(free, max_num_seqs=32).capacity(FLAT) == 32
    assert OPTIONS.capacity(FLAT) == 8


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 50), max_size=6), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_predicted_generation_is_that_of_shared_steps(
    tokens: list[list[int]], max_num_seqs: int
) -> None:
    """Against a loop: between two finishes all that are left advance evenly."""
    if not any(tokens):
        return
    rates = replace(FLAT, decode=((1, 1.0), (4, 2.0)))
    flat = np.array([[each for held in tokens for each in held]])
    instance = np.repeat(np.arange(len(tokens)), [len(held) for held in tokens])
    found = predict.generation_seconds(flat, instance, len(tokens), rates, max_num_seqs)[0]
    for held, seconds in zip(tokens, found, strict=True):
        expected, done = 0.0, 0
        for position, end in enumerate(sorted(held)):
            left = len(held) - position
            batch = min(left, max_num_seqs)
            expected += (end - done) * rates.step_seconds(batch) * left / batch
            done = end
        assert seconds == pytest.approx(expected)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=8), st.integers(0, 50), st.floats(0.01, 5))
def test_predicted_scoring_is_all_work_shared(
    released: list[float], samples: int, inference_s: float
) -> None:
    end = predict.stage_seconds(np.array([released]), np.array([0.0]), samples, inference_s)
    done = sum(max(0.0, end - time) for time in released)
    if end > inference_s + 1e-9:
        assert done == pytest.approx(samples * inference_s, abs=1e-6)
    else:
        assert done >= samples * inference_s - 1e-6


def test_predicted_lengths_are_those_of_such_a_tail() -> None:
    left = predict.likely_remaining(LENGTHS, np.full(50, 40))
    assert left.shape == (predict.MOST_DRAWS, 50)
    expected = LENGTHS.expected_remaining(40)
    assert left.mean(axis=1) == pytest.approx([expected] * predict.MOST_DRAWS, rel=0.02)
    assert (left.max(axis=1) >= 59).all()
    assert predict.likely_remaining(LENGTHS, np.array([MAX_TOKENS])).tolist() == [[1]] * 8
