"""What jobs inherit from the shell: variables and limits that often do harm. PURE but `checks`.

Each rule is one by which jobs of this project break, or are slowed down.
"""

from __future__ import annotations

import os
import resource
import socket
from collections.abc import Collection, Mapping
from pathlib import Path

from megatron_rlhfuse.doctor.check import Check
from megatron_rlhfuse.doctor.child import LAUNCHER_PREFIXES
from megatron_rlhfuse.doctor.installation import PLUGIN_NAME
from megatron_rlhfuse.launcher import LAUNCHER_VARIABLES

OPEN_FILES = 1 << 16
"""What ranks and engines raise their limit to, as far as they may: a migrated sample is a file."""

FEWEST_OPEN_FILES = 1024
"""The usual limit; a rank of a large job has a socket for each peer besides its libraries."""

SLOWING = {
    "CUDA_LAUNCH_BLOCKING": "the host waits for every kernel",
    "NCCL_P2P_DISABLE": "NCCL goes through host memory instead of NVLink",
    "NCCL_SHM_DISABLE": "NCCL goes through the network within a node",
    "NCCL_IB_DISABLE": "NCCL goes through TCP between nodes",
}
"""Switches for debugging that do harm when they are left on."""


def checks(gpus: int) -> list[Check]:
    """All checks of this file. `gpus`: how many torch drives."""
    nodes = len(list(Path("/dev").glob("nvidia[0-9]*")))
    interfaces = [name for _, name in socket.if_nameindex()]
    adapters = Path("/sys/class/infiniband")
    found = check_variables(os.environ, interfaces, gpus, nodes)
    return [
        *(found or [Check("variables", "none that harms a job", "ok")]),
        check_open_files(*resource.getrlimit(resource.RLIMIT_NOFILE)),
        *check_locked_memory(
            resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
            adapters.is_dir() and any(adapters.iterdir()),
            os.geteuid() == 0,
        ),
        check_home(Path.home()),
    ]


def check_variables(
    variables: Mapping[str, str], interfaces: Collection[str], gpus: int, nodes: int
) -> list[Check]:
    """A line for each variable that does harm.

    Args:
        interfaces: names of this machine's network interfaces
        gpus: that torch drives
        nodes: GPU devices in /dev
    """
    return [
        *_launcher(variables),
        *_visible_devices(variables, gpus, nodes),
        *_interfaces(variables, interfaces, gpus),
        *_temporary_folder(variables),
        *_plugins(variables),
        *(
            Check(name, variables[name], "note", f"{harm}: unset it")
            for name, harm in SLOWING.items()
            if gpus and variables.get(name, "0") not in ("", "0")
        ),
    ]


def _launcher(variables: Mapping[str, str]) -> list[Check]:
    if "TORCHELASTIC_RUN_ID" in variables:  # under torchrun they are right
        return []
    found = []
    left = [name for name in LAUNCHER_VARIABLES if name in variables]
    if left:
        remedy = f"a program that torchrun does not start waits for others: unset {' '.join(left)}"
        found.append(Check("torchrun's variables", f"{left[0]} is set", "note", remedy))
    flags = [name for name in variables if name.startswith(LAUNCHER_PREFIXES)]
    if flags:
        remedy = (
            f"torchrun takes them for its flags: unset {' '.join(flags)}, unless they are meant"
        )
        found.append(Check("torchrun's variables", f"{flags[0]} is set", "note", remedy))
    return found


def _visible_devices(variables: Mapping[str, str], gpus: int, nodes: int) -> list[Check]:
    name = "CUDA_VISIBLE_DEVICES"
    mask = variables.get(name)
    if mask is None or not nodes:
        return []
    if not mask.strip():
        return [Check(name, "empty: it hides all GPUs", "BAD", f"unset {name}")]
    named = len(mask.split(","))
    if named > gpus:
        found = f"{mask}: names {named}, torch finds {gpus}"
        return [Check(name, found, "BAD", "name GPUs that nvidia-smi -L shows, each once")]
    return []


def _interfaces(
    variables: Mapping[str, str], interfaces: Collection[str], gpus: int
) -> list[Check]:
    found = []
    have = f"this machine has {', '.join(interfaces)}"
    name = "GLOO_SOCKET_IFNAME"
    unknown = [each for each in _names(variables.get(name, "")) if each not in interfaces]
    if unknown:
        remedy = f"{have}: name one of them, or unset {name}"
        found.append(Check(name, f"{unknown[0]}: no such network interface", "BAD", remedy))
    name = "NCCL_SOCKET_IFNAME"
    pattern = variables.get(name, "")
    if pattern and not any(_nccl_takes(pattern, each) for each in interfaces):
        remedy = f"{have}: choose one of them, or unset {name}"
        verdict = "BAD" if gpus else "note"  # NCCL is for GPUs
        found.append(Check(name, f"{pattern}: fits no network interface", verdict, remedy))
    return found


def _nccl_takes(pattern: str, interface: str) -> bool:
    """NCCL's own rules: prefixes; "=" before the list asks for whole names, "^" for all others."""
    excludes = pattern.startswith("^")
    pattern = pattern.removeprefix("^")
    exact = pattern.startswith("=")
    names = _names(pattern.removeprefix("="))
    fits = any(interface == name if exact else interface.startswith(name) for name in names)
    return fits != excludes


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _temporary_folder(variables: Mapping[str, str]) -> list[Check]:
    name = "TMPDIR"
    folder = variables.get(name)
    if not folder or (os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK)):
        return []
    what = "cannot be written" if os.path.isdir(folder) else "no such folder"
    # Python goes on with /tmp, without a word.
    remedy = f"Python, compilers and CUDA disagree then: make it, or unset {name}"
    return [Check(name, f"{folder}: {what}", "BAD", remedy)]


def _plugins(variables: Mapping[str, str]) -> list[Check]:
    name = "VLLM_PLUGINS"
    if name not in variables or PLUGIN_NAME in variables[name].split(","):
        return []
    found = f"{variables[name] or 'empty'}: leaves {PLUGIN_NAME} out"
    return [Check(name, found, "BAD", f"add {PLUGIN_NAME} to it, or unset it")]


def check_open_files(soft: int, hard: int) -> Check:
    """Args: the limits of this process."""
    shown = _limit(soft) if soft == hard else f"{_limit(soft)}, can be raised to {_limit(hard)}"
    if soft != resource.RLIM_INFINITY and soft < FEWEST_OPEN_FILES:
        return Check("open files", shown, "BAD", f"ulimit -n {FEWEST_OPEN_FILES} at least")
    if hard != resource.RLIM_INFINITY and hard < OPEN_FILES:
        remedy = (
            f"migration of many samples needs more; in a container: --ulimit nofile={OPEN_FILES}"
        )
        return Check("open files", shown, "note", remedy)
    return Check("open files", shown, "ok")


def check_locked_memory(soft: int, adapters: bool, root: bool) -> list[Check]:
    """NCCL registers memory with InfiniBand adapters; nothing to say where there are none.

    root: the limit does not hold for it
    """
    if not adapters or root:
        return []
    if soft == resource.RLIM_INFINITY:
        return [Check("locked memory", "unlimited", "ok")]
    remedy = "NCCL over InfiniBand needs it unlimited: ulimit -l unlimited"
    return [Check("locked memory", f"{soft >> 10} KiB", "note", remedy)]


def check_home(home: Path) -> Check:
    """Triton, CUDA and vLLM keep what they have compiled below it."""
    if home.is_dir() and os.access(home, os.W_OK | os.X_OK):
        return Check("home folder", str(home), "ok")
    remedy = "Triton and vLLM keep compiled kernels there: set HOME to a folder that can be written"
    return Check("home folder", f"{home}: cannot be written", "note", remedy)


def _limit(value: int) -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else str(value)
