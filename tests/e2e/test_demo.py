"""`make demo`'s script as a user runs it: it ends well, learns, and leaves what it promises."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from tests.e2e.jobs import ROOT, TOY

ITERATIONS = 8
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a demo; what it printed is in output.txt beside it."""
    assert TOY.is_dir(), "no toy models in build/toy: run `make toy`"
    folder = tmp_path_factory.mktemp("demo")
    environment = {
        **os.environ,
        "VENV": sys.prefix,
        "RUN_DIR": str(folder / "run"),
        "ITERATIONS": str(ITERATIONS),
    }
    output = folder / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            ["bash", str(ROOT / "scripts" / "demo.sh")],
            cwd=folder,  # the script finds the repository by itself
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            status = process.wait(TIMEOUT_S)
        finally:
            kill_tree(process)
    assert status == 0, output.read_text()
    return folder / "run"


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Ends what has not ended by itself: nothing, unless a test fails."""
    if process.poll() is None:
        tree = psutil.Process(process.pid)
        for member in [*tree.children(recursive=True), tree]:
            member.kill()


def test_the_reward_rises(demo: Path) -> None:
    lines = (demo / "metrics.jsonl").read_text().splitlines()
    rewards = [json.loads(line)["reward_mean"] for line in lines]
    assert len(rewards) == ITERATIONS
    assert statistics.fmean(rewards[-2:]) > rewards[0] + 0.4, rewards


def test_it_ends_with_a_summary(demo: Path) -> None:
    printed = (demo.parent / "output.txt").read_text()
    summary = printed[printed.rindex(f"{ITERATIONS} iterations; means over the first") :]
    for line in ("Reward ", "KL to the reference ", "generation ", "training ", "whole iteration "):
        assert f"\n  {line}" in summary
    assert f"report  {demo / 'report.html'}" in summary
    assert "Traceback" not in printed


def test_it_leaves_what_a_user_looks_at(demo: Path) -> None:
    assert "<html" in (demo / "report.html").read_text()
    plots = {plot.stem for plot in (demo / "plots").glob("*.png")}
    assert {"reward", "kl", "losses", "stages", "timeline"} <= plots
    assert json.loads((demo / "trace.json").read_text())["traceEvents"]
    assert (demo / "checkpoints" / f"iter_{ITERATIONS:07}").is_dir()
    for model in ("actor", "critic"):
        assert (demo / "models" / model / "model.safetensors").is_file()
