"""The JSON description of a rollout for `rlhfuse simulate --rollout`. Errors name the field.

`lengths` is a list with the response length of every sample, or a log-normal
`{"median": tokens, "sigma": s, "seed": n}` that they are drawn from, cut at `max_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_rlhfuse.migration.lengths import LengthDistribution
from megatron_rlhfuse.migration.options import POLICIES, TRANSFERS, MigrationOptions
from megatron_rlhfuse.migration.rates import Rates
from megatron_rlhfuse.schedule.errors import ProblemError, show
from megatron_rlhfuse.schedule.fields import Fields, is_whole
from megatron_rlhfuse.schedule.problem import load_json

MAX_INSTANCES = 10_000
MAX_SAMPLES = 200_000
"""More are refused: a simulation would take minutes, and a typo is likelier."""

_REQUIRED = {"instances", "samples", "prompt_tokens", "lengths", "max_tokens", "max_num_seqs"}
_REQUIRED |= {"kv_capacity", "rates"}
_OPTIONAL = {"instances_per_node", "policy", "inference_instances", "transfer", "kv_between_nodes"}
_OPTIONAL |= {"batch_capacity", "samples_per_prompt", "note"}


@dataclass(frozen=True)
class RolloutCase:
    """A rollout to simulate; every inference instance shares its GPUs with a generation instance.

    Attributes:
        instances_per_node: they share memory; None puts all on one node
        prompt_tokens: of every prompt
        lengths: of the response to every sample, or what they are drawn from
        max_num_seqs: sequences an instance decodes at once; the others wait
        kv_capacity: tokens of KV cache per instance
        policy, inference_instances, transfer, kv_between_nodes, batch_capacity: as in
            `MigrationOptions`
        seed: of drawn lengths
        note: for the reader, such as where the rates come from
    """

    instances: int
    samples: int
    prompt_tokens: int
    lengths: tuple[int, ...] | LengthDistribution
    max_tokens: int
    max_num_seqs: int
    kv_capacity: int
    rates: Rates
    instances_per_node: int | None = None
    policy: str = "busiest"
    inference_instances: tuple[int, ...] = ()
    transfer: str = "auto"
    kv_between_nodes: bool = True
    batch_capacity: int | None = None
    samples_per_prompt: int = 1
    seed: int = 0
    note: str = ""

    def options(self, threshold: float) -> MigrationOptions:
        """The planner's, for one threshold."""
        return MigrationOptions(
            threshold=threshold,
            max_tokens=self.max_tokens,
            policy=self.policy,
            inference_instances=self.inference_instances,
            transfer=self.transfer,
            kv_between_nodes=self.kv_between_nodes,
            batch_capacity=self.batch_capacity,
            max_num_seqs=self.max_num_seqs,
        )

    def distribution(self) -> LengthDistribution:
        """What the planner knows about the lengths."""
        if isinstance(self.lengths, LengthDistribution):
            return self.lengths
        return LengthDistribution(self.lengths)

    def node(self, instance: int) -> str:
        return f"node{instance // (self.instances_per_node or self.instances)}"

    @classmethod
    def from_json(cls, data: Any) -> RolloutCase:
        """Raises ProblemError naming the field."""
        fields = Fields(data, "", _REQUIRED, _OPTIONAL, what="rollout")
        counts = {
            name: fields.count(name)
            for name in ("instances", "samples", "prompt_tokens", "max_tokens", "max_num_seqs")
        }
        for name, most in (("instances", MAX_INSTANCES), ("samples", MAX_SAMPLES)):
            if counts[name] > most:
                raise ProblemError(name, f"want at most {most}, got {counts[name]}")
        capacity = int(fields.number("kv_capacity", lowest=1.0))
        longest = counts["prompt_tokens"] + counts["max_tokens"]
        if capacity < longest:
            raise ProblemError("kv_capacity", f"want at least prompt and max_tokens, {longest}")
        lengths, seed = _parse_lengths(fields, counts["samples"], counts["max_tokens"])
        policy = fields.choice("policy", POLICIES, "busiest")
        return cls(
            **counts,
            lengths=lengths,
            kv_capacity=capacity,
            rates=Rates.from_json(fields.get("rates"), "rates"),
            instances_per_node=_optional_count(fields, "instances_per_node"),
            policy=policy,
            inference_instances=_parse_instances(fields, counts["instances"], policy),
            transfer=fields.choice("transfer", TRANSFERS, "auto"),
            kv_between_nodes=fields.flag("kv_between_nodes", True),
            batch_capacity=_optional_count(fields, "batch_capacity"),
            samples_per_prompt=_optional_count(fields, "samples_per_prompt") or 1,
            seed=seed,
            note=fields.text("note", ""),
        )


def load_case(path: Path | str) -> RolloutCase:
    """Raises ProblemError naming the field, OSError if there is no such file."""
    return RolloutCase.from_json(load_json(path))


def draw_lengths(
    case: RolloutCase, distribution: LengthDistribution, seed: int, draws: int
) -> list[tuple[int, ...]]:
    """Response lengths by sample, `draws` times."""
    rng = np.random.default_rng(seed)
    return [tuple(distribution.draw(rng, case.samples).tolist()) for _ in range(draws)]


def _optional_count(fields: Fields, name: str) -> int | None:
    return fields.count(name) if fields.get(name) is not None else None


def _parse_instances(fields: Fields, instances: int, policy: str) -> tuple[int, ...]:
    listed, path = fields.get("inference_instances", []), fields.path("inference_instances")
    if not isinstance(listed, list):
        raise ProblemError(path, f"want a list of instances, got {show(listed)}")
    for i, instance in enumerate(listed):
        if not is_whole(instance) or not 0 <= instance < instances:
            raise ProblemError(
                f"{path}[{i}]", f"want an instance from 0 to {instances - 1}, got {show(instance)}"
            )
    if bool(listed) != (policy == "inference"):
        raise ProblemError(path, "want it with policy inference, and only with it")
    return tuple(listed)


def _parse_lengths(
    fields: Fields, samples: int, max_tokens: int
) -> tuple[tuple[int, ...] | LengthDistribution, int]:
    """The lengths, and the seed of drawn ones."""
    listed, path = fields.get("lengths"), fields.path("lengths")
    if not isinstance(listed, list):
        own = Fields(listed, path, {"median", "sigma"}, {"seed"})
        median = own.number("median", lowest=1.0, highest=float(max_tokens))
        sigma = own.number("sigma", lowest=0.0, highest=10.0)
        seed = own.get("seed", 0)
        if not is_whole(seed) or not 0 <= seed < 2**63:
            raise ProblemError(own.path("seed"), f"want a whole number from 0, got {show(seed)}")
        return LengthDistribution.log_normal(median, sigma, max_tokens), seed
    if len(listed) != samples:
        raise ProblemError(path, f"want one per sample ({samples}), got {len(listed)}")
    for i, length in enumerate(listed):
        if not is_whole(length) or not 1 <= length <= max_tokens:
            raise ProblemError(
                f"{path}[{i}]", f"want tokens from 1 to max_tokens {max_tokens}, got {show(length)}"
            )
    return tuple(listed), 0
