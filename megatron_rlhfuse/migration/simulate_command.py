"""`rlhfuse simulate --rollout CASE.json`: generation and inference, serial and fused.

Prints the time of both stages against the migration threshold (case.py has the format; examples in
examples/rollouts).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

from megatron_rlhfuse.cli import Refuse
from megatron_rlhfuse.migration.case import RolloutCase, draw_lengths, load_case
from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.options import share
from megatron_rlhfuse.migration.simulate import (
    THRESHOLDS,
    RolloutTimeline,
    ThresholdChoice,
    choose_threshold,
    simulate_rollout,
)
from megatron_rlhfuse.observe.jsonl import write_atomically
from megatron_rlhfuse.schedule.errors import ScheduleError

DRAWS = 4
"""Rollouts of drawn lengths that the curve is the mean of."""


@dataclass(frozen=True)
class Result:
    """The curve over all draws, and the timelines of the first.

    Attributes:
        choice: its `threshold` is the one asked for, or the best
    """

    case: RolloutCase
    lengths: tuple[int, ...]
    choice: ThresholdChoice
    serial: RolloutTimeline
    fused: RolloutTimeline

    @property
    def fused_s(self) -> float:
        return dict(self.choice.curve)[self.choice.threshold]

    @property
    def unmigrated_s(self) -> float:
        return dict(self.choice.curve)[0.0]

    @property
    def speed_up(self) -> float:
        return self.choice.serial_s / self.fused_s


def threshold(text: str) -> float | str:
    """The type of --threshold: "auto", or a fraction."""
    return text if text == "auto" else share(text)


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    """The flags --rollout, --threshold, --json and --png."""
    asked = None if args.threshold == "auto" else args.threshold
    try:
        result = simulate_case(load_case(args.rollout), asked)
        if args.json is not None:
            write_atomically(args.json, json.dumps(to_json(result), indent=1) + "\n")
        if args.png is not None:
            from megatron_rlhfuse.migration.draw import draw

            draw(result.choice, result.serial, result.fused).savefig(args.png, format="png")
    except ScheduleError as error:
        refuse(str(error) if str(args.rollout) in str(error) else f"{args.rollout}: {error}")
    except OSError as error:
        refuse(f"{error.filename}: {error.strerror}")
    print(text(result))
    return 0


def simulate_case(case: RolloutCase, asked: float | None) -> Result:
    """The curve, and the timelines at the threshold `asked` for; None takes the best."""
    candidates = sorted({*THRESHOLDS, *([asked] if asked is not None else [])})
    choice = choose_threshold(case, None, case.seed, DRAWS, candidates)
    if asked is not None:
        choice = ThresholdChoice(asked, choice.curve, choice.serial_s)
    if isinstance(case.lengths, LengthDistribution):
        (lengths,) = draw_lengths(case, case.lengths, case.seed, 1)
    else:
        lengths = case.lengths
    return Result(
        case,
        lengths,
        choice,
        simulate_rollout(case, lengths, None, fused=False),
        simulate_rollout(case, lengths, choice.threshold),
    )


def text(result: Result) -> str:
    """The summary for the terminal: what was simulated, the times, the curve."""
    case, choice, fused = result.case, result.choice, result.fused
    known = case.distribution()
    lines = [
        f"{case.instances} instances, {case.samples} samples of {case.prompt_tokens} prompt tokens "
        f"and up to {case.max_tokens} more",
        f"lengths   median {known.quantile(0.5)}, mean {known.mean:.0f}, "
        f"99.9 % at most {known.quantile(0.999)}",
    ]
    if case.note:
        lines.append(f"note      {case.note}")
    lines += [
        "",
        f"serial    {choice.serial_s:.2f} s, inference after generation",
        f"fused     {result.fused_s:.2f} s at threshold {choice.threshold:g}: "
        f"{result.speed_up:.2f}x as fast, without migration "
        f"{choice.serial_s / result.unmigrated_s:.2f}x",
        f"migrated  {_moved(fused)}",
        f"tail      finished after {fused.generation_s:.2f} s, serial "
        f"{result.serial.generation_s:.2f} s",
        "",
        f"{'threshold':10}{'stage':>10}{'speed-up':>10}",
    ]
    for threshold, seconds in choice.curve:
        mark = "  <" if threshold == choice.threshold else ""
        stage, ratio = f"{seconds:.2f} s", f"{choice.serial_s / seconds:.2f}x"
        lines.append(f"{threshold:<10g}{stage:>10}{ratio:>10}{mark}")
    if isinstance(case.lengths, LengthDistribution):
        lines += ["", f"stages are means of {DRAWS} rollouts; migration and tail are of the first"]
    return "\n".join(lines)


def to_json(result: Result) -> dict[str, Any]:
    """The numbers; `timelines` are those of the first rollout."""
    choice = result.choice
    return {
        "threshold": choice.threshold,
        "serial_s": choice.serial_s,
        "fused_s": result.fused_s,
        "unmigrated_s": result.unmigrated_s,
        "speed_up": result.speed_up,
        "moved": result.fused.moved,
        "curve": [{"threshold": share, "stage_s": seconds} for share, seconds in choice.curve],
        "timelines": {"serial": result.serial.to_json(), "fused": result.fused.to_json()},
    }


def _moved(fused: RolloutTimeline) -> str:
    migration = fused.migration
    if migration is None:
        return "nothing"
    ways = [move.transfer for move in migration.moves]
    kinds = ", ".join(f"{ways.count(kind)} as {kind}" for kind in ("kv", "tokens") if kind in ways)
    sources = len({move.source for move in migration.moves})
    return (
        f"{len(ways)} of {len(fused.finished_s)} samples after {fused.migrated_s:.2f} s, instances "
        f"with samples from {sources + len(migration.destinations)} to "
        f"{len(migration.destinations)} ({kinds.replace('kv', 'KV cache')})"
    )
