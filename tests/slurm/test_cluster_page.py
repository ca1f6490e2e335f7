"""docs/cluster.md: the commands of its part for one machine, from top to bottom as they stand."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.docs.documents import blocks
from tests.e2e.runs import assert_equal_weights
from tests.slurm.cluster import ROOT, Cluster, clean_environment

PAGE = "docs/cluster.md"

# `make test` has done these before any test runs; anew they might change what others test with.
BEFORE = ("make install\n", "make toy\n")


def commands(folder: Path) -> str:
    """All of the `bash` blocks, with what they write in a folder of the test's own."""
    text = "".join(block.text for block in blocks(PAGE) if block.language == "bash")
    for line in BEFORE:
        assert text.count(line) == 1
        text = text.replace(line, "")
    text = text.replace("$PWD/build/slurm", "build/slurm")
    text = re.sub(r"\bbuild/slurm\b", f"{folder}/slurm", text)
    return re.sub(r"\bruns/nodes\b", f"{folder}/nodes", text)


def test_the_commands_for_one_machine(cluster: Cluster, reference: Path, tmp_path: Path) -> None:
    """They end well, beside another cluster, and learn what the undisturbed run learns."""
    text = commands(tmp_path)
    try:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=ROOT,
            env=clean_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=500,
        )
    finally:
        stop = f"tests/slurm/start.sh stop --folder {tmp_path}/slurm"
        subprocess.run(stop.split(), cwd=ROOT, check=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "train.sbatch: finished at iteration 5" in done.stdout
    assert "<html" in (tmp_path / "nodes" / "report.html").read_text()
    assert "is stopped and removed" in done.stdout
    assert not (tmp_path / "slurm").exists()
    assert_equal_weights(tmp_path / "nodes", reference)
