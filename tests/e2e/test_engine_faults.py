"""Real engines that are killed, stopped or orphaned."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from megatron_rlhfuse.rollout.engine import EngineHang, GenerationEngine
from megatron_rlhfuse.rollout.lifetime import living_members

from .conftest import MakeEngine, TinyModel, requests
from .test_engine import largest_difference, tokens

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mortal_engine(make_engine: MakeEngine, tiny_model: TinyModel) -> GenerationEngine:
    """An engine to be killed; `restarts` counts on from test to test."""
    engine = make_engine(tiny_model, 2, step_timeout_s=20.0)
    engine.wait_until_ready()
    return engine


def test_killed_in_generation_every_sample_comes_once_with_its_tokens(
    mortal_engine: GenerationEngine, tiny_model: TinyModel
) -> None:
    engine = mortal_engine
    engine.update_weights(tiny_model.weights(1).items(), 1)
    undisturbed = engine.generate(requests(16))
    restarts = engine.restarts

    engine.submit(requests(16))
    samples = engine.poll(20.0)
    os.kill(engine.pid, signal.SIGKILL)
    assert 0 < len(samples) < 16
    while engine.unfinished:
        samples += engine.poll(1.0)

    assert engine.restarts == restarts + 1
    assert sorted(sample.sample_id for sample in samples) == list(range(16))
    samples.sort(key=lambda sample: sample.sample_id)
    assert tokens(samples) == tokens(undisturbed)
    assert largest_difference(samples, undisturbed) < 1e-5
    assert {sample.weight_version for sample in samples} == {1}


def test_killed_in_a_weight_update_it_comes_back_with_the_new_weights(
    mortal_engine: GenerationEngine, tiny_model: TinyModel, fresh_engine: GenerationEngine
) -> None:
    engine = mortal_engine
    engine.update_weights(tiny_model.weights(1).items(), 1)
    restarts = engine.restarts
    # Stopped, so that the update is certainly unfinished when the kill comes.
    os.kill(engine.pid, signal.SIGSTOP)
    threading.Timer(1.0, os.kill, (engine.pid, signal.SIGKILL)).start()
    engine.update_weights(tiny_model.weights(2).items(), 2)
    assert engine.restarts == restarts + 1
    assert tokens(engine.generate(requests(8))) == tokens(fresh_engine.generate(requests(8)))


def test_a_stopped_engine_is_a_hang_that_names_it(
    make_engine: MakeEngine, tiny_model: TinyModel
) -> None:
    engine = make_engine(tiny_model, 3, step_timeout_s=4.0)
    engine.update_weights(tiny_model.weights(1).items(), 1)
    pid = engine.pid
    engine.submit(requests(16))
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(EngineHang, match=rf"instance 3 \(pid {pid}\) hangs: silent for [45]\."):
        while engine.unfinished:
            engine.poll(60.0)
    assert time.monotonic() - started < 10.0
    assert living_members(pid) == []


ORPHAN_MAKER = """
import sys
from pathlib import Path
from safetensors.torch import load_file
from megatron_rlhfuse.rollout.engine import GenerationEngine
from tests.e2e.conftest import SAMPLING, TinyModel, engine_options, requests

folder, log = Path(sys.argv[1]), Path(sys.argv[2])
options = engine_options(TinyModel(folder, None), log, tensor_parallel_size=2)
engine = GenerationEngine(5, options, SAMPLING)
engine.start()
engine.update_weights(load_file(folder / "model.safetensors").items(), 1)
engine.submit(requests(16) * 100)
engine.poll(60.0)
print(engine.pid, flush=True)
sys.stdin.read()
"""


def test_engine_and_workers_die_with_their_parent_and_leave_no_shared_memory(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    # Workers find the plugin through the package's entry point, installed or not.
    info = tmp_path / "site" / "rlhfuse_entry_point-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: rlhfuse-entry-point\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nrlhfuse = megatron_rlhfuse.rollout.plugin:register\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", ORPHAN_MAKER, str(tiny_model.folder), str(tmp_path / "engine5.log")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{info.parent}"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        engine = int(parent.stdout.readline())
        # The engine, two workers, and the resource tracker that removes their shared memory.
        members = living_members(engine)
        shared = {path for member in members for path in mapped_shared_memory(member)}
        parent.kill()
    assert len(members) == 4
    assert any(path.exists() for path in shared)
    deadline = time.monotonic() + 10.0
    while time.monotonic() < deadline and (
        living_members(engine) or any(path.exists() for path in shared)
    ):
        time.sleep(0.1)
    assert living_members(engine) == []
    assert [path for path in shared if path.exists()] == []


def mapped_shared_memory(pid: int) -> set[Path]:
    """The files of /dev/shm that a process has mapped and that have a name."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    paths = [line.split(maxsplit=5)[5] for line in lines if "/dev/shm/" in line]
    return {Path(path) for path in paths if not path.endswith("(deleted)")}
