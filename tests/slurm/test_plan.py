"""plan.sbatch: many seeds at once, and the best plan under one name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from tests.slurm.cluster import ROOT, SCRIPTS, Cluster, read

PROBLEM = ROOT / "examples" / "problems" / "published-09.json"
OTHER_PROBLEM = ROOT / "examples" / "problems" / "published-05.json"
# So little search, and so little memory, that what a seed finds is its own.
FLAGS = ("--iterations=8", "--memory-limit=32")


def merit(plan: Path) -> tuple[float, float]:
    found = json.loads(plan.read_text())
    return found["makespan"], max(found["peak_activation"])


def plans(plan: Path) -> dict[int, Path]:
    """What the seeds have found, by seed."""
    found = Path(f"{plan}.seeds").glob("seed-*-of-*.json")
    return {int(path.name.split("-")[1]): path for path in found}


def search(cluster: Cluster, plan: Path, seeds: str, *options: str) -> int:
    return cluster.submit(
        *("--cpus-per-task=1", f"--array={seeds}", f"--output={plan}.%a.out", *options),
        *(SCRIPTS / "plan.sbatch", PROBLEM, plan, *FLAGS),
    )


def end(cluster: Cluster, plan: Path, number: int, seeds: int) -> list[str]:
    """Waits for all tasks; their states by seed."""
    states = []
    for seed in range(seeds):
        task = f"{number}_{seed}"
        shown = cluster.command("scontrol", "--oneliner", "show", "job", task)
        own = int(shown.split()[0].partition("=")[2])
        states.append(cluster.end_of(own, Path(f"{plan}.{seed}.out"))["JobState"])
    return states


def test_the_best_plan_is_kept(cluster: Cluster, tmp_path: Path) -> None:
    """Of seeds that end at the same time, and one of which cannot write what it has found."""
    plan = tmp_path / "plan.json"
    number = search(cluster, plan, "0-5", "--hold")
    in_the_way = Path(f"{plan}.seeds") / f"unfinished-seed-4-of-{number}.json"
    in_the_way.mkdir(parents=True)
    cluster.command("scontrol", "release", number)
    states = end(cluster, plan, number, 6)
    assert states == ["COMPLETED"] * 4 + ["FAILED", "COMPLETED"], read(Path(f"{plan}.0.out"))

    found = plans(plan)
    assert sorted(found) == [0, 1, 2, 3, 5]
    merits = {seed: merit(path) for seed, path in found.items()}
    assert len(set(merits.values())) > 1, f"all the same, nothing to choose: {merits}"
    assert merit(plan) == min(merits.values())

    # What another array finds takes its place only if it is better, whoever made what is there.
    shutil.rmtree(f"{plan}.seeds")
    best = plan.read_bytes()
    worst = max(merits, key=lambda seed: merits[seed])
    again = search(cluster, plan, str(worst))
    assert cluster.end_of(again, Path(f"{plan}.{worst}.out"))["JobState"] == "COMPLETED"
    assert plan.read_bytes() == best

    # A plan of another problem is no place for this one's.
    done = cluster.run(SCRIPTS / "plan.sbatch", "--", OTHER_PROBLEM, plan, "--iterations=8")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(f"{plan} plans another problem: name another file")
    assert cluster.queued() == []


def test_seeds_of_another_problem_are_passed_over(cluster: Cluster, tmp_path: Path) -> None:
    """They lie where an earlier search has left them, and are better by number."""
    plan = tmp_path / "plan.json"
    seeds = Path(f"{plan}.seeds")
    seeds.mkdir()
    other = seeds / "seed-0-of-0.json"  # no job has this number
    rlhfuse = (sys.executable, "-m", "megatron_rlhfuse")
    cluster.command(*rlhfuse, "plan", OTHER_PROBLEM, "--iterations=8", "-o", other)
    number = search(cluster, plan, "0")
    assert end(cluster, plan, number, 1) == ["COMPLETED"], read(Path(f"{plan}.0.out"))
    own = seeds / f"seed-0-of-{number}.json"
    assert merit(other) < merit(own)
    assert plan.read_bytes() == own.read_bytes()


def test_submitted_by_hand(cluster: Cluster, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    done = cluster.run(
        *(SCRIPTS / "plan.sbatch", "--parsable", "--array=3", f"--output={plan}.out", "--"),
        *(OTHER_PROBLEM, plan),
        SEARCH_SECONDS="1",
    )
    assert done.returncode == 0, done.stderr
    job = cluster.end_of(int(done.stdout), Path(f"{plan}.out"))
    assert job["JobState"] == "COMPLETED", read(Path(f"{plan}.out"))
    assert list(plans(plan)) == [3]
    assert merit(plan)[0] == 225  # which is the bound
