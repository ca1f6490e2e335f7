"""`rlhfuse report` on a run made by the run's own writers."""

from __future__ import annotations

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image

from megatron_rlhfuse.cli import main
from megatron_rlhfuse.observe import plots, style, summary
from megatron_rlhfuse.observe.metrics import MetricsWriter
from megatron_rlhfuse.observe.report import write_report
from megatron_rlhfuse.observe.timeline import last_iteration
from megatron_rlhfuse.observe.trace import Tracer, merge

CURVES = {"reward", "kl", "losses", "clipping", "lengths", "throughput", "logprob_difference"}


def values_of(iteration: int, iterations: int, noise: random.Random, critic: bool) -> dict:
    """Plausible metrics of one iteration: the reward saturates, lengths are log-normal."""
    done = iteration / iterations
    mean_length = 46 + 14 * done + noise.gauss(0, 2)
    generation, inference, training = 4.1 + noise.random(), 0.9 + 0.1 * noise.random(), 5.2
    sync, checkpoint = 0.3, 0.8 if iteration % 5 == 0 else 0.0
    total = generation + inference + training + sync + checkpoint + 0.15
    values = {
        "reward_mean": 2.2 * (1 - math.exp(-3 * done)) - 0.6 + noise.gauss(0, 0.08),
        "reward_std": 0.7 - 0.3 * done,
        "score_mean": 2.4 * (1 - math.exp(-3 * done)) - 0.6 + noise.gauss(0, 0.08),
        "kl": 0.09 * done**0.7 + abs(noise.gauss(0, 0.004)),
        "policy_loss": -0.02 * (1 - done) + noise.gauss(0, 0.006),
        "entropy": 3.1 - 0.9 * done + noise.gauss(0, 0.03),
        "clip_fraction": 0.05 + 0.1 * done + abs(noise.gauss(0, 0.02)),
        "response_length_mean": mean_length,
        "response_length_median": mean_length * 0.62,
        "response_length_p99": mean_length * 3.9 + noise.gauss(0, 12),
        "generation_s": generation,
        "inference_s": inference,
        "training_s": training,
        "weight_sync_s": sync,
        "checkpoint_s": checkpoint,
        "iteration_s": total,
        "samples_per_s": 64 / total,
        "tokens_per_s": 64 * mean_length / total,
        "logprob_difference_mean": 2e-6 * (1 + noise.random()),
        "logprob_difference_max": 4e-5 * (1 + noise.random()),
        "fusion": "none",
    }
    if critic:
        values["value_loss"] = 0.8 * math.exp(-4 * done) + 0.1 + abs(noise.gauss(0, 0.02))
        values["value_clip_fraction"] = 0.12 * math.exp(-2 * done)
    return values


def trace_iteration(tracers: list[Tracer], iteration: int, begin: float) -> None:
    """The spans of one iteration on every rank, with one engine each and a training pipeline."""
    stages, micro_batches = len(tracers), 4
    forward, backward = 0.8 / (micro_batches + stages - 1), 1.5 / (micro_batches + stages - 1)
    for rank, tracer in enumerate(tracers):
        engine_end = begin + (2.2 if rank % 2 else 4.1)
        tracer.add("wait for engines", begin, begin + 4.2, "main", "wait")
        tracer.add("decode", begin + 0.05, engine_end, f"engine {rank}", "generation")
        for sample in range(6):
            finish = begin + 0.1 + (engine_end - begin - 0.1) * (sample + 1) / 6
            tracer.add(f"sample {sample}", begin + 0.1, finish, f"engine {rank} samples", "sample")
        tracer.add("inference", begin + 4.2, begin + 5.0, "main", "inference")
        tracer.add("reference", begin + 4.25, begin + 4.6, "main", "inference")
        tracer.add("critic", begin + 4.62, begin + 4.95, "main", "inference")
        tracer.add("training", begin + 5.0, begin + 9.9, "main", "training")
        for model, model_begin in (("actor", begin + 5.05), ("critic", begin + 7.4)):
            for micro_batch in range(micro_batches):
                at = model_begin + (rank + micro_batch) * forward
                category = f"{model}_training"
                tracer.add(f"F{micro_batch}", at, at + forward, "main", category)
                at = model_begin + (micro_batches + stages - 1) * forward
                at += (stages - 1 - rank + micro_batch) * backward
                tracer.add(f"B{micro_batch}", at, at + backward, "main", category)
        tracer.add("weights", begin + 9.9, begin + 10.2, "main", "weight_sync")
        tracer.add("iteration", begin, begin + 10.2, "main", "iteration", iteration=iteration)
        tracer.counter("unfinished", begin, 6, f"engine {rank}")
        tracer.flush()


def make_run(folder: Path, iterations: int = 12, ranks: int = 2, critic: bool = True) -> Path:
    noise = random.Random(0)
    with MetricsWriter(folder) as writer:
        for iteration in range(1, iterations + 1):
            writer.write(iteration, values_of(iteration, iterations, noise, critic))
    tracers = [Tracer(folder, rank) for rank in range(ranks)]
    for iteration in range(1, min(iterations, 3) + 1):
        trace_iteration(tracers, iteration, 1.7e9 + 10.3 * iteration)
    return folder


def check_balanced(html: str) -> None:
    """Every element is closed, in order."""
    opened: list[str] = []

    class Parser(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img"):
                opened.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert opened.pop() == tag

    parser = Parser()
    parser.feed(html)
    parser.close()
    assert opened == []


def ink(path: Path) -> float:
    """Share of the pixels of a picture that are not white: 0 for an empty one."""
    return float((np.asarray(Image.open(path).convert("L")) < 250).mean())


def test_report_draws_everything_into_one_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "toy")
    (run / "args.json").write_text(
        json.dumps({"ppo_clip": 0.2, "num_layers": 4, "actor_model": "<toy> & co", "unset": None})
    )
    assert main(["report", str(run)]) == 0
    printed = capsys.readouterr().out
    assert str(run / "report.html") in printed and str(run / "plots") in printed
    assert re.search(r"Reward +[-\d.]+ -> [-\d.]+", printed)
    assert re.search(r"generation +[\d.]+ +\d+%", printed)
    drawn = {path.stem for path in (run / "plots").iterdir()}
    assert drawn == CURVES | {"stages", "timeline"}
    assert all(ink(path) > 0.01 for path in (run / "plots").iterdir())
    html = (run / "report.html").read_text()
    assert html.count("data:image/png;base64,") == len(drawn)
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)|https?:|@import|url\(", html)
    assert "<title>Run toy</title>" in html
    assert "&lt;toy&gt; &amp; co" in html
    assert html.index("ppo_clip") < html.index("1 other settings") < html.index("num_layers")
    assert "unset" not in html
    check_balanced(html)


def make_small_run(folder: Path) -> Path:
    """A run with one curve: the report of it takes a third of a second."""
    with MetricsWriter(folder) as writer:
        writer.write(1, {"kl": 0.5})
    tracer = Tracer(folder, 0)
    tracer.add("iteration", 1.7e9, 1.7e9 + 2, "main", "iteration", iteration=1)
    tracer.add("training", 1.7e9, 1.7e9 + 1, "main", "training")
    tracer.flush()
    return folder


def test_report_goes_where_it_is_asked_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_small_run(tmp_path / "toy")
    for bad in (tmp_path, tmp_path / "missing" / "page.html"):
        with pytest.raises(SystemExit) as ended:
            main(["report", str(run), "-o", str(bad)])
        assert ended.value.code == 2
        assert str(bad) in capsys.readouterr().err
    assert main(["report", str(run), "-o", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").exists()
    assert not (run / "report.html").exists()


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"reward_mean": 0.5, "generation_s": 2.0, "value_loss": None})
    html = write_report(tmp_path).read_text()
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {"reward", "stages"}
    assert "no trace" in html
    assert "Value loss" not in html
    chart = next(chart for chart in plots.CHARTS if chart.name == "losses")
    with matplotlib.rc_context(style.RC):
        figure = plots.draw_chart(chart, [{"iteration": 1, "policy_loss": 0.1}])
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Policy loss"]


def test_values_that_are_not_finite_are_gaps_and_are_told(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for iteration, loss in enumerate([0.1, math.nan, 0.3], start=1):
            writer.write(iteration, {"policy_loss": loss, "logprob_difference_mean": 0.0})
    assert (
        "policy_loss was not a finite number in iteration 2" in write_report(tmp_path).read_text()
    )
    assert (tmp_path / "plots" / "logprob_difference.png").exists()  # zero on a log axis


def test_band_needs_line_and_deviation() -> None:
    chart = next(chart for chart in plots.CHARTS if chart.name == "reward")

    def labels(**values: float) -> list[str]:
        figure = plots.draw_chart(chart, [{"iteration": i, **values} for i in (1, 2)])
        assert figure is not None
        return figure.axes[0].get_legend_handles_labels()[1]

    assert len(labels(reward_mean=1.0, reward_std=0.5)) == 2
    assert labels(reward_mean=1.0) == ["reward"]
    assert labels(score_mean=1.0, reward_std=0.5) == ["score, before KL"]


def test_logarithmic_axis_leaves_zeros_out() -> None:
    chart = next(chart for chart in plots.CHARTS if chart.name == "logprob_difference")
    values = [0.0, 2e-6, 3e-5]
    records = [{"iteration": i, "logprob_difference_mean": v} for i, v in enumerate(values)]
    figure = plots.draw_chart(chart, records)
    assert figure is not None
    assert figure.axes[0].get_ylim() == pytest.approx((1e-6, 1e-4))
    only_zeros = plots.draw_chart(chart, records[:1])
    assert only_zeros is not None
    assert only_zeros.axes[0].get_yscale() == "linear"


def test_trace_parts_are_merged_when_missing_or_old(tmp_path: Path) -> None:
    run = make_small_run(tmp_path / "toy")
    assert not (run / "trace.json").exists()
    write_report(run)
    first = (run / "trace.json").read_bytes()
    tracer = Tracer(run, rank=0)
    tracer.add("late", 1.8e9, 1.8e9 + 1, track="main", category="iteration", iteration=9)
    tracer.flush()
    write_report(run)
    assert b'"late"' not in first
    assert b'"late"' in (run / "trace.json").read_bytes()


def test_timeline_is_of_the_last_iteration_that_every_rank_finished(tmp_path: Path) -> None:
    tracers = [Tracer(tmp_path, rank) for rank in range(2)]
    for iteration in (1, 2):
        trace_iteration(tracers, iteration, 1.7e9 + 11 * iteration)
    trace_iteration(tracers[:1], 3, 1.7e9 + 33)  # killed before rank 1 could flush
    timeline = last_iteration(json.loads(merge(tmp_path).read_text())["traceEvents"])
    assert timeline is not None
    assert timeline.iteration == 2
    assert timeline.seconds == pytest.approx(10.2, abs=1e-5)
    assert [row.label for row in timeline.rows] == [
        *("rank 0", "engine 0", "engine 0 samples"),
        *("rank 1", "engine 1", "engine 1 samples"),
    ]
    rank, engine, samples = timeline.rows[:3]
    # inference 0.35 + 0.33, actor and critic training 2.3 * 4 / 5 each, weights 0.3
    assert rank.busy_seconds() == pytest.approx(0.68 + 2 * 2.3 * 4 / 5 + 0.3, abs=1e-4)
    assert engine.busy_seconds() == pytest.approx(4.05, abs=1e-4)
    assert [count for _, count in samples.running] == [6, 5, 4, 3, 2, 1, 0]


def test_iteration_that_a_resumed_run_did_again_is_the_one_drawn(tmp_path: Path) -> None:
    tracers = [Tracer(tmp_path, 0)]
    for attempt, iteration in enumerate((1, 2, 3, 2)):
        start = 1.7e9 + 100 * attempt
        tracers[0].add("training", start, start + 9, "main", "training")
        tracers[0].add(
            "iteration", start, start + 10 + attempt, "main", "iteration", iteration=iteration
        )
    tracers[0].flush()
    timeline = last_iteration(json.loads(merge(tmp_path).read_text())["traceEvents"])
    assert timeline is not None
    assert (timeline.iteration, round(timeline.seconds)) == (2, 13)


def test_iteration_that_saved_is_not_drawn_where_another_can_be(tmp_path: Path) -> None:
    tracer = Tracer(tmp_path, 0)
    for iteration in (1, 2):
        start = 1.7e9 + 100 * iteration
        tracer.add("training", start, start + 2, "main", "training")
        tracer.add("iteration", start, start + 9, "main", "iteration", iteration=iteration)
    tracer.add("checkpoint", start + 3, start + 8, "main", "checkpoint")
    tracer.flush()
    timeline = last_iteration(json.loads(merge(tmp_path).read_text())["traceEvents"])
    assert timeline is not None and timeline.iteration == 1


@pytest.mark.parametrize(
    ("file", "content", "culprit"),
    [
        (None, "", "no such folder"),
        ("other.txt", "", "metrics.jsonl: no such file"),
        ("metrics.jsonl", "", "metrics.jsonl: empty"),
        ("metrics.jsonl", '{"iteration"', "metrics.jsonl: empty"),
        ("metrics.jsonl", '{"iteration": 1}\n{"it\n', "metrics.jsonl:2: "),
        ("args.json", "{", "args.json: not JSON"),
        ("trace.json", "{}", "trace.json: not a trace of this project: no field 'traceEvents'"),
        ("trace.json", "{", "trace.json: "),
        ("trace.json", '{"traceEvents": [{}]}', "trace.json: not a trace of this project"),
        ("trace-rank0.jsonl", "{\n", "trace-rank0.jsonl:1: "),
        ("trace-rank0.jsonl", '{"track": "main"}\n', "trace-rank*.jsonl: not a trace of this"),
        ("metrics.jsonl", '{"iteration": 1, "kl": "low"}\n', "metrics.jsonl:1: field 'kl'"),
        ("plots", "a file in the way", "plots: "),
    ],
)
def test_bad_run_is_one_line_that_names_the_path(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    file: str | None,
    content: str,
    culprit: str,
) -> None:
    run = tmp_path / "run"
    if file is not None:
        run.mkdir()
        if file not in ("metrics.jsonl", "other.txt"):
            (run / "metrics.jsonl").write_text('{"iteration": 1, "kl": 0.1}\n')
        (run / file).write_text(content)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(run)])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(run) in line
    assert culprit in line


def test_summary_compares_both_ends_of_the_run() -> None:
    records = [
        {
            "iteration": i,
            "reward_mean": float(i),
            "generation_s": 2.0 + (i == 9),
            "iteration_s": 4.0,
        }
        for i in range(1, 16)
    ]
    assert summary.window(records) == 3
    (change,) = summary.changes(records)
    assert (change.start, change.end) == (2.0, 14.0)
    assert [tuple(stage) for stage in summary.stage_times(records)] == [
        ("generation", 2.0, 0.5),
        ("whole iteration", 4.0, 1.0),
    ]


def test_running_mean_is_the_mean_of_the_neighbours() -> None:
    values = np.array([1.0, 2.0, math.nan, 4.0, 5.0])
    expected = [1.5, 1.5, 3.0, 4.5, 4.5]
    assert plots.running_mean(values, 3) == pytest.approx(expected)
