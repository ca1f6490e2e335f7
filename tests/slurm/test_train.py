"""train.sbatch with the trainer itself: whatever happens to a job, it learns the same weights."""

from __future__ import annotations

import re
from pathlib import Path

from tests.e2e.runs import assert_equal_weights, metrics
from tests.slurm.cluster import SCRIPTS, Cluster, Fields, read
from tests.slurm.toy_job import ITERATIONS, flags, has_checkpoint, submit


def assert_complete(cluster: Cluster, run: Path, number: int, reference: Path) -> Fields:
    """The job has ended well, and has left what the undisturbed run has left."""
    job = cluster.end_of(number, run / "job.out")
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), read(run / "job.out")
    assert_equal_weights(run, reference)
    assert not (run / "stop").exists()
    assert not (run / "stopped.json").exists()
    cluster.wait_for("end of its processes", lambda: not cluster.processes(number))
    return job


def test_a_node_that_loses_its_processes(cluster: Cluster, reference: Path, tmp_path: Path) -> None:
    """As when the kernel has no memory left: everything that the job runs there is gone."""
    number = submit(cluster, tmp_path)
    cluster.wait_for("checkpoint", lambda: has_checkpoint(tmp_path))
    victims = cluster.processes(number, node=1)
    assert any("pretrain_rlhf.py" in " ".join(process.cmdline()) for process in victims)
    for process in victims:
        process.kill()
    job = assert_complete(cluster, tmp_path, number, reference)
    assert job["Restarts"] == "1"
    output = read(tmp_path / "job.out")
    assert "back into the queue, to go on from iteration " in output
    # It went on from a checkpoint, not from the start.
    first, second = (
        line.split() for line in (tmp_path / "slurm-starts.txt").read_text().splitlines()
    )
    assert (first[2], int(second[2]) >= 1) == ("0", True)


def test_a_signal_and_a_report_after_the_end(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    """The job saves what it has and goes on later; a job that waits for it waits for all of it."""
    number = submit(cluster, tmp_path)
    report = cluster.submit(
        f"--dependency=afterany:{number}",
        f"--output={tmp_path}/report.out",
        SCRIPTS / "report.sbatch",
        tmp_path,
    )
    cluster.wait_for("checkpoint", lambda: has_checkpoint(tmp_path))
    cluster.command("scancel", "--signal=USR1", "--batch", number)

    job = assert_complete(cluster, tmp_path, number, reference)
    assert job["Restarts"] == "1"
    output = read(tmp_path / "job.out")
    told = rf"stopped by a file named stop after iteration (\d+) of {ITERATIONS}\b"
    stops = re.findall(told, output)
    assert len(stops) == 1, output
    starts = (tmp_path / "slurm-starts.txt").read_text().splitlines()
    assert starts == [f"{number} 0 0", f"{number} 0 stopped", f"{number} 1 {stops[0]}"]
    # No iteration was lost or made twice: the job had saved the one it stopped after.
    printed = re.findall(rf"iteration +(\d+)/{ITERATIONS}\b", output)
    assert [int(iteration) for iteration in printed] == list(range(1, ITERATIONS + 1)), output
    iterations = [record["iteration"] for record in metrics(tmp_path)]
    assert iterations == list(range(1, ITERATIONS + 1))
    drawn = cluster.end_of(report, tmp_path / "report.out")
    assert drawn["JobState"] == "COMPLETED", read(tmp_path / "report.out")
    assert drawn["StartTime"] >= cluster.job(number)["EndTime"]
    assert "<html" in (tmp_path / "report.html").read_text()
    assert {"reward.png", "timeline.png"} <= {p.name for p in (tmp_path / "plots").iterdir()}
    lines = read(tmp_path / "report.out").splitlines()
    assert f"  {number} 0 stopped" in lines


def test_flags_that_do_not_fit_are_refused_before_anything_is_queued(
    cluster: Cluster, tmp_path: Path
) -> None:
    """By the trainer's own check, for the nodes and ranks that sbatch is asked for."""
    done = cluster.run(
        SCRIPTS / "train.sbatch",
        "--nodes=3",
        "--",
        *flags(tmp_path),
        PROCESSES_PER_NODE="1",
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("pretrain_rlhf.py: error: ")
    assert cluster.queued() == []
