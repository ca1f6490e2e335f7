"""Build hook of the project; everything declarative is in pyproject.toml.

This is where the C++ extensions of csrc/ (C++17, pybind11, no libtorch) are declared once they
exist: pyproject.toml cannot express a build that depends on the compiler and on CUDA.
"""

from setuptools import setup

setup()
