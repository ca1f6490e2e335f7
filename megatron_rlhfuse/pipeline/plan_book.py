"""The plans of a fused pipeline: one for each pair of numbers of micro-batches that came up.

Where a micro-batch is limited in tokens, its number follows the lengths of samples and differs from
step to step, but what one costs hardly does. So a new pair starts from what another one has
measured, with a plan of its own from its first step on; what its micro-batches hold is measured in
that step. Plans are kept as long as the pipeline: they are small beside what they plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from megatron_rlhfuse.pipeline.autoplan import AutoPlan, PlanOptions
from megatron_rlhfuse.pipeline.devices import DeviceMap
from megatron_rlhfuse.pipeline.profile import Costs


class PlanBook:
    """COLLECTIVE calls are marked; every rank holds the same plans in the same states."""

    def __init__(self, devices: DeviceMap, options: PlanOptions) -> None:
        self._devices = devices
        self._options = options
        self._plans: dict[tuple[int, ...], AutoPlan] = {}
        self._tokens: dict[tuple[int, ...], tuple[int, ...]] = {}
        """Of the largest micro-batches that a plan's memory is known for."""

    def plan(
        self,
        counts: tuple[int, ...],
        tokens: tuple[int, ...],
        key: Callable[[], Mapping[str, Any]],
        measure_transfer: Callable[[], float],
    ) -> AutoPlan:
        """The plan for these numbers of micro-batches, ready for a step. COLLECTIVE.

        tokens: of each model's largest micro-batch, as far as it is known
        `key` and `measure_transfer` are those of AutoPlan, called in the first step of a pair.
        """
        if counts not in self._plans:
            self._plans[counts] = AutoPlan(
                self._devices,
                counts,
                self._options,
                key(),
                measure_transfer,
                costs=self._costs(tokens),
                may_search=self._none_is_searching,
            )
            self._tokens[counts] = tokens
        for other, plan in self._plans.items():
            if other != counts:
                plan.take_up_search()  # its pair may never come up again, and others wait for it
        self._plans[counts].before_step()
        return self._plans[counts]

    def close(self) -> None:
        """Ends searches that are still going on."""
        for plan in self._plans.values():
            plan.close()

    def _costs(self, tokens: tuple[int, ...]) -> Costs | None:
        """By the plan that has measured most; the memory of no fewer tokens than are asked for."""
        if not self._plans:
            return None
        counts, plan = max(self._plans.items(), key=lambda item: item[1].measured_steps)
        if plan.costs is None:
            return None
        return tuple(
            replace(cost, activation=cost.activation * max(1.0, asked / known))
            for cost, asked, known in zip(plan.costs, tokens, self._tokens[counts], strict=True)
        )

    def _none_is_searching(self) -> bool:
        """Searches take cores from training: one after the other."""
        return not any(plan.is_searching for plan in self._plans.values())
