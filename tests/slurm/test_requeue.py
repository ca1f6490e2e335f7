"""When train.sbatch puts a job back into the queue, and when it does not."""

from __future__ import annotations

from pathlib import Path

import psutil

from tests.slurm.cluster import Cluster
from tests.slurm.stand_in_job import StandInJob

DONE = ("COMPLETED", "0:0")


def test_the_time_limit(cluster: Cluster, tmp_path: Path) -> None:
    """A job that saves when Slurm tells it to; beside it one that hears nothing.

    Slurm looks at the limits of jobs every 30 seconds; the shortest there is is a minute.
    """
    hears = StandInJob(
        cluster,
        tmp_path / "hears",
        "--time=1 --signal=B:USR1@30",
        "--train-iters=35 --seconds=1",
        MAX_REQUEUES="0",
    )
    deaf = StandInJob(cluster, tmp_path / "deaf", "--time=10", "--stand-in=hang", MAX_REQUEUES="0")
    deaf.wait_until_it_says("stand-in: checked")
    cluster.command("scontrol", "update", f"JobId={deaf.number}", "EndTime=now+1")

    assert deaf.end()[0] == "TIMEOUT"
    assert deaf.restarts == 0
    assert "the time limit came before the job had stopped; 1 start(s) in a row" in deaf.output

    assert hears.end() == DONE, hears.output
    assert hears.restarts >= 1
    assert hears.iterations() == list(range(1, 36)), "some lost, or made twice"
    assert "signal USR1: the job is asked to save and stop" in hears.output
    assert "train.sbatch: stopped: back into the queue" in hears.output
    assert "failed" not in hears.output
    assert not (hears.run / "stop").exists()


def test_a_job_that_always_fails_is_given_up(cluster: Cluster, tmp_path: Path) -> None:
    settings = {"MAX_RESTARTS": "1", "MAX_REQUEUES": "1"}
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--stand-in=fail", **settings)
    state, status = job.end()
    assert (state, status == "0:0") == ("FAILED", False)
    assert job.restarts == 1
    assert job.output.count("train.sbatch: failed with status") == 2
    assert "2 start(s) in a row have brought no new checkpoint (MAX_REQUEUES is 1)" in job.output
    # Each time torchrun has tried it once more by itself.
    assert len(list((job.run / "torchrun").glob("*/node1/*/attempt_1"))) == 2


def test_a_stop_by_hand_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--train-iters=500 --seconds=1")
    job.wait_until_it_says("stand-in: iteration 1")
    (job.run / "stop").touch()
    assert job.end() == DONE, job.output
    assert job.restarts == 0
    assert (job.run / "stopped.json").exists()


def test_scancel_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--train-iters=500 --seconds=1")
    job.wait_until_it_says("stand-in: iteration 1")
    cluster.command("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    assert job.restarts == 0
    assert "back into the queue" not in job.output
    assert not (job.run / "stop").exists()


def test_a_wrong_flag_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    """Submitted without the check before: the job makes it itself."""
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--misspelt")
    assert job.end() == ("FAILED", "2:0")
    assert job.restarts == 0
    assert "unrecognized arguments: --misspelt" in job.output
    assert "torch" not in job.output


def test_preemption(cluster: Cluster, tmp_path: Path) -> None:
    """A job of a better partition takes the nodes: this one saves, leaves, and comes back."""
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--train-iters=12 --seconds=1")
    job.wait_until_it_says("stand-in: iteration 2")
    urgent = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out"),
        "--wrap=true",
    )
    assert cluster.end_of(urgent, tmp_path / "urgent.out")["JobState"] == "COMPLETED"
    assert job.restarts == 1
    assert "train.sbatch: stopped: back into the queue" in job.output
    assert job.end() == DONE, job.output
    assert job.iterations() == list(range(1, 13))


def test_a_node_that_dies(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm itself puts the job back, and nothing of the script is asked."""
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--train-iters=10 --seconds=1")
    job.wait_until_it_says("stand-in: iteration 2")
    daemon = psutil.Process(int((cluster.folder / "node2.pid").read_text()))
    steps = [p for p in psutil.process_iter() if p.name() == "slurmstepd" and p.ppid() == 1]
    of_node = [p for p in steps if f"{cluster.folder}/spool-node2" in p.cwd()]
    try:
        for process in [daemon, *of_node, *cluster.processes(job.number, node=1)]:
            process.kill()
        cluster.command("scontrol", "update", "NodeName=node2", "State=DOWN", "Reason=lost")
        cluster.wait_for("requeue", lambda: job.restarts == 1)
    finally:
        cluster.command("slurmd", "-f", cluster.folder / "slurm.conf", "-N", "node2")
        idle = ("sinfo", "--noheader", "--nodes=node2", "--states=idle")
        cluster.wait_for("return of node2", lambda: "node2" in cluster.command(*idle))
    assert job.end() == DONE, job.output
    # It is killed at once: the iteration it was in is made again.
    again = job.iterations()
    assert sorted(set(again)) == list(range(1, 11))
    assert len((job.run / "slurm-starts.txt").read_text().splitlines()) == 2
