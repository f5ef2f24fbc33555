"""The kernels for AVX-512 on a machine without it: their instructions are imitated (avx512_on_host/immintrin.h).

A second module is linked, of the objects of the build and of these kernels compiled once more, and the tests of every
instruction set run on it. Where there is AVX-512 they run anyhow.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import ninja
import pytest
import torch

from pama_ext import _C

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
# What is told to the compiler otherwise than in the build: no AVX-512, and that this machine has it.
CHANGES = {
    "isa_avx512": (r"(-mavx512\w+ )+", f"-mavx2 -I'{ROOT}/tests/avx512_on_host' "),
    "combine": ("-DNDEBUG", "-DNDEBUG '-D__builtin_cpu_supports(set)=1'"),
}

pytestmark = [
    pytest.mark.skipif(_C.cpu_instructions() == "avx512", reason="this machine has AVX-512"),
    pytest.mark.skipif(_C.cpu_instructions() == "generic", reason="no AVX2, of which the imitation is made"),
    pytest.mark.skipif(not (BUILD / "build.ninja").exists(), reason="the package was not built here"),
]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tests and the package, whose module has the imitation."""
    folder = tmp_path_factory.mktemp("avx512")
    for name in ("pama_ext", "tests", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)

    list_commands = [Path(ninja.BIN_DIR) / "ninja", "-C", BUILD, "-t", "commands"]
    commands = subprocess.run(list_commands, capture_output=True, text=True, check=True).stdout.splitlines()
    (link,) = (command for command in commands if " -shared " in command)
    compilers = []
    for name, (told, instead) in CHANGES.items():
        built, ours = f"csrc/cpu/{name}.cpp.o", shlex.quote(f"{folder}/{name}.o")
        (command,) = (command for command in commands if command.endswith(f" -o {built}"))
        for pattern, text in ((told, instead), ("-O3", "-O0"), (r"-MMD -MF \S+ ", ""), (built, ours)):
            command, changed = re.subn(pattern, text, command)
            assert changed == 1, command
        link = link.replace(built, ours)
        compilers.append(subprocess.Popen(command, shell=True, cwd=BUILD))
    assert [compiler.wait() for compiler in compilers] == [0, 0]
    module = folder / "pama_ext" / Path(_C.__file__).name
    link = f"{link.rpartition(' -o ')[0]} -o {shlex.quote(str(module))}"
    subprocess.run(link, shell=True, cwd=BUILD, check=True)
    return folder


def test_all_that_is_tested_of_every_instruction_set(checkout):
    others = [f"--ignore-glob=*test_{name}*" for name in ("*on_host", "bench", "prefetch")]
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-k", "avx512", *others, "tests"]
    alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    run = subprocess.run(command, cwd=checkout, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    assert "no avx512" not in run.stdout  # none of them skipped
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 1000
