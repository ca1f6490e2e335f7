"""Pages name metrics that there are, and figures that stand where they were measured."""

from __future__ import annotations

import re

import pytest

from megatron_rlhfuse.observe.metrics import METRICS, STAGE_SECONDS
from tests.docs.documents import ROOT

OTHER = {"memory_limit", "fused_speedup"}
"""Words of the same form that are something else."""


@pytest.mark.parametrize("page", ["checkpoints", "first-run", "troubleshooting", "tuning"])
def test_metrics_exist(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([a-z]+(?:_[a-z0-9]+)+)`", text))
    assert named & set(METRICS), "the page names none"
    assert named <= set(METRICS) | OTHER


def test_tuning_begins_with_the_time_of_every_stage() -> None:
    text = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    first = text.partition("1. **See where the time goes**")[2].partition("\n2.")[0]
    assert set(re.findall(r"`(\w+_s)`", first)) == {*STAGE_SECONDS, "iteration_s"}


def test_figures_of_the_questions_are_in_the_readme_or_the_planners_guide() -> None:
    questions = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    section = questions.partition("## What was measured?")[2].partition("\n## ")[0]
    figures = set(re.findall(r"\b\d\.\d+\b", section))
    assert len(figures) > 6
    measured = "".join(
        (ROOT / name).read_text("utf-8") for name in ("README.md", "docs/planner.md")
    )
    assert not {figure for figure in figures if not re.search(rf"\b{figure}\b", measured)}
