"""Plans a published instance in C++, and has the plan checked from its JSON form."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SECONDS = 1.0

PROBLEM: dict[str, Any] = {
    "devices": 8,
    "p2p": 0,
    "memory_limit": None,
    "models": [
        {
            "name": "actor 33B",
            "micro_batches": 8,
            "forward": 5,
            "backward": 10,
            "activation": 1.95,
            "pipelines": [[0, 1, 2, 3, 4, 5, 6, 7]],
        },
        {
            "name": "critic 13B",
            "micro_batches": 8,
            "forward": 2,
            "backward": 4,
            "activation": 1,
            "pipelines": [[7, 6, 5, 4, 3, 2, 1, 0]],
        },
    ],
}
"""examples/problems/published-05.json, which only a checkout has."""


def run(folder: Path) -> str:
    """A plan that is no longer than the greedy one, and shorter than one model after the other."""
    from megatron_rlhfuse.schedule.plan import make_plan, parse_plan, plan_to_json
    from megatron_rlhfuse.schedule.problem import parse_problem
    from megatron_rlhfuse.schedule.search import search

    result = search(parse_problem(PROBLEM), seconds=SECONDS, stop_at_bound=True)
    plan = make_plan(result.timeline, greedy=result.greedy, seconds=result.seconds)
    # Reading it times every subtask anew, in Python, and compares.
    plan = parse_plan(json.loads(json.dumps(plan_to_json(plan))))
    makespan = plan.timeline.makespan
    if makespan > plan.greedy or makespan >= plan.serial_1f1b:
        raise RuntimeError(
            f"the search found {makespan:g}; greedy {plan.greedy:g}, serial {plan.serial_1f1b:g}"
        )
    at = "at" if plan.at_bound else "above"
    return f"a published instance planned {at} its bound of {plan.lower_bound:g}, and validated"
