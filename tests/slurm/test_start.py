"""start.sh: a cluster comes and goes without a trace, beside others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.cluster import START, Cluster


@pytest.fixture
def second(cluster: Cluster, tmp_path: Path) -> Iterator[Cluster]:
    """A cluster of one node beside the other tests' own; stopped whatever happens."""
    folder = tmp_path / "slurm"
    cluster.command(START, "start", "--nodes", 1, "--folder", folder)
    try:
        yield Cluster(folder)
    finally:
        cluster.command(START, "stop", "--folder", folder)


def processes_of(folder: Path) -> list[str]:
    """Command lines of processes that were started with a file of the folder, or for its jobs."""
    found = []
    for process in psutil.process_iter():
        try:
            words, environment = process.cmdline(), process.environ()
        except psutil.Error:
            continue
        is_daemon = any(f"{folder}/" in word for word in words)
        if is_daemon or environment.get("SLURM_CONF") == f"{folder}/slurm.conf":
            found.append(" ".join(words))
    return found


def test_a_cluster_leaves_nothing(cluster: Cluster, second: Cluster) -> None:
    folder = second.folder
    assert second.command("sinfo", "--noheader", "--Node", "--partition=main").split()[0] == "node1"
    again = second.command(START, "start", "--nodes", 1, "--folder", folder)
    assert f"The cluster in {folder} runs already." in again
    assert "node1" in second.command(START, "status", "--folder", folder)

    # A job, and a process that it has left to nobody.
    output = folder.parent / "job.out"
    second.submit(f"--output={output}", "--wrap=setsid sleep 1234 & echo started; sleep 1234")
    second.wait_for("start of the job", lambda: output.exists() and "started" in output.read_text())
    assert any("sleep 1234" in words for words in processes_of(folder))

    stopped = cluster.command(START, "stop", "--folder", folder)
    assert "is stopped and removed" in stopped
    assert processes_of(folder) == []
    assert not folder.exists()
    assert cluster.run(START, "status", "--folder", folder).returncode == 1
    assert "No cluster in" in cluster.command(START, "stop", "--folder", folder)
    # The other one has not noticed.
    assert "node2" in cluster.command("sinfo", "--noheader", "--Node", "--states=idle")


@pytest.mark.parametrize("command", ["start", "stop"])
def test_a_folder_of_something_else_is_left_alone(
    cluster: Cluster, tmp_path: Path, command: str
) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    done = cluster.run(START, command, "--folder", tmp_path)
    assert done.returncode == 2
    assert "holds no cluster of start.sh" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


@pytest.fixture
def foreign(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[bytes]]]:
    """A folder like a real Slurm's, and a daemon that was started with its slurm.conf."""
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "slurm.conf").write_text(
        "ClusterName=real\nSlurmctldHost=localhost(127.0.0.1)\nSlurmctldPort=9\n"
        f"#StateSaveLocation={folder}/state\nStateSaveLocation={folder}/state/real\n"
    )
    words = [sys.executable, "-c", "input()", "-f", f"{folder}/slurm.conf"]
    daemon = subprocess.Popen(words, stdin=subprocess.PIPE)
    (folder / "slurmctld.pid").write_text(f"{daemon.pid}\n")
    try:
        yield folder, daemon
    finally:
        daemon.kill()
        daemon.wait()


@pytest.mark.parametrize(("command", "status"), [("start", 2), ("stop", 2), ("status", 1)])
def test_another_slurm_is_left_alone(
    cluster: Cluster, foreign: tuple[Path, subprocess.Popen[bytes]], command: str, status: int
) -> None:
    """Nothing is even asked of it."""
    folder, daemon = foreign
    before = (folder / "slurm.conf").read_text()
    done = cluster.run(START, command, "--folder", folder)
    assert (done.returncode, done.stdout) == (status, "")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert daemon.poll() is None
    assert (folder / "slurm.conf").read_text() == before
    assert {path.name for path in folder.iterdir()} == {"slurm.conf", "slurmctld.pid"}


@pytest.mark.parametrize(
    "words", [(), ("begin",), ("start", "--nodes"), ("start", "--nodes", "0"), ("start", "extra")]
)
def test_wrong_arguments_are_refused(cluster: Cluster, words: tuple[str, ...]) -> None:
    done = cluster.run(START, *words)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
