"""When train.sbatch puts a job back into the queue, and when it does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import psutil

from tests.slurm.cluster import ENDED, Cluster
from tests.slurm.stand_in_job import StandInJob, venv_with_doctor

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
    assert "by hand: the same command goes on from there" in job.output


def test_scancel_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--train-iters=500 --seconds=1")
    job.wait_until_it_says("stand-in: iteration 1")
    cluster.command("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    assert job.restarts == 0
    assert "back into the queue" not in job.output
    assert not (job.run / "stop").exists()


def test_scancel_is_the_end_where_the_job_cannot_be_looked_up(
    cluster: Cluster, tmp_path: Path
) -> None:
    """A controller that is busy may fail to answer that, and yet take a requeue."""
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(
        '#!/bin/sh\n[ "$1 $2 $3" != "--oneliner show job" ] || exit 1\n'
        f'exec {shutil.which("scontrol")} "$@"\n'
    )
    scontrol.chmod(0o755)
    path = f"{scontrol.parent}:{os.environ['PATH']}"
    job = StandInJob(cluster, tmp_path, "", "--train-iters=500 --seconds=1", PATH=path)
    job.wait_until_it_says("stand-in: iteration 1")
    cluster.command("scancel", job.number)
    assert job.end()[0] == "CANCELLED"
    assert job.restarts == 0
    assert "back into the queue" not in job.output


def test_a_stop_that_does_not_show(cluster: Cluster, tmp_path: Path) -> None:
    """The batch host may not see stopped.json yet, which another node has written."""
    trainer = "--stand-in=unseen --await-stop=1 --train-iters=3"
    job = StandInJob(cluster, tmp_path, "", trainer)
    job.wait_until_it_says("stand-in: RANK=0")
    job.ask_to_stop()
    assert job.end() == DONE, job.output
    assert job.restarts == 1
    assert job.iterations() == [1, 2, 3]


def test_a_stop_in_the_last_iteration(cluster: Cluster, tmp_path: Path) -> None:
    """The job is done; there is nothing to come back for."""
    job = StandInJob(cluster, tmp_path, "", "--await-stop=2 --train-iters 2")
    job.wait_until_it_says("stand-in: iteration 1")
    job.ask_to_stop()
    assert job.end() == DONE, job.output
    assert job.restarts == 0
    assert "the job is asked to save and stop" in job.output
    assert "train.sbatch: finished at iteration 2" in job.output
    assert not (job.run / "stop").exists()


def test_a_stop_before_the_ranks_have_begun(cluster: Cluster, tmp_path: Path) -> None:
    """Nothing was trained: it counts as any start without a new checkpoint."""
    looking, go = tmp_path / "looking", tmp_path / "go"
    wait = f"touch {looking}; while [ ! -e {go} ]; do sleep 0.1; done; exit 0"
    settings = {"DOCTOR": "yes", "MAX_REQUEUES": "0"}
    job = StandInJob(cluster, tmp_path, "", "", venv_with_doctor(tmp_path, wait), **settings)
    cluster.wait_for("doctor", looking.exists)
    job.ask_to_stop()
    job.wait_until_it_says("the job is asked to save and stop")
    go.touch()
    assert job.end()[0] == "FAILED", job.output
    assert job.restarts == 1
    assert "2 starts in a row have brought no new checkpoint (MAX_REQUEUES is 0)" in job.output
    assert job.iterations() == []


def test_a_run_folder_that_takes_nothing_more(cluster: Cluster, tmp_path: Path) -> None:
    """That the stop cannot be noted does not keep the job from going back."""
    job = StandInJob(cluster, tmp_path, "", "--await-stop=1 --train-iters=3")
    job.wait_until_it_says("stand-in: RANK=0")
    starts = job.run / "slurm-starts.txt"
    starts.unlink()
    starts.mkdir()  # root may write to any file
    job.ask_to_stop()

    def is_over() -> bool:
        return job.restarts > 0 or cluster.job(job.number)["JobState"] in ENDED

    cluster.wait_for("requeue", is_over)
    assert job.restarts == 1, job.output
    assert f"train.sbatch: cannot write to {starts}: is the disk full?" in job.output


def test_a_wrong_flag_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    """Submitted without the check before: the job makes it itself."""
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--misspelt")
    assert job.end() == ("FAILED", "2:0")
    assert job.restarts == 0
    assert "unrecognized arguments: --misspelt" in job.output
    assert "torch" not in job.output


def test_a_job_that_its_ranks_refuse_is_the_end(cluster: Cluster, tmp_path: Path) -> None:
    """For example flags that do not fit the checkpoint that they go on from."""
    job = StandInJob(cluster, tmp_path, "--nodes=2", "--stand-in=refuse")
    assert job.end() == ("FAILED", "2:0")
    assert job.restarts == 0
    assert "refused as above: not put back into the queue" in job.output


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
