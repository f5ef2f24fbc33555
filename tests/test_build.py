"""Build switches: what is asked for and impossible stops the build with an error that names the switch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout")


def build(folder: Path, **switches: str) -> subprocess.CompletedProcess[str]:
    """Start a build in a copy, whose path has a space in it; these all end before anything is compiled."""
    copy = folder / "a copy"
    copy.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("csrc", "pama_ext"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    return subprocess.run(
        command, cwd=copy, env={**os.environ, **switches}, capture_output=True, text=True, check=False
    )


def test_a_switch_has_three_positions(tmp_path):
    run = build(tmp_path, PAMA_EXT_CUDA="yes")
    assert run.returncode != 0 and "PAMA_EXT_CUDA: expected auto, 0 or 1, got 'yes'" in run.stderr


@pytest.mark.skipif(not NVCC, reason="without nvcc no architectures are read")
@pytest.mark.parametrize("listed", ["9.0 wrong", "5.2", "sm_90", "9"])
def test_architectures_are_checked(tmp_path, listed):
    run = build(tmp_path, PAMA_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=listed)
    assert run.returncode != 0 and "TORCH_CUDA_ARCH_LIST: expected entries from 7.0 on" in run.stderr
    assert repr(listed.split()[-1]) in run.stderr


@pytest.mark.skipif(bool(NVCC), reason="nvcc is here")
def test_cuda_that_is_asked_for_and_missing_stops_the_build(tmp_path):
    run = build(tmp_path, PAMA_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode != 0 and "PAMA_EXT_CUDA=1, but nvcc was not found" in run.stderr


def test_a_compiler_that_fails_stops_the_build(tmp_path):
    """And a path with a space in it reaches that compiler as one path."""
    run = build(tmp_path, PAMA_EXT_CUDA="0", CXX="false")
    assert run.returncode != 0 and "building pama_ext._C failed" in run.stderr
    assert "unknown target" not in run.stdout + run.stderr


@pytest.mark.skipif(not NVCC, reason="without nvcc no architectures are read")
@pytest.mark.parametrize(
    ("listed", "codes"),
    [
        ("", ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_90,code=compute_90"]),  # the default
        ("8.0;9.0a;", ["compute_80,code=sm_80", "compute_90a,code=sm_90a"]),
        ("Hopper 12.0+PTX", ["compute_90,code=sm_90", "compute_120,code=sm_120", "compute_120,code=compute_120"]),
    ],
)
def test_architectures_reach_the_compiler(tmp_path, listed, codes):
    build(tmp_path, PAMA_EXT_CUDA="1", TORCH_CUDA_ARCH_LIST=listed, CXX="false")
    rules = next(tmp_path.glob("a copy/build/*/build.ninja")).read_text().replace("$\n", "").replace("  ", " ")
    found = [word.removeprefix("arch=") for word in rules.split() if word.startswith("arch=")]
    assert found == codes
