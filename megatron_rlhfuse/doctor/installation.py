"""What is installed: versions, compiled parts, optional packages, the plugin.

Versions are read from package metadata; only the project's own compiled parts are imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from megatron_rlhfuse import versions
from megatron_rlhfuse.doctor.check import INSTALL, Check
from megatron_rlhfuse.doctor.torch_facts import Gpu

PLUGIN_GROUP = "vllm.general_plugins"
PLUGIN_NAME = "megatron_rlhfuse"

IMPORTED = {
    "torch": "torch",
    "megatron-core": "megatron.core",
    "vllm": "vllm",
    "transformers": "transformers",
}
"""Package -> the module that a job imports of it."""


def checks(gpus: Sequence[Gpu]) -> list[Check]:
    """All checks of this file. `gpus`: those that torch drives."""
    capabilities = [gpu.capability for gpu in gpus]
    return [
        check_python(sys.version_info[:3]),
        *(check_package(name) for name in versions.TESTED),
        *check_imports({module: _places(name, module) for name, module in IMPORTED.items()}),
        check_megatron_training(),
        check_compiled("_planner", "schedule search"),
        check_compiled("_dispatch", "dispatch of samples"),
        check_compiled("_packing", "packing of samples"),
        check_packing_on_gpus(capabilities),
        *(check_optional(name, bool(gpus)) for name in versions.OPTIONAL),
        check_plugin(),
    ]


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


def check_imports(places: Mapping[str, tuple[Path | None, Path | None]]) -> list[Check]:
    """Whether modules are those of installed packages, and not others that come first.

    places: for each module what `import` finds, None if nothing; and the folder that its package
        is installed in, None where any place is right
    """
    found = []
    for module, (origin, root) in places.items():
        subject = f"import {module}"
        if origin is None:
            found.append(Check(subject, "no such module", "BAD", INSTALL))
        elif root is not None and not origin.is_relative_to(root):
            remedy = f"hides the package in {root}: take it off PYTHONPATH, or rename it"
            found.append(Check(subject, f"finds {origin}", "BAD", remedy))
    return found or [Check("imports", "from the installed packages", "ok")]


def check_megatron_training() -> Check:
    """`megatron.training` is in megatron-core's wheels for Python >= 3.12 only."""
    subject = "megatron.training"
    if _find(subject) is not None:
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


def check_packing_on_gpus(capabilities: Sequence[tuple[int, int]]) -> Check:
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
        # setup.py adds the newest one's PTX, which later GPUs compile.
        ptx = f"compute_{max(int(name.removeprefix('sm_')) for name in built)}"
        foreign = [each for each in capabilities if not serves([*built, ptx], each)]
        if not foreign:
            return Check(subject, found, "ok")
        found += f", not for sm_{foreign[0][0]}{foreign[0][1]}"
    if capabilities:
        build = "RLHFUSE_CUDA=1 python setup.py build_ext --inplace"
        return Check(subject, found, "BAD", f"with nvcc on PATH, run {build}")
    return Check(subject, found, "note", "a machine with GPUs needs it")


def check_optional(name: str, gpus: bool) -> Check:
    optional = versions.OPTIONAL[name]
    found = versions.installed(name)
    if found is None:
        shown = f"not installed (optional: {optional.purpose})"
        if gpus and optional.on_gpus:
            return Check(name, shown, "note", optional.on_gpus)
        return Check(name, shown, "ok")
    shown = f"{found[1]} ({optional.purpose})"
    if optional.tested is not None and found[1] != optional.tested:
        return Check(name, shown, "note", f"tested: {optional.tested}")
    return Check(name, shown, "ok")


def check_plugin() -> Check:
    """Engines load the project's part in them through this entry point."""
    found = [e.value for e in metadata.entry_points(group=PLUGIN_GROUP) if e.name == PLUGIN_NAME]
    subject = "vLLM plugin"
    if found:
        return Check(subject, found[0], "ok")
    return Check(subject, f"no entry point {PLUGIN_NAME} in {PLUGIN_GROUP}", "BAD", INSTALL)


def serves(built: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a build runs on a GPU, by NVIDIA's rules.

    "sm_80" is code for its major number, from its minor one on; "sm_90a" for 9.0 alone; "sm_100f"
    as without the letter; "compute_120" is PTX, which this GPU and later ones compile.
    """
    major, minor = capability
    here = 10 * major + minor
    for name in built:
        parsed = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", name)
        if parsed is None:
            continue
        number, suffix = int(parsed[2]), parsed[3]
        if suffix == "a":
            fits = number == here
        elif parsed[1] == "compute":
            fits = number <= here
        else:
            fits = number // 10 == major and number % 10 <= minor
        if fits:
            return True
    return False


def _places(name: str, module: str) -> tuple[Path | None, Path | None]:
    """Where `module` would be imported from, and where the package `name` is installed."""
    origin = _find(module)
    found = versions.installed(name)
    if found is None:
        return origin, None
    try:
        distribution = metadata.distribution(found[0])
    except metadata.PackageNotFoundError:
        return origin, None
    source = json.loads(distribution.read_text("direct_url.json") or "{}")
    if source.get("dir_info", {}).get("editable"):
        return origin, None  # its modules are wherever its source tree is
    return origin, Path(str(distribution.locate_file(""))).resolve()


def _find(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except Exception:  # the parent package is missing, or another one that fails
        return None
    if spec is None:
        return None
    if spec.origin is not None:
        return Path(spec.origin).resolve()
    places = list(spec.submodule_search_locations or ())
    return Path(places[0]).resolve() if places else None
