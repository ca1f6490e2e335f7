"""All shell scripts of the repository: they parse, and shellcheck finds nothing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, Cluster

NOT_OURS = {".git", ".venv", "build", "runs", "node_modules", "site"}


def shell_scripts() -> list[Path]:
    found = []
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [name for name in folders if name not in NOT_OURS]
        for path in (Path(folder, name) for name in names):
            if not path.is_file() or path.suffix in (".py", ".md", ".json"):
                continue
            with path.open("rb") as file:
                first = file.readline(80)
            if path.suffix in (".sh", ".sbatch") or (first[:2] == b"#!" and b"bash" in first):
                found.append(path)
    return sorted(found)


def test_they_are_found() -> None:
    names = {str(path.relative_to(ROOT)) for path in shell_scripts()}
    assert {"scripts/install.sh", "scripts/slurm/train.sbatch", "tests/slurm/start.sh"} <= names


@pytest.mark.parametrize("path", shell_scripts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_bash_parses(path: Path) -> None:
    done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_shellcheck_finds_nothing(cluster: Cluster) -> None:
    """The cluster's packages bring it."""
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck here (Debian: apt-get install shellcheck)")
    words = ["shellcheck", "--external-sources", *map(str, shell_scripts())]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
