"""`rlhfuse doctor`: programs with a time-out, of which nothing stays behind; the light trials."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_rlhfuse import _dispatch
from megatron_rlhfuse.dispatch import packing
from megatron_rlhfuse.doctor import child
from megatron_rlhfuse.doctor.trials import dispatch, schedule, tiny_model

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import json, os, pathlib, signal, subprocess, sys, tempfile, time
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
print("some word\\nthe last word", flush=True)
(folder.parent / "folder.txt").write_text(str(folder))
if name in ("hang", "leave"):
    tempfile.mkstemp()
    sleep = "import time; print(1, flush=True); time.sleep(600)"
    left = subprocess.Popen(
        [sys.executable, "-c", sleep], start_new_session=True, stdout=subprocess.PIPE
    )
    left.stdout.readline()
    (folder.parent / "pid.txt").write_text(str(left.pid))
if name == "hang":
    print("hangs", file=sys.stderr, flush=True)
    time.sleep(600)
if name == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "exit":
    sys.exit(3)
result = {"found": dict(os.environ), "error": "wrong" if name == "fail" else ""}
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Puts PROGRAM in the place of the trials; returns the parent of its folder."""
    (tmp_path / "stand_in.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(child, "PROGRAM", "stand_in")
    return tmp_path


def assert_nothing_is_left(parent: Path) -> None:
    folder = Path((parent / "folder.txt").read_text())
    assert folder.parent == parent
    assert not folder.exists()
    assert child.descendants(folder) == []
    pid = parent / "pid.txt"
    if pid.exists():
        assert not Path(f"/proc/{pid.read_text()}/exe").exists()


def test_a_program_sees_a_jobs_environment_but_what_torchrun_sets(
    monkeypatch: pytest.MonkeyPatch, program: Path
) -> None:
    for name in ("RANK", "MASTER_ADDR", "PET_NNODES", "TORCHELASTIC_RUN_ID", "NCCL_DEBUG"):
        monkeypatch.setenv(name, "7")
    outcome = child.run("succeed", 60.0)
    assert outcome.error == ""
    assert outcome.seconds > 0
    seen = outcome.found
    assert seen["NCCL_DEBUG"] == "7"
    assert not {"RANK", "MASTER_ADDR", "PET_NNODES", "TORCHELASTIC_RUN_ID"} & set(seen)
    assert {seen[name] for name in child.CACHES} == {(program / "folder.txt").read_text()}
    assert seen["PYTHONPATH"].split(":")[-1] == str(ROOT)  # after what may hide a module
    assert_nothing_is_left(program)


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("crash", "ended by SIGSEGV; last line: the last word"),
        ("exit", "ended with exit status 3; last line: the last word"),
        ("fail", "wrong"),
    ],
)
def test_a_program_that_fails_says_why(program: Path, name: str, error: str) -> None:
    assert child.run(name, 60.0).error == error
    assert_nothing_is_left(program)


def test_of_a_program_that_hangs_nothing_is_left(program: Path) -> None:
    # Long enough for it to have begun to hang, also on a busy machine.
    outcome = child.run("hang", 10.0)
    assert outcome.error == "not done after 10 s; last line: hangs"
    assert_nothing_is_left(program)


def test_what_a_program_leaves_running_is_ended(program: Path) -> None:
    assert child.run("leave", 60.0).error == ""
    assert (program / "pid.txt").exists()
    assert_nothing_is_left(program)


def test_no_temporary_folder_is_an_error_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert "No such file" in child.run("facts", 60.0).error


def test_a_scheduler_that_ends_the_doctor_ends_all(program: Path) -> None:
    script = """
from megatron_rlhfuse.doctor import child, self_tests
child.PROGRAM = "stand_in"
with self_tests.ending_on_sigterm():
    child.run("hang", 600.0)
"""
    doctor = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not (program / "pid.txt").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        doctor.send_signal(signal.SIGTERM)
        assert doctor.wait(60) == 128 + signal.SIGTERM
    finally:
        doctor.kill()
    assert_nothing_is_left(program)


def test_a_trial_reports_the_last_line_of_its_exception(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('first\\nthis is not torch')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert child.run("facts", 60.0).error == "ImportError: this is not torch"


def test_the_planned_instance_is_a_published_one(tmp_path: Path) -> None:
    file = ROOT / "examples/problems/published-05.json"
    assert json.loads(file.read_text()) == schedule.PROBLEM
    assert "planned" in schedule.run(tmp_path)


def test_dispatch_that_goes_wrong_is_noticed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert dispatch.run(tmp_path).startswith("equal to plain Python on cpu")
    original = _dispatch.balance
    monkeypatch.setattr(_dispatch, "balance", lambda costs, groups, equal: costs.argsort() // 3)
    with pytest.raises(RuntimeError, match="largest of 3 groups costs"):
        dispatch.run(tmp_path)
    monkeypatch.setattr(_dispatch, "balance", original)
    monkeypatch.setattr(packing, "move", lambda fields: fields[0].target.zero_())
    with pytest.raises(RuntimeError, match="packing on cpu: rows"):
        dispatch.run(tmp_path)


def test_hugging_face_agrees_that_the_tiny_model_counts(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = tmp_path / "model"
    tiny_model.write(folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    numbers = torch.arange(50)[None]
    with torch.no_grad():
        probabilities = model(numbers).logits[0].float().softmax(-1)
    assert probabilities.argmax(-1).tolist() == list(range(1, 51))
    assert probabilities.max(-1).values.min() > 0.999
    assert AutoTokenizer.from_pretrained(folder)("3 59 x")["input_ids"] == [3, 59, 63]
