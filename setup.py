"""Build of the C++ extensions, and where patches/ goes; the rest is in pyproject.toml.

`csrc/` is C++17 with pybind11 and without libtorch, so one build serves every torch. A compiler
is needed (g++ or clang++; $CXX chooses another).
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).resolve().parent
PATCHES = sorted(path.relative_to(ROOT) for path in ROOT.glob("patches/**/*") if path.is_file())


def extension(name: str, folder: Path) -> Pybind11Extension:
    """A module of the sources in a folder."""
    return Pybind11Extension(
        name,
        sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.cpp")),
        cxx_std=17,
        depends=sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.h")),
        extra_compile_args=["-O3", "-Wall", "-Wextra"],
        extra_link_args=["-pthread"],
    )


setup(
    ext_modules=[
        extension(f"megatron_rlhfuse._{part}", ROOT / "csrc" / part)
        for part in ("planner", "dispatch")
    ],
    # `rlhfuse patch` looks for them there where it does not run from a checkout.
    data_files=[(f"share/megatron_rlhfuse/{path.parent}", [str(path)]) for path in PATCHES],
)
