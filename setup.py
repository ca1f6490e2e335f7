"""Build of the C++ extensions; everything declarative is in pyproject.toml.

`csrc/` is C++17 with pybind11 and without libtorch, so one build serves every torch. A compiler
is needed (g++ or clang++; $CXX chooses another).
"""

from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).resolve().parent

setup(
    ext_modules=[
        Pybind11Extension(
            "megatron_rlhfuse._planner",
            ["csrc/planner.cpp"],
            cxx_std=17,
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.h")),
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            extra_link_args=["-pthread"],
        )
    ]
)
