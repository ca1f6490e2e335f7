"""One cluster of two nodes for all tests of this folder, and an undisturbed run to compare with."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.jobs import end
from tests.slurm.cluster import CANNOT_HAVE_SLURM, START, Cluster, clean_environment
from tests.slurm.toy_job import undisturbed


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster") / "slurm"
    words = [str(START), "start", "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, env=clean_environment())
    if done.returncode == CANNOT_HAVE_SLURM:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    try:
        yield Cluster(folder)
    finally:
        subprocess.run([str(START), "stop", "--folder", str(folder)], check=True)
        assert not folder.exists()


@pytest.fixture(autouse=True)
def no_jobs_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test that fails leaves no job that would take the nodes from the next one."""
    yield
    if "cluster" in request.fixturenames:
        running: Cluster = request.getfixturevalue("cluster")
        for number in running.queued():
            running.command("scancel", number)
        running.wait_for("end of what a test has left", lambda: not running.queued())


@pytest.fixture(scope="session")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy job under a plain torchrun, without Slurm: the folder of its run.

    Asks for the cluster first: where there can be none, nothing is to be compared.
    """
    run = tmp_path_factory.mktemp("reference")
    end(undisturbed(run))
    return run
