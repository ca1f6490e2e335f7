"""Simulated rollouts: conservation, hand-computed timelines, and `rlhfuse simulate --rollout`."""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlhfuse import cli
from megatron_rlhfuse.migration.case import draw_lengths, load_case
from megatron_rlhfuse.migration.decoding import decode
from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.rates import Rates
from megatron_rlhfuse.migration.simulate import (
    RolloutCase,
    RolloutTimeline,
    choose_threshold,
    simulate_rollout,
)
from megatron_rlhfuse.schedule.errors import ProblemError

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples" / "rollouts").glob("*.json"))

FREE = Rates(
    decode=((1, 1.0), (64, 1.0)),
    prefill_tokens_per_s=1e12,
    kv_bytes_per_token=1.0,
    kv_bytes_per_s=1e15,
    kv_bytes_per_s_between_nodes=1e15,
    transfer_latency_s=0.0,
    inference_s=2.0,
)
"""Steps of one second whatever the batch, no time for prefill and transfers (but 1e-12 s)."""

COSTLY = replace(
    FREE,
    decode=((1, 1.0), (4, 1.1), (16, 2.0)),
    prefill_tokens_per_s=100.0,
    kv_bytes_per_s=1e3,
    kv_bytes_per_s_between_nodes=1e2,
    transfer_latency_s=0.1,
)


def case_of(lengths: list[int], instances: int, rates: Rates = FREE, **other: Any) -> RolloutCase:
    given_: dict[str, Any] = {
        "samples": len(lengths),
        "prompt_tokens": 1,
        "lengths": tuple(lengths),
        "max_tokens": 100,
        "max_num_seqs": 64,
        "kv_capacity": 10**6,
    }
    return RolloutCase(instances=instances, rates=rates, **{**given_, **other})


def check(timeline: RolloutTimeline, case: RolloutCase) -> None:
    """The invariants of the module."""
    inference_s = case.rates.inference_s
    assert len(timeline.finished_s) == len(timeline.scored_s) == case.samples
    for finished, scored in zip(timeline.finished_s, timeline.scored_s, strict=True):
        assert finished + inference_s <= scored + 1e-9
    assert timeline.stage_s == pytest.approx(max(timeline.scored_s))
    done = Counter(timeline.scored_by)
    for each in timeline.instances:
        assert each.inference_busy_s == pytest.approx(done[each.instance] * inference_s)
        assert all(start < end for start, end in (*each.generation, *each.inference))
        ends = [
            end for spans in (each.generation, each.migration, each.inference) for _, end in spans
        ]
        assert max(ends, default=0.0) <= timeline.stage_s + 1e-9
        used = sum(
            end - start
            for spans in (each.generation, each.migration, each.inference)
            for start, end in spans
        )
        assert each.idle_s == pytest.approx(timeline.stage_s - used, abs=1e-6)
        assert not each.batches or each.batches[-1][1] == 0
    # Nobody does two things at once.
    for each in timeline.instances:
        spans = sorted((*each.generation, *each.migration, *each.inference))
        for (_, end), (start, _) in itertools.pairwise(spans):
            assert end <= start + 1e-6


rollouts = st.builds(
    case_of,
    st.lists(st.integers(1, 100), min_size=1, max_size=24),
    st.integers(1, 5),
    st.sampled_from([FREE, COSTLY]),
    max_num_seqs=st.sampled_from([1, 2, 64]),
    samples_per_prompt=st.integers(1, 3),
    instances_per_node=st.sampled_from([None, 1, 2]),
    transfer=st.sampled_from(["auto", "kv", "tokens"]),
    kv_capacity=st.sampled_from([150, 500, 10**6]),
) | st.builds(
    case_of,
    st.lists(st.integers(1, 100), min_size=1, max_size=24),
    st.integers(2, 5),
    st.sampled_from([FREE, COSTLY]),
    policy=st.just("inference"),
    inference_instances=st.sampled_from([(0,), (1,), (0, 1)]),
)
thresholds = st.sampled_from([None, 0.0, 0.1, 0.3, 0.5, 1.0])
dispatches = st.sampled_from(["round-robin", "longest-first"])


@settings(deadline=None, max_examples=200)
@given(rollouts, thresholds, st.booleans(), dispatches)
def test_every_sample_is_finished_and_scored_once(
    case: RolloutCase, threshold: float | None, fused: bool, dispatch: Any
) -> None:
    assert isinstance(case.lengths, tuple)
    timeline = simulate_rollout(case, case.lengths, threshold, fused, dispatch)
    check(timeline, case)
    if not fused or not threshold:
        assert timeline.migration is None
    if not fused:
        first = min(scored - case.rates.inference_s for scored in timeline.scored_s)
        assert first >= timeline.generation_s - 1e-9


@settings(deadline=None)
@given(rollouts, dispatches)
def test_without_migration_fused_is_no_longer_than_serial(case: RolloutCase, dispatch: Any) -> None:
    assert isinstance(case.lengths, tuple)
    serial = simulate_rollout(case, case.lengths, None, False, dispatch)
    fused = simulate_rollout(case, case.lengths, 0.0, True, dispatch)
    assert fused.stage_s <= serial.stage_s + 1e-9
    assert fused.finished_s == serial.finished_s


@settings(deadline=None)
@given(rollouts, thresholds)
def test_with_free_transfers_fused_is_no_longer_than_serial(
    case: RolloutCase, threshold: float | None
) -> None:
    assert isinstance(case.lengths, tuple)
    case = replace(case, rates=FREE, policy="busiest", inference_instances=())
    serial = simulate_rollout(case, case.lengths, None, fused=False)
    fused = simulate_rollout(case, case.lengths, threshold)
    assert fused.stage_s <= serial.stage_s + 1e-6
    assert fused.generation_s <= serial.generation_s + 1e-6


@settings(deadline=None)
@given(rollouts, thresholds)
def test_until_the_migration_nothing_differs(case: RolloutCase, threshold: float | None) -> None:
    assert isinstance(case.lengths, tuple)
    plain = simulate_rollout(case, case.lengths, 0.0)
    fused = simulate_rollout(case, case.lengths, threshold)
    if fused.migrated_s is None:
        assert fused == plain
        return
    for ours, theirs in zip(fused.finished_s, plain.finished_s, strict=True):
        assert ours == theirs or min(ours, theirs) > fused.migrated_s - 1e-9
    began = fused.migrated_s + case.rates.inference_s
    for sample, end in enumerate(plain.scored_s):
        if end < began - 1e-9:
            assert fused.scored_s[sample] == end
            assert fused.scored_by[sample] == plain.scored_by[sample]


def test_two_instances_by_hand() -> None:
    """Instance 0 makes 2 and 10 tokens, instance 1 makes 3 and 5; scoring takes 2 s."""
    case = case_of([2, 3, 10, 5], 2)
    serial = simulate_rollout(case, (2, 3, 10, 5), None, fused=False)
    assert serial.finished_s == pytest.approx((2, 3, 10, 5))
    assert serial.stage_s == pytest.approx(14)  # two each, after 10
    fused = simulate_rollout(case, (2, 3, 10, 5), 0.0)
    # Instance 1 is free at 5 and scores what is finished, the samples 0, 1 and 3, until 11.
    assert fused.scored_s == pytest.approx((7, 9, 12, 11))
    assert fused.scored_by == (1, 1, 0, 1)
    assert fused.instances[0].idle_s == pytest.approx(0)
    assert fused.instances[1].idle_s == pytest.approx(1)


def test_a_migration_by_hand() -> None:
    """After 3 s one sample is left on each of two instances; the second goes to the first."""
    lengths = (2, 3, 10, 9)
    rates = replace(FREE, inference_s=3.0, transfer_latency_s=0.5)
    case = case_of(list(lengths), 2, rates, transfer="kv")
    fused = simulate_rollout(case, lengths, 0.5)
    assert fused.migrated_s == pytest.approx(3)
    assert fused.migration is not None
    assert fused.migration.destinations == (0,)
    (move,) = fused.migration.moves
    assert (move.sample_id, move.source, move.destination) == (3, 1, 0)
    # Both are half a second late; instance 1 scores from 3.5 on, instance 0 from 10.5.
    assert fused.finished_s == pytest.approx((2, 3, 10.5, 9.5))
    assert fused.scored_s == pytest.approx((6.5, 9.5, 13.5, 12.5))
    assert fused.scored_by == (1, 1, 0, 1)
    assert fused.instances[1].migration == (pytest.approx((3, 3.5)),)
    assert fused.stage_s == pytest.approx(13.5)
    plain = simulate_rollout(case, lengths, 0.0)
    assert plain.stage_s == pytest.approx(16)  # 1: 9 to 15; 0: 10 to 16


def test_waiting_samples_and_batch_dependent_steps_by_hand() -> None:
    """Three samples, two at a time; steps take 1 s alone and 2 s together."""
    done = decode([7, 8, 9], [1.0, 3.0, 2.0], 5.0, 2, [0.0, 1.0, 2.0])
    # Together until 7 has its token at 7; 9 joins at clock 1; both end at clock 3.
    assert done.finished == pytest.approx([7.0, 11.0, 11.0])
    assert done.progress(9.0) == pytest.approx([1.0, 2.0, 1.0])
    assert done.progress(0.0) == [0.0, 0.0, 0.0]
    assert (done.times, done.batches) == ([5.0, 7.0, 11.0], [2, 2, 0])


def test_prefill_comes_first() -> None:
    rates = replace(FREE, prefill_tokens_per_s=10.0)
    case = case_of([1, 1, 1], 2, rates, prompt_tokens=5)
    assert simulate_rollout(case, (1, 1, 1), None).finished_s == pytest.approx((2, 1.5, 2))


def test_samples_of_a_prompt_stay_together() -> None:
    case = case_of([1, 2, 3, 4, 5, 6], 2, samples_per_prompt=2)
    timeline = simulate_rollout(case, (1, 2, 3, 4, 5, 6), None)
    assert [each.generation_end_s for each in timeline.instances] == pytest.approx([6, 4])


def test_longest_first_balances_tokens() -> None:
    case = case_of([9, 1, 9, 1], 2, replace(FREE, decode=((1, 1.0),)), max_num_seqs=1)
    lengths = (9, 1, 9, 1)
    assert simulate_rollout(case, lengths, None).generation_s == pytest.approx(18)
    best = simulate_rollout(case, lengths, None, dispatch="longest-first")
    assert best.generation_s == pytest.approx(10)


def test_the_best_threshold_is_that_of_the_curve() -> None:
    case = load_case(ROOT / "examples" / "rollouts" / "two_cores.json")
    assert isinstance(case.lengths, tuple)
    choice = choose_threshold(case, None, seed=0)
    stages = dict(choice.curve)
    assert stages[choice.threshold] == min(stages.values())
    for threshold, seconds in stages.items():
        assert seconds == simulate_rollout(case, case.lengths, threshold).stage_s
    assert choice.serial_s == simulate_rollout(case, case.lengths, None, fused=False).stage_s
    assert stages[choice.threshold] < stages[0.0] < choice.serial_s


def test_drawn_curves_are_means_and_repeat() -> None:
    known = LengthDistribution.log_normal(10, 1.0, 100)
    case = case_of([1] * 24, 3, COSTLY)
    choice = choose_threshold(case, known, seed=3, draws=2, candidates=(0.0, 0.4))
    assert choice == choose_threshold(case, known, seed=3, draws=2, candidates=(0.0, 0.4))
    stages = [
        simulate_rollout(case, lengths, 0.4, distribution=known).stage_s
        for lengths in draw_lengths(case, known, 3, 2)
    ]
    assert dict(choice.curve)[0.4] == pytest.approx(sum(stages) / 2)


def test_too_few_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="lengths: want 2"):
        simulate_rollout(case_of([1, 2], 1), (1,), None)


TOY: dict[str, Any] = json.loads((ROOT / "examples" / "rollouts" / "two_cores.json").read_text())
DRAWN = {"median": 10, "sigma": 1.0}


def edited(**fields: Any) -> dict[str, Any]:
    return {**copy.deepcopy(TOY), **fields}


BAD_FIELDS = [
    ({"instances": 0}, "instances: want a whole number from 1"),
    ({"instances": 100_000}, "instances: want at most"),
    ({"samples": 31}, "lengths: want one per sample (31), got 32"),
    ({"lengths": [65] * 32}, "lengths[0]: want tokens from 1 to max_tokens 64, got 65"),
    ({"lengths": {**DRAWN, "median": 0}}, "lengths.median: want a number of at least 1"),
    ({"lengths": {**DRAWN, "seed": -1}}, "lengths.seed: want a whole number from 0"),
    ({"lengths": {"median": 5}}, "lengths.sigma: missing"),
    ({"kv_capacity": 70}, "kv_capacity: want at least prompt and max_tokens, 80"),
    ({"rates": 1}, "rates: want a JSON object"),
    ({"rates": {**TOY["rates"], "decode": []}}, "rates.decode: want at least one"),
    ({"policy": "idle"}, "policy: want one of busiest, inference"),
    ({"policy": "inference"}, "inference_instances: want it with policy inference"),
    ({"inference_instances": [2]}, "inference_instances[0]: want an instance from 0 to 1"),
    ({"batch_capacity": 0}, "batch_capacity: want a whole number from 1"),
    ({"note": 3}, "note: want a line of text"),
    ({"speed": 3}, "speed: unknown field"),
]


@pytest.mark.parametrize(("fields", "says"), BAD_FIELDS, ids=[says for _, says in BAD_FIELDS])
def test_a_bad_field_is_one_line_and_status_2(
    fields: dict[str, Any],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("case.json").write_text(json.dumps(edited(**fields)))
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", "--rollout", "case.json"])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"rlhfuse simulate: error: case.json: {says}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "required: CLUSTER.json or --rollout"),
        (["--rollout", "none.json"], "none.json: No such file"),
        (["cluster.json", "--rollout", "case.json"], "--rollout: want it without CLUSTER.json"),
        (["cluster.json", "--threshold", "0.2"], "--threshold: want --rollout"),
        (["--rollout", "case.json", "--threshold", "2"], "--threshold: want auto or a number"),
        (["--rollout", "case.json", "--threshold", "x"], "--threshold: want auto or a number"),
        (["--rollout", "case.json", "--seconds", "1"], "--seconds: it is for a cluster"),
        (["--rollout", "case.json", "--problem", "p.json"], "--problem: it is for a cluster"),
        (["--rollout", "case.json", "--json", "case.json"], "--json: case.json is the input"),
        (["--rollout", "case.json", "--png", "no/a.png"], "--png: no/a.png must be a file"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("case.json").write_text(json.dumps(TOY))
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


def test_the_command_prints_writes_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, numbers, picture = (str(tmp_path / name) for name in ("case.json", "o.json", "o.png"))
    Path(case).write_text(json.dumps(TOY))
    assert cli.main(["simulate", "--rollout", case, "--json", numbers, "--png", picture]) == 0
    printed = capsys.readouterr().out
    written = json.loads(Path(numbers).read_text())
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert written["fused_s"] == min(point["stage_s"] for point in written["curve"])
    assert written["speed_up"] == pytest.approx(written["serial_s"] / written["fused_s"])
    assert written["timelines"]["fused"]["stage_s"] == written["fused_s"]
    assert f"serial    {written['serial_s']:.2f} s" in printed
    assert f"{written['speed_up']:.2f}x as fast" in printed
    assert f"migrated  {written['moved']} of 32 samples after" in printed
    (chosen,) = (line for line in printed.splitlines() if line.endswith("  <"))
    assert float(chosen.split()[0]) == written["threshold"]


def test_a_threshold_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = edited(lengths=DRAWN)
    (tmp_path / "case.json").write_text(json.dumps(drawn))
    path = str(tmp_path / "case.json")
    assert cli.main(["simulate", "--rollout", path, "--threshold", "0.33"]) == 0
    printed = capsys.readouterr().out
    assert " at threshold 0.33: " in printed
    assert cli.main(["simulate", "--rollout", path, "--threshold", "auto"]) == 0
    automatic = capsys.readouterr().out
    assert cli.main(["simulate", "--rollout", path]) == 0
    assert capsys.readouterr().out == automatic


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_can_be_simulated(path: Path) -> None:
    case = load_case(path)
    assert "assumptions" in case.note
    lengths = case.lengths
    if not isinstance(lengths, tuple):
        (lengths,) = draw_lengths(case, lengths, case.seed, 1)
    check(simulate_rollout(case, lengths, 0.2), case)


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"two_cores.json", "gpu256.json"}


def test_a_case_is_an_object() -> None:
    with pytest.raises(ProblemError, match=r"^rollout: want a JSON object"):
        RolloutCase.from_json([])
