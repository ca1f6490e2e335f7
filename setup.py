"""Build of the C++ and CUDA extensions, and where patches/ goes; the rest is in pyproject.toml.

`csrc/` is C++17 with pybind11 and without libtorch, so one build serves every torch. A compiler
is needed (g++ or clang++; $CXX chooses another).

The CUDA part is compiled where nvcc is, in $CUDA_HOME/bin or on PATH. RLHFUSE_CUDA=0 leaves it
out; RLHFUSE_CUDA=1 insists on it: no nvcc, or one that fails, is then an error. Without the
variable a CPU user is not kept waiting for a toolkit to be mended: the build says what failed and
goes on without.
"""

import os
import shutil
import subprocess
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import Extension, setup
from setuptools.errors import CompileError
from setuptools.modified import newer_group

ROOT = Path(__file__).resolve().parent
PATCHES = sorted(path.relative_to(ROOT) for path in ROOT.glob("patches/**/*") if path.is_file())
ARCHITECTURES = ("80", "90", "100")
"""Data-center GPUs: Ampere, Hopper, Blackwell. The newest one's PTX serves all that follow."""


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


class CudaExtension(Pybind11Extension):
    """One with kernels: nvcc compiles the .cu files and links, so that it finds its own runtime."""

    def __init__(self, name: str, folder: Path, nvcc: str, required: bool) -> None:
        super().__init__(
            name,
            sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.cpp")),
            cxx_std=17,
            depends=sorted(str(path.relative_to(ROOT)) for path in folder.parent.rglob("*.*")),
            extra_compile_args=["-O3", "-Wall", "-Wextra"],
            optional=not required,
        )
        self.kernels = sorted(str(path.relative_to(ROOT)) for path in folder.glob("*.cu"))
        self.nvcc = nvcc

    def link(self, objects: list[str], target: str) -> None:
        """Kernels and `objects` into a shared library, with the CUDA runtime in it."""
        known = _run([self.nvcc, "--list-gpu-code"]).split()
        chosen = [number for number in ARCHITECTURES if f"sm_{number}" in known]
        if not chosen:
            raise CompileError(f"{self.nvcc} knows none of sm_{', sm_'.join(ARCHITECTURES)}")
        codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in chosen]
        codes.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
        flags = ["-std=c++17", "-O3", "-shared", "-cudart=static", "-Xcompiler=-fPIC,-Wall"]
        _run([self.nvcc, *flags, *codes, *self.kernels, *objects, "-o", target])


class Build(build_ext):
    """Builds CudaExtensions, too, and leaves none behind that is out of date."""

    def run(self) -> None:
        if not any(isinstance(each, CudaExtension) for each in self.extensions):
            print(f"without {CUDA_MODULE}, packing on GPUs: {reason}", flush=True)
            self._remove(CUDA_MODULE)
        super().run()

    def build_extension(self, ext: Extension) -> None:
        if not isinstance(ext, CudaExtension):
            super().build_extension(ext)
            return
        target = self.get_ext_fullpath(ext.name)
        if not self.force and not newer_group([*ext.sources, *ext.depends, "setup.py"], target):
            return
        self._remove(ext.name)
        objects = self.compiler.compile(
            ext.sources,
            output_dir=self.build_temp,
            include_dirs=ext.include_dirs,
            extra_postargs=ext.extra_compile_args,
            depends=ext.depends,
        )
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        ext.link(objects, target)

    def _remove(self, name: str) -> None:
        """Neither an old build nor an old copy of it fits the other modules for sure."""
        built = self.get_ext_filename(name)
        for path in (Path(self.get_ext_fullpath(name)), Path(self.build_lib, built), ROOT / built):
            path.unlink(missing_ok=True)


def _run(command: list[str]) -> str:
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode:
        raise CompileError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout


def find_nvcc() -> tuple[str | None, str]:
    """nvcc, or why there is none to be used."""
    wish = os.environ.get("RLHFUSE_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"RLHFUSE_CUDA: want 0 or 1, got {wish}")
    if wish == "0":
        return None, "RLHFUSE_CUDA=0"
    home = os.environ.get("CUDA_HOME")
    found = (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")
    if found is None and wish == "1":
        raise SystemExit("RLHFUSE_CUDA=1: there is no nvcc in $CUDA_HOME/bin or on PATH")
    return found, "no nvcc in $CUDA_HOME/bin or on PATH"


CUDA_MODULE = "megatron_rlhfuse._packing_cuda"
nvcc, reason = find_nvcc()
extensions: list[Extension] = [
    extension(f"megatron_rlhfuse._{part}", ROOT / "csrc" / part)
    for part in ("planner", "dispatch", "packing")
]
if nvcc is not None:
    required = os.environ.get("RLHFUSE_CUDA") == "1"
    extensions.append(CudaExtension(CUDA_MODULE, ROOT / "csrc/packing/cuda", nvcc, required))

setup(
    ext_modules=extensions,
    cmdclass={"build_ext": Build},
    # `rlhfuse patch` looks for them there where it does not run from a checkout.
    data_files=[(f"share/megatron_rlhfuse/{path.parent}", [str(path)]) for path in PATCHES],
)
