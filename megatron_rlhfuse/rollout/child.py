"""One run of the engine program, as its parent sees it: start, send, receive, end.

Knows processes, sockets and the log file; knows nothing of requests or weights. Every wait is
bounded, also against a child that is stopped in the middle of a message.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing.connection
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import megatron_rlhfuse
from megatron_rlhfuse import network
from megatron_rlhfuse.launcher import LAUNCHER_VARIABLES
from megatron_rlhfuse.rollout.lifetime import ENGINE_PROCESS_VARIABLE, living_members
from megatron_rlhfuse.rollout.messages import Configure, EngineOptions

PROGRAM = "megatron_rlhfuse.rollout.engine_process"

LOG_LINES = 20
"""Of the log's end in an error message: a Python traceback's interesting part."""

GROUP_TIMEOUT_S = 5.0
"""For workers to follow a dead engine by themselves; then they are killed."""

# What torchrun tells its ranks. In an engine it would name the trainer's world and store.
_TRAINER_VARIABLES = (
    *LAUNCHER_VARIABLES,
    # Megatron's wish, which would serialise the engine's streams.
    "CUDA_DEVICE_MAX_CONNECTIONS",
)
_LAUNCHER_PREFIX = "TORCHELASTIC_"


class ChildGone(Exception):  # noqa: N818  # news, not a fault: the caller decides
    """The child has ended, or closed its side."""


class ChildStuck(Exception):  # noqa: N818
    """The child neither reads nor writes."""


class Child:
    """A running engine program."""

    def __init__(self, configure: Configure) -> None:
        """Starts the program and returns at once.

        Raises:
            OSError: the log file cannot be written, or no process can be started.
        """
        options = configure.options
        Path(options.log_file).parent.mkdir(parents=True, exist_ok=True)
        ours, theirs = socket.socketpair()
        with theirs, open(options.log_file, "ab") as log:
            # A message that does not move for so long never will.
            limit = struct.pack("ll", max(1, int(options.step_timeout_s)), 0)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._connection = Connection(ours.detach())
            command = [sys.executable, "-m", PROGRAM, str(theirs.fileno()), str(os.getpid())]
            self._process = _start(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(theirs.fileno(),),
                env=child_environment(options, dict(os.environ)),
                # Its own group: the terminal's Ctrl-C passes it by, and it can be waited for whole.
                start_new_session=True,
            )
        self.pid = self._process.pid
        with contextlib.suppress(ChildGone):  # the next receive tells
            self.send(configure)

    def send(self, message: object) -> None:
        """Sends a message.

        Raises:
            ChildGone, ChildStuck
        """
        try:
            self._connection.send(message)
        except BlockingIOError as error:
            raise ChildStuck from error
        except OSError as error:
            raise ChildGone from error

    def receive(self, timeout_s: float) -> Any | None:
        """Returns the next message, or None when none came in time.

        Raises:
            ChildGone: after everything the child sent before its end has been received.
            ChildStuck: the child stopped in the middle of a message.
        """
        try:
            if not multiprocessing.connection.wait([self._connection], max(0.0, timeout_s)):
                return None
            return self._connection.recv()
        except BlockingIOError as error:
            raise ChildStuck from error
        except (EOFError, OSError) as error:
            raise ChildGone from error

    def wait(self, timeout_s: float) -> bool:
        """Waits for the end of the process; returns whether it came."""
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def end(self) -> str:
        """Kills what is left of the child and its workers; returns how the child ended.

        Workers are given a moment to follow by themselves: their resource tracker then removes
        their shared memory, which nobody would after a kill of the whole group.
        """
        self._process.kill()  # does nothing to a process that has ended
        status = self._process.wait()
        self._connection.close()
        deadline = time.monotonic() + GROUP_TIMEOUT_S
        while living_members(self.pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        for member in living_members(self.pid):
            with contextlib.suppress(ProcessLookupError):  # just gone
                os.kill(member, signal.SIGKILL)
        return f"signal {-status}" if status < 0 else f"exit status {status}"


def log_tail(log_file: str) -> str:
    """The last lines of an engine's log, with its name."""
    with open(log_file, "rb") as log:
        log.seek(max(0, os.path.getsize(log_file) - 16384))
        lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    return f"last lines of {log_file}:\n" + "\n".join(f"  {line}" for line in lines)


def child_environment(options: EngineOptions, inherited: dict[str, str]) -> dict[str, str]:
    """The environment an engine process starts with, before any import.

    Args:
        options: device and visible_devices count here.
        inherited: the parent's environment.
    """
    environment = {
        name: value
        for name, value in inherited.items()
        if name not in _TRAINER_VARIABLES and not name.startswith(_LAUNCHER_PREFIX)
    }
    package_root = str(Path(megatron_rlhfuse.__file__).parents[1])
    search = environment.get("PYTHONPATH")
    environment |= {
        ENGINE_PROCESS_VARIABLE: "1",
        "PYTHONPATH": f"{package_root}{os.pathsep}{search}" if search else package_root,
        # The scheduler runs in the engine process itself: one process less to start and to lose.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        # Workers start afresh, and so run the plugin, on every device.
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        **network.engine_variables(),
    }
    if options.device == "cpu":
        # Instances share the cores with the trainer; more threads would fight over them.
        environment["OMP_NUM_THREADS"] = "1"
        # Left to itself vLLM wants a memory node per worker of a tensor-parallel engine.
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if options.visible_devices is not None:
        # The parent counts within its own mask, where it has one.
        mask = inherited.get("CUDA_VISIBLE_DEVICES")
        names = mask.split(",") if mask else None
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(
            names[device] if names else str(device) for device in options.visible_devices
        )
    return environment


@functools.cache
def _launcher() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-launcher")


def _start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
    """Starts a process from a thread that lives as long as this program.

    The kernel ties a child that dies with its parent to the thread that started it.
    """
    return _launcher().submit(lambda: subprocess.Popen(command, **options)).result()
