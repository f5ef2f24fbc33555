"""How tests compile the kernels of csrc/cuda for the host: see cuda_on_host/cuda_runtime.h."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CXX = os.environ.get("CXX", "c++")
FLAGS = (
    "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-w", "-fPIC", "-shared", "-pthread", "-DPAMA_WITH_CUDA",
    "-fsanitize=alignment", "-fsanitize-undefined-trap-on-error",  # a GPU stops at 16 bytes that are not aligned
)  # fmt: skip

needs_compiler = pytest.mark.skipif(not shutil.which(CXX), reason=f"no C++ compiler: {CXX}")


def compiled(library: Path, *arguments: str) -> ctypes.CDLL:
    """Sources, definitions and folders of headers as a library; csrc's folders are known."""
    folders = (f"-I{ROOT}/{name}" for name in ("tests/cuda_on_host", "csrc/include", "csrc", "csrc/cuda"))
    subprocess.run([CXX, *FLAGS, *arguments, *folders, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))
