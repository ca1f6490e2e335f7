"""A plan, or back-to-back 1F1B where the plan is no shorter. PURE."""

from __future__ import annotations

from megatron_rlhfuse.schedule.baselines import one_f_one_b
from megatron_rlhfuse.schedule.errors import InfeasibleError
from megatron_rlhfuse.schedule.evaluate import Timeline, evaluate
from megatron_rlhfuse.schedule.problem import Problem
from megatron_rlhfuse.schedule.search import greedy

WIN = 1e-3
"""Relative: a plan must be shorter than back-to-back 1F1B by this much to be worth its memory."""


def greedy_plan(problem: Problem) -> tuple[Timeline, str]:
    """The greedy plan, or 1F1B, and which it is."""
    try:
        return or_1f1b(greedy(problem), "greedy")
    except InfeasibleError:  # one model after the other takes the least
        return evaluate(problem, one_f_one_b(problem)), "1f1b"


def or_1f1b(timeline: Timeline, source: str) -> tuple[Timeline, str]:
    """The plan and where it comes from; back-to-back 1F1B where that is as short and fits."""
    back_to_back = evaluate(timeline.problem, one_f_one_b(timeline.problem))
    shorter = timeline.makespan < back_to_back.makespan * (1 - WIN)
    if shorter or back_to_back.over_limit() is not None:
        return timeline, source
    return back_to_back, "1f1b"
