"""Who dies with whom, the engine process with its trainer rank and vLLM's workers with the engine;
and how many files they may open.

Pure operating system (Linux), imported before anything heavy.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from pathlib import Path

ENGINE_PROCESS_VARIABLE = "RLHFUSE_ENGINE_PROCESS"
"""Set in the environment of an engine process and of everything that it starts."""

_PR_SET_PDEATHSIG = 1

_OPEN_FILES = 1 << 16  # more would not be needed, and some programs go through all they may have


def die_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process, even a stopped or a stuck one, when its parent ends.

    "Parent" is the parent's thread that started this process: it must outlive its children.

    Args:
        parent: the expected parent; if it is gone already, this process ends here and now.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl(PR_SET_PDEATHSIG): {os.strerror(error)}")
    if parent is not None and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def living_members(group: int) -> list[int]:
    """Pids of the processes of a process group, without zombies."""
    members = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended while we looked
        state, _, process_group = stat.rpartition(")")[2].split()[:3]
        if int(process_group) == group and state not in "ZX":
            members.append(int(entry.name))
    return members


def allow_many_files() -> None:
    """Lifts this process's limit of open files, as far as it may.

    Every migrated sample is an open file; the usual limit of 1024 is below what can migrate.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
