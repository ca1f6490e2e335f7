"""The flags of inter-stage fusion: what is refused, and how; what they turn on."""

from __future__ import annotations

import argparse

import pytest

from megatron_rlhfuse.rollout_flags import threshold
from tests.unit.conftest import Parse, refusal

FUSIONS = ("none", "inter", "intra", "both")

# What is given, and what the refusal must say: the flag at fault, and the remedy.
REFUSED: list[tuple[str, str, str]] = [
    # the designated instances, and the policy that uses them
    (
        "--rlhfuse-fusion inter --rlhfuse-migration-policy inference",
        "--rlhfuse-migration-policy inference and --rlhfuse-migration-instances",
        "give both, or neither",
    ),
    (
        "--rlhfuse-fusion inter --rlhfuse-migration-instances 0",
        "--rlhfuse-migration-policy inference and --rlhfuse-migration-instances",
        "give both, or neither",
    ),
    (
        "--rlhfuse-fusion inter --rlhfuse-migration-policy busiest --rlhfuse-migration-instances 0",
        "--rlhfuse-migration-policy inference and --rlhfuse-migration-instances",
        "give both, or neither",
    ),
    (
        "--rlhfuse-fusion inter --rlhfuse-migration-policy inference "
        "--rlhfuse-migration-instances 0 0",
        "--rlhfuse-migration-instances",
        "every number once",
    ),
    # numbers out of range
    (
        "--rlhfuse-fusion inter --rlhfuse-migration-batch 0",
        "--rlhfuse-migration-batch 0",
        "at least 1",
    ),
    (
        "--rlhfuse-fusion inter --rlhfuse-migration-batch -3",
        "--rlhfuse-migration-batch -3",
        "at least 1",
    ),
    ("--rollout-pace -1", "--rollout-pace -1.0", "0 or more seconds"),
    ("--rollout-pace nan", "--rollout-pace nan", "0 or more seconds"),
    ("--rollout-pace inf", "--rollout-pace inf", "0 or more seconds"),
    ("--rollout-extra-prompts -0.1", "--rollout-extra-prompts -0.1", "from 0 to 4"),
    ("--rollout-extra-prompts 5", "--rollout-extra-prompts 5.0", "from 0 to 4"),
    ("--rollout-extra-prompts nan", "--rollout-extra-prompts nan", "from 0 to 4"),
]

NEEDS_FUSION = (
    "--rlhfuse-migration-threshold 0",
    "--rlhfuse-migration-threshold 0.2",
    "--rlhfuse-migration-policy inference --rlhfuse-migration-instances 0",
    "--rlhfuse-migration-transfer kv",
    "--rlhfuse-migration-transfer tokens",
    "--rlhfuse-migration-batch 4",
    "--rlhfuse-migration-rebalance",
)
"""Without effect where generation and inference are not fused."""

OF_FUSED_TRAINING = (
    "--rlhfuse-plan p.json",
    "--rlhfuse-plan-cache none",
    "--rlhfuse-activation-memory-gib 1",
)


@pytest.mark.parametrize(("flags", "fault", "remedy"), REFUSED)
def test_refusal_names_flag_and_remedy(parse: Parse, flags: str, fault: str, remedy: str) -> None:
    message = refusal(parse, flags)
    assert fault in message and remedy in message, message


@pytest.mark.parametrize("fusion", ["none", "intra"])
@pytest.mark.parametrize("flags", NEEDS_FUSION)
def test_what_has_no_effect_is_refused(parse: Parse, flags: str, fusion: str) -> None:
    message = refusal(parse, f"--rlhfuse-fusion {fusion} {flags}")
    assert f"{flags.split()[0]} has no effect with --rlhfuse-fusion {fusion}: " in message
    assert "give inter or both, or leave it out" in message


@pytest.mark.parametrize("fusion", ["inter", "both"])
@pytest.mark.parametrize("flags", NEEDS_FUSION)
def test_it_is_accepted_where_it_has_one(parse: Parse, flags: str, fusion: str) -> None:
    assert parse(f"--rlhfuse-fusion {fusion} {flags}").fuses_rollout


@pytest.mark.parametrize("flags", OF_FUSED_TRAINING)
def test_flags_of_fused_training_have_no_effect_with_inter(parse: Parse, flags: str) -> None:
    message = refusal(parse, f"--rlhfuse-fusion inter {flags}")
    assert f"{flags.split()[0]} has no effect without --rlhfuse-fusion intra" in message


@pytest.mark.parametrize("instances", ["4", "0 4", "-1", "3 -1"])
def test_designated_instances_that_do_not_exist_are_refused(parse: Parse, instances: str) -> None:
    message = refusal(
        parse,
        "--rlhfuse-fusion inter --rlhfuse-migration-policy inference "
        f"--rlhfuse-migration-instances {instances}",
        world=4,
    )
    foreign = instances.split()[-1]
    assert message.startswith(f"--rlhfuse-migration-instances {foreign}: ")
    assert "from 0, below --rollout-instances 4" in message


def test_designated_instances_are_counted_after_the_engines(parse: Parse) -> None:
    """Two engines on four ranks: instances 0 and 1."""
    flags = (
        "--rlhfuse-fusion both --rollout-instances 2 --rlhfuse-migration-policy inference "
        "--rlhfuse-migration-instances"
    )
    assert parse(f"{flags} 1 0", world=4).rlhfuse_migration_instances == [1, 0]
    assert "--rlhfuse-migration-instances 2: " in refusal(parse, f"{flags} 2", world=4)


@pytest.mark.parametrize(
    ("text", "value"), [("auto", None), ("0", 0.0), ("1", 1.0), ("0.2", 0.2), ("2e-1", 0.2)]
)
def test_thresholds(parse: Parse, text: str, value: float | None) -> None:
    args = parse(f"--rlhfuse-fusion inter --rlhfuse-migration-threshold {text}")
    assert args.rlhfuse_migration_threshold == threshold(text) == value


@pytest.mark.parametrize("text", ["-1", "-0.01", "1.01", "nan", "inf", "half", "20%", ""])
def test_what_is_no_threshold(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as error:
        threshold(text)
    assert str(error.value) == f"want auto or a number from 0 to 1, got {text}"


def test_a_wrong_threshold_ends_the_program_with_one_line(
    parse: Parse, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse("--rlhfuse-fusion inter --rlhfuse-migration-threshold -1")
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "pretrain_rlhf.py: error: argument --rlhfuse-migration-threshold: "
        "want auto or a number from 0 to 1, got -1"
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_generation_and_inference_are_fused_with_inter_and_both(parse: Parse, fusion: str) -> None:
    assert parse(f"--rlhfuse-fusion {fusion}").fuses_rollout is (fusion in ("inter", "both"))


def test_no_critic_is_needed(parse: Parse) -> None:
    for fusion in ("inter", "both"):
        args = parse(f"--rlhfuse-fusion {fusion} --advantage-estimator reinforce++")
        assert args.fuses_rollout and not args.fuses_training


def test_inter_leaves_training_as_it_is(parse: Parse) -> None:
    assert not parse("--rlhfuse-fusion inter").fuses_training


def test_by_default_everything_is_chosen_while_it_runs(parse: Parse) -> None:
    args = parse("--rlhfuse-fusion inter")
    assert args.rlhfuse_migration_threshold is None
    assert args.rlhfuse_migration_batch is None
    assert args.rlhfuse_migration_policy == "busiest"
    assert args.rlhfuse_migration_transfer == "auto"
    assert args.rlhfuse_migration_relay == "gloo"
    assert not args.rlhfuse_migration_rebalance
    assert args.rollout_pace == 0


def test_a_relay_whose_package_is_missing_is_refused(
    parse: Parse, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = "--rlhfuse-fusion inter --rlhfuse-migration-relay nixl"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = refusal(parse, flags)
    assert message.startswith(
        "--rlhfuse-migration-relay nixl needs the packages nixl and nixl-cu13"
    )
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    assert parse(flags).rlhfuse_migration_relay == "nixl"


@pytest.mark.parametrize("fusion", ["none", "intra"])
def test_a_relay_has_no_effect_without_migration(parse: Parse, fusion: str) -> None:
    message = refusal(parse, f"--rlhfuse-fusion {fusion} --rlhfuse-migration-relay nixl")
    assert f"--rlhfuse-migration-relay has no effect with --rlhfuse-fusion {fusion}: " in message


def test_engines_are_paced_in_any_job(parse: Parse) -> None:
    for fusion in FUSIONS:
        assert parse(f"--rlhfuse-fusion {fusion} --rollout-pace 0.01").rollout_pace == 0.01


def test_prompts_are_dealt_out_in_turn_and_none_is_extra_by_default(parse: Parse) -> None:
    for fusion in FUSIONS:
        args = parse(f"--rlhfuse-fusion {fusion}")
        assert (args.rollout_dispatch, args.rollout_extra_prompts) == ("round-robin", 0)


def test_extra_prompts_and_dispatch_are_for_any_job(parse: Parse) -> None:
    for fusion in FUSIONS:
        for extra in (0, 0.25, 4):
            args = parse(
                f"--rlhfuse-fusion {fusion} --rollout-dispatch longest-first "
                f"--rollout-extra-prompts {extra}"
            )
            assert (args.rollout_dispatch, args.rollout_extra_prompts) == ("longest-first", extra)
