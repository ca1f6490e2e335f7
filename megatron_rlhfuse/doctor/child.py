"""Runs one of `trials/` as a program of its own, with a time-out; nothing of it stays behind.

Invariants
- All that the program and its descendants write by default (temporary files, caches of compiled
  kernels) goes into one folder, which is removed.
- The folder's name stands in the environment of each descendant: that is how those are found,
  and killed, that have a process group of their own.
- The program dies with this process, too.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import megatron_rlhfuse
from megatron_rlhfuse.doctor.check import last_line
from megatron_rlhfuse.launcher import LAUNCHER_VARIABLES

PROGRAM = "megatron_rlhfuse.doctor.trials"
RESULT = "result.json"

LAUNCHER_PREFIXES = ("TORCHELASTIC_", "PET_")
"""Of more of torchrun's variables; PET_* stand for torchrun's own flags."""

CACHES = (
    "TMPDIR",
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "VLLM_CACHE_ROOT",
    "VLLM_CONFIG_ROOT",
    "TRITON_CACHE_DIR",
    "TORCHINDUCTOR_CACHE_DIR",
    "CUDA_CACHE_PATH",
    "FLASHINFER_WORKSPACE_BASE",
)
"""Variables that say where torch, Triton, CUDA and vLLM write besides their results."""

KILL_TIMEOUT_S = 10.0
"""For killed processes to be gone; one that waits for a device may take longer, and is left."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: what it found (any JSON), or in one line what went wrong."""

    found: Any
    error: str
    seconds: float


def run(name: str, timeout_s: float) -> Outcome:
    """Runs the trial `name` and waits for its end; `error` is empty where all went well."""
    began = time.monotonic()
    try:
        with tempfile.TemporaryDirectory(prefix="rlhfuse-doctor-", ignore_cleanup_errors=True) as f:
            found, error = _run_in(Path(f), name, timeout_s)
    except OSError as fault:  # no room for a temporary folder, or for a process
        found, error = None, last_line(str(fault))
    return Outcome(found, error, time.monotonic() - began)


def _run_in(folder: Path, name: str, timeout_s: float) -> tuple[Any, str]:
    output = folder / "output.txt"
    # -P: else Python would import from the current folder, which jobs do not.
    command = [sys.executable, "-P", "-m", PROGRAM, name, str(folder), str(os.getpid())]
    with output.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=environment(os.environ, folder),
            start_new_session=True,
        )
    status: int | None = None
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(timeout_s)
    finally:
        process.kill()
        process.wait()
        _kill_descendants(folder)
    return _outcome(folder, status, timeout_s, last_line(output.read_text(errors="replace")))


def _outcome(folder: Path, status: int | None, timeout_s: float, said: str) -> tuple[Any, str]:
    """What was found and what went wrong. status: None for a time-out; said: the last line."""
    said = f"; last line: {said}" if said else ""
    if status is None:
        return None, f"not done after {timeout_s:.0f} s{said}"
    if status < 0:
        return None, f"ended by {signal.Signals(-status).name}{said}"
    try:
        result = json.loads((folder / RESULT).read_text())
    except FileNotFoundError:
        return None, f"ended with exit status {status}{said}"
    return result["found"], result["error"]


def environment(inherited: Mapping[str, str], folder: Path) -> dict[str, str]:
    """A job's environment, as far as it can be had without torchrun, with caches in `folder`.

    The package comes last on PYTHONPATH: what hides a module from a job hides it from a trial.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name not in LAUNCHER_VARIABLES and not name.startswith(LAUNCHER_PREFIXES)
    }
    package = str(Path(megatron_rlhfuse.__file__).parents[1])
    search = [each for each in (kept.get("PYTHONPATH"), package) if each]
    return kept | dict.fromkeys(CACHES, str(folder)) | {"PYTHONPATH": os.pathsep.join(search)}


def _kill_descendants(folder: Path) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT_S
    while (left := descendants(folder)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):  # just gone
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def descendants(folder: Path) -> list[int]:
    """Processes of this user that have `folder` for TMPDIR; zombies have no environment left."""
    mark = b"TMPDIR=" + os.fsencode(folder)
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # gone, or another user's
            continue
        if mark in variables:
            found.append(int(entry.name))
    return found
