"""What train.sbatch makes of its settings, and which it refuses before anything is queued."""

from __future__ import annotations

import os
import re
import socket
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import ROOT, SCRIPTS, STAND_IN, Cluster
from tests.slurm.stand_in_job import StandInJob, venv_with_doctor

TRAIN = ("train.sbatch", "--nodes=2")
PLAN = ("plan.sbatch",)
PROBLEM = ROOT / "examples" / "problems" / "published-09.json"


def test_ranks_are_counted_by_gpus(cluster: Cluster, tmp_path: Path) -> None:
    """Two nodes of two GPUs and eight cores each."""
    job = StandInJob(
        cluster,
        tmp_path / "a folder",
        "--nodes=2 --gpus-per-node=2",
        "",
        PROCESSES_PER_NODE="",
        RENDEZVOUS_PORT="31234",
        NETWORK_INTERFACE="lo",
    )
    assert job.end() == ("COMPLETED", "0:0"), job.output
    assert "stand-in: checked for 2x2" in job.output
    told = "WORLD_SIZE=4 LOCAL_WORLD_SIZE=2 OMP_NUM_THREADS=4 GLOO_SOCKET_IFNAME=lo"
    ranks = re.findall(rf"stand-in: RANK=(\d) {told}", job.output)
    assert sorted(ranks) == ["0", "1", "2", "3"]
    logs = job.run / "torchrun" / f"{job.number}.0"
    assert {folder.name for folder in logs.iterdir()} == {"node1", "node2"}


def test_options_of_srun_are_words(cluster: Cluster, tmp_path: Path) -> None:
    """A star in one stands for no file, though there is one that it would fit."""
    (tmp_path / "--export=ALL,GLOO_SOCKET_IFNAME=eth0").touch()
    options = f"--chdir={tmp_path}"
    wanted = "--quit-on-interrupt\n --export=ALL,GLOO_SOCKET_IFNAME=eth*"
    job = StandInJob(cluster, tmp_path, options, "", SRUN_OPTIONS=wanted)
    assert job.end() == ("COMPLETED", "0:0"), job.output
    assert "GLOO_SOCKET_IFNAME=eth*\n" in job.output


@pytest.mark.parametrize("address", ["127.0.0.1", ""])
def test_torchruns_meet_at_a_free_port(address: str) -> None:
    """The same dice give another port once something listens there, on loopback or everywhere."""
    text = (SCRIPTS / "train.sbatch").read_text()
    function = re.search(r"^free_port\(\) \{\n.*?^\}\n", text, re.MULTILINE | re.DOTALL)
    assert function is not None

    def port(seed: int) -> int:
        words = ["bash", "-euo", "pipefail", "-c", f"{function[0]}RANDOM={seed}; free_port"]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    ports = {port(seed) for seed in range(8)}
    assert len(ports) > 4
    assert all(20000 <= number <= 29999 for number in ports)
    before = port(1)
    both = address == "" and socket.has_dualstack_ipv6()  # as torchrun's own store listens
    family = socket.AF_INET6 if both else socket.AF_INET
    with socket.create_server((address, before), family=family, dualstack_ipv6=both):
        assert port(1) != before


def test_a_doctor_looks_at_every_node(cluster: Cluster, tmp_path: Path) -> None:
    """With an environment whose doctor finds something on each."""
    venv = venv_with_doctor(tmp_path, 'echo "BAD  something on $SLURMD_NODENAME"; exit 1')
    environment = {"DOCTOR": "yes", "MAX_REQUEUES": "0"}
    job = StandInJob(cluster, tmp_path, "--nodes=2", "", venv, **environment)
    assert job.end()[0] == "FAILED"
    assert "BAD  something on node1" in job.output
    assert "BAD  something on node2" in job.output
    assert job.iterations() == []


@pytest.mark.parametrize(
    ("words", "settings", "complaint"),
    [
        ((*TRAIN,), {}, "usage: "),
        ((*TRAIN, "--save=x"), {}, "usage: "),
        ((*TRAIN, "--", "--train-iters=3"), {}, "--save: "),
        ((*TRAIN, "--", "--save=x", "--misspelt"), {}, "unrecognized arguments: --misspelt"),
        ((*TRAIN, "--", "--save=x"), {"PROCESSES_PER_NODE": ""}, "give --gpus-per-node=N"),
        ((*TRAIN, "--", "--save=x"), {"PROCESSES_PER_NODE": "none"}, "PROCESSES_PER_NODE: "),
        ((*TRAIN, "--nodes=1-2", "--", "--save=x"), {}, "--nodes: want one number, got '1-2'"),
        ((*TRAIN, "--", "--save=x"), {"MAX_REQUEUES": "often"}, "MAX_REQUEUES: "),
        ((*TRAIN, "--", "--save=x"), {"MAX_REQUEUES": "08"}, "MAX_REQUEUES: "),
        ((*TRAIN, "--", "--save=x"), {"MAX_RESTARTS": "-1"}, "MAX_RESTARTS: "),
        ((*TRAIN, "--", "--save=x"), {"DOCTOR": "1"}, "DOCTOR: want yes or no"),
        ((*TRAIN, "--", "--save=x"), {"RENDEZVOUS_PORT": "1023"}, "RENDEZVOUS_PORT: "),
        ((*TRAIN, "--", "--save=x"), {"RENDEZVOUS_PORT": "65536"}, "RENDEZVOUS_PORT: "),
        ((*TRAIN, "--", "--save=x"), {"REPOSITORY": "/nowhere"}, "REPOSITORY: /nowhere holds no"),
        ((*TRAIN, "--", "--save=x"), {"VENV": "/nowhere"}, "VENV: /nowhere holds no bin/python"),
        ((*PLAN, "--", PROBLEM), {}, "usage: "),
        ((*PLAN, "--", "/nowhere.json", "plan.json"), {}, "/nowhere.json: No such file"),
        ((*PLAN, "--", PROBLEM, "/nowhere/plan.json"), {}, "PLAN.json: /nowhere/plan.json must"),
        ((*PLAN, "--", PROBLEM, "plan.json", "--metod=exact"), {}, "--metod"),
        ((*PLAN, "--", PROBLEM, "plan.json"), {"SEARCH_SECONDS": "1h"}, "SEARCH_SECONDS: "),
        (("report.sbatch", "--"), {}, "usage: "),
        (("report.sbatch", "--", "/nowhere"), {}, "RUN: /nowhere holds no metrics.jsonl"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_queued(
    cluster: Cluster,
    tmp_path: Path,
    words: tuple[object, ...],
    settings: dict[str, str],
    complaint: str,
) -> None:
    script, *rest = words
    given = {"PROCESSES_PER_NODE": "1", **settings}
    if script == "train.sbatch":
        given = {"REPOSITORY": str(STAND_IN), **given}
    done = cluster.run(SCRIPTS / str(script), *rest, cwd=tmp_path, **given)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert complaint in done.stderr
    assert cluster.queued() == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("lines", "options", "ranks"),
    [
        ("", ("-N", "2", "--gres=tmp:1,gpu:a100:2"), "2x2"),
        ("", ("-N2", "--gpus-per-node", "h100:1"), "2x1"),
        ("#SBATCH --gpus-per-node=2\n", ("--nodes=2",), "2x2"),
        ("#SBATCH -N 2\n#SBATCH --gpus-per-node=1\n", ("--gpus-per-node=2",), "2x2"),
    ],
)
def test_good_settings_are_submitted(
    cluster: Cluster, tmp_path: Path, lines: str, options: tuple[str, ...], ranks: str
) -> None:
    """Of a script that a user has edited; standard output is sbatch's own."""
    script = tmp_path / "scripts" / "slurm" / "mine.sbatch"
    script.parent.mkdir(parents=True)
    text = (SCRIPTS / "train.sbatch").read_text()
    script.write_text(text.replace("#SBATCH --nodes=1\n", f"#SBATCH --nodes=1\n{lines}"))
    script.chmod(0o755)
    # Slurm would refuse types of GPUs that this cluster does not have.
    (tmp_path / "sbatch").write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/words\n')
    (tmp_path / "sbatch").chmod(0o755)
    flags = ("--save", str(tmp_path / "a folder"), "--seconds=2")
    done = cluster.run(
        *(script, *options, "--", *flags),
        REPOSITORY=str(STAND_IN),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == f"stand-in: checked for {ranks}\n"
    assert (tmp_path / "words").read_text().splitlines() == [*options, str(script), *flags]


def test_sbatch_gets_the_job(cluster: Cluster, tmp_path: Path) -> None:
    """What it prints is all there is on standard output."""
    done = cluster.run(
        *(SCRIPTS / "train.sbatch", "-N", "2", "--hold", "--parsable", "--", "--save", tmp_path),
        REPOSITORY=str(STAND_IN),
        PROCESSES_PER_NODE="3",
    )
    assert done.returncode == 0, done.stderr
    number = int(done.stdout)
    job = cluster.job(number)
    cluster.command("scancel", number)
    assert (job["JobState"], job["NumNodes"]) == ("PENDING", "2-2")
