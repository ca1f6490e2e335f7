"""What an engine process inherits from a trainer rank, and what it must not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlhfuse.rollout.child import child_environment
from megatron_rlhfuse.rollout.messages import EngineOptions

OPTIONS = EngineOptions(
    model="model",
    tensor_parallel_size=1,
    dtype="float32",
    max_model_len=128,
    max_num_seqs=8,
    kv_cache_bytes=1 << 20,
    gpu_memory_utilization=0.5,
    enforce_eager=True,
    block_size=None,
    seed=0,
    device="cpu",
    visible_devices=None,
    log_file="engine.log",
    start_timeout_s=1.0,
    step_timeout_s=1.0,
    enable_sleep=False,
)
ON_GPUS = replace(OPTIONS, device="cuda", visible_devices=(1, 0), tensor_parallel_size=2)


def test_the_trainers_world_stays_with_the_trainer() -> None:
    torchrun = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environment = child_environment(OPTIONS, torchrun | {"HOME": "/home/someone"})
    assert not torchrun.keys() & environment.keys()
    assert environment["HOME"] == "/home/someone"
    assert environment["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert environment["OMP_NUM_THREADS"] == "1"


def test_the_child_imports_this_package_first() -> None:
    root = str(Path(__file__).resolve().parents[2])
    assert child_environment(OPTIONS, {})["PYTHONPATH"] == root
    assert child_environment(OPTIONS, {"PYTHONPATH": "a:b"})["PYTHONPATH"] == f"{root}:a:b"


def test_gpus_are_counted_within_the_parents_mask() -> None:
    assert child_environment(ON_GPUS, {})["CUDA_VISIBLE_DEVICES"] == "1,0"
    masked = child_environment(ON_GPUS, {"CUDA_VISIBLE_DEVICES": "5,GPU-abc"})
    assert masked["CUDA_VISIBLE_DEVICES"] == "GPU-abc,5"
    assert "OMP_NUM_THREADS" not in masked
    everything = replace(ON_GPUS, visible_devices=None)
    assert "CUDA_VISIBLE_DEVICES" not in child_environment(everything, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"kv_cache_bytes": None}, "kv_cache_bytes must be given"),
        ({"enable_sleep": True}, "enable_sleep needs device 'cuda'"),
        ({"visible_devices": (0, 1)}, r"visible_devices \(0, 1\) must name tensor_parallel_size"),
    ],
)
def test_options_that_contradict_each_other_are_named(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        replace(OPTIONS, **changes)  # type: ignore[arg-type]
