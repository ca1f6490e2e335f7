"""The progress of a run: a bar on a terminal, plain lines elsewhere, nothing on other ranks."""

from __future__ import annotations

import io

from megatron_rlhfuse.observe.progress import Progress, summary

VALUES = {"reward_mean": 1.25, "kl": 0.0125, "generation_s": 3.21, "iteration_s": 8.0}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_summary_leaves_out_what_was_not_measured() -> None:
    assert summary(VALUES) == "reward 1.25  kl 0.0125  generation 3.2 s  total 8.0 s"
    assert summary({**VALUES, "kl": None, "fusion": "none"}) == (
        "reward 1.25  generation 3.2 s  total 8.0 s"
    )


def test_plain_line_per_iteration_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Progress(total=10, stream=stream) as progress:
        progress.stage("generation")
        progress.update(1, VALUES)
        progress.update(10, VALUES)
    assert stream.getvalue().splitlines() == [
        f"iteration  1/10  {summary(VALUES)}",
        f"iteration 10/10  {summary(VALUES)}",
    ]


def test_bar_on_a_terminal_shows_stage_and_numbers() -> None:
    stream = Terminal()
    with Progress(total=10, done=4, stream=stream) as progress:
        progress.stage("generation")
        assert "iteration 4/10" in stream.getvalue()
        assert "generation ..." in stream.getvalue()
        progress.update(5, VALUES)
    shown = stream.getvalue().split("\r")[-1]
    assert "iteration 5/10" in shown
    assert summary(VALUES) in shown


def test_other_ranks_show_nothing() -> None:
    stream = Terminal()
    with Progress(total=10, shown=False, stream=stream) as progress:
        progress.stage("generation")
        progress.update(1, VALUES)
    assert stream.getvalue() == ""
