"""`rlhfuse doctor`: variables and limits that do harm."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from megatron_rlhfuse.doctor import environment

INTERFACES = ("lo", "eth0", "ib0", "ib1")


@pytest.mark.parametrize(
    ("variables", "gpus", "nodes", "subject", "verdict"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, 0, 0, "torchrun's variables", "note"),
        ({"PET_NNODES": "2"}, 0, 0, "torchrun's variables", "note"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, 8, "CUDA_VISIBLE_DEVICES", "BAD"),
        ({"CUDA_VISIBLE_DEVICES": "0,1,9"}, 2, 8, "CUDA_VISIBLE_DEVICES", "BAD"),
        ({"GLOO_SOCKET_IFNAME": "eth1"}, 0, 0, "GLOO_SOCKET_IFNAME", "BAD"),
        ({"GLOO_SOCKET_IFNAME": "eth0,eth1"}, 0, 0, "GLOO_SOCKET_IFNAME", "BAD"),
        ({"NCCL_SOCKET_IFNAME": "ens"}, 8, 8, "NCCL_SOCKET_IFNAME", "BAD"),
        ({"NCCL_SOCKET_IFNAME": "ens"}, 0, 0, "NCCL_SOCKET_IFNAME", "note"),
        ({"NCCL_SOCKET_IFNAME": "=ib"}, 8, 8, "NCCL_SOCKET_IFNAME", "BAD"),
        ({"NCCL_SOCKET_IFNAME": "^lo,eth,ib"}, 8, 8, "NCCL_SOCKET_IFNAME", "BAD"),
        ({"TMPDIR": "/no/such/folder"}, 0, 0, "TMPDIR", "BAD"),
        ({"VLLM_PLUGINS": ""}, 0, 0, "VLLM_PLUGINS", "BAD"),
        ({"VLLM_PLUGINS": "lora"}, 0, 0, "VLLM_PLUGINS", "BAD"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, 8, 8, "CUDA_LAUNCH_BLOCKING", "note"),
        ({"NCCL_P2P_DISABLE": "1"}, 8, 8, "NCCL_P2P_DISABLE", "note"),
    ],
)
def test_a_variable_that_does_harm(
    variables: dict[str, str], gpus: int, nodes: int, subject: str, verdict: str
) -> None:
    (check,) = environment.check_variables(variables, INTERFACES, gpus, nodes)
    assert (check.subject, check.verdict) == (subject, verdict)
    assert check.found
    assert check.remedy


@pytest.mark.parametrize(
    ("variables", "gpus", "nodes"),
    [
        ({}, 8, 8),
        ({"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"}, 0, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, 2, 8),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, 0),
        ({"GLOO_SOCKET_IFNAME": "ib0, eth0"}, 0, 0),
        ({"NCCL_SOCKET_IFNAME": "ib"}, 8, 8),
        ({"NCCL_SOCKET_IFNAME": "=ib1"}, 8, 8),
        ({"NCCL_SOCKET_IFNAME": "^lo,eth"}, 8, 8),
        ({"NCCL_SOCKET_IFNAME": "^=lo,eth0"}, 8, 8),
        ({"VLLM_PLUGINS": "lora,megatron_rlhfuse"}, 0, 0),
        ({"CUDA_LAUNCH_BLOCKING": "0"}, 8, 8),
        ({"NCCL_IB_DISABLE": "1"}, 0, 0),
    ],
)
def test_a_variable_that_is_right(variables: dict[str, str], gpus: int, nodes: int) -> None:
    assert environment.check_variables(variables, INTERFACES, gpus, nodes) == []


def test_a_temporary_folder_must_be_one_that_can_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert environment.check_variables({"TMPDIR": str(tmp_path)}, INTERFACES, 0, 0) == []
    # Root may write anywhere: what the system answers a user is put in its place.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (check,) = environment.check_variables({"TMPDIR": str(tmp_path)}, INTERFACES, 0, 0)
    assert (check.verdict, "cannot be written" in check.found) == ("BAD", True)
    assert environment.check_home(tmp_path).verdict == "note"


def test_home_folder(tmp_path: Path) -> None:
    assert environment.check_home(tmp_path).verdict == "ok"
    assert environment.check_home(tmp_path / "none").verdict == "note"


@pytest.mark.parametrize(
    ("soft", "hard", "verdict"),
    [
        (1024, 1 << 20, "ok"),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, "ok"),
        (1024, 4096, "note"),
        (256, 1 << 20, "BAD"),
    ],
)
def test_open_files(soft: int, hard: int, verdict: str) -> None:
    check = environment.check_open_files(soft, hard)
    assert check.verdict == verdict
    assert bool(check.remedy) == (verdict != "ok")


def test_locked_memory_matters_with_infiniband() -> None:
    assert environment.check_locked_memory(64 << 10, adapters=False, root=False) == []
    assert environment.check_locked_memory(64 << 10, adapters=True, root=True) == []
    (low,) = environment.check_locked_memory(64 << 10, adapters=True, root=False)
    assert (low.verdict, low.found) == ("note", "64 KiB")
    (fine,) = environment.check_locked_memory(resource.RLIM_INFINITY, adapters=True, root=False)
    assert fine.verdict == "ok"
