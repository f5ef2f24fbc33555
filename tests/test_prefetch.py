"""The loops over memory ask for what comes next, which no result shows.

GCC 12 takes a function that only prefetches for one without effect, and drops calls of it that are not inlined early:
then all tests pass, and calls on large tensors take a fifth longer.
"""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess

import pytest

from pama_ext import _C

LOOPS = {
    "observe_plain": {"prefetcht0", "prefetcht1"},  # into either cache, as the core likes it
    "solve_plain_tokens": {"prefetcht0", "prefetcht1"},
    "walk": {"prefetcht0"},
}
FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
PREFETCH = re.compile(r"\tprefetch\w+")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="not x86-64, or no objdump"
)


@functools.cache
def prefetches(module: str) -> dict[str, set[str]]:
    """The prefetch instructions in each function of a module, by its name; without the parts that GCC calls cold."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", module]
    found: dict[str, set[str]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        here: set[str] = set()
        for line in listing.stdout:
            if match := FUNCTION.match(line):
                here = set()
                if ".cold" not in match["name"]:
                    found[match["name"]] = here
            else:
                here.update(match.strip() for match in PREFETCH.findall(line))
    assert listing.returncode == 0
    return found


def functions_of(loop: str, kernels: str, module: str = _C.__file__) -> dict[str, set[str]]:
    """Those that hold a loop of one instruction set, whatever it was compiled for; all, where it is not by itself."""
    of_kernels = {name: found for name, found in prefetches(module).items() if f"pama::{kernels}::" in name}
    named = re.compile(rf"\bpama::{kernels}::\w+<\w+>::{loop}\b")
    return {name: found for name, found in of_kernels.items() if named.search(name)} or {
        "all": set().union(*of_kernels.values())
    }


@pytest.mark.parametrize(
    ("loop", "kernels"),
    [
        *(
            (loop, kernels)
            for loop in ("observe_plain", "solve_plain_tokens")
            for kernels in ("generic", "avx2", "avx512")
        ),
        *(("walk", kernels) for kernels in ("avx2", "avx512")),  # the other has too few registers for it
    ],
)
def test_the_next_tile_is_prefetched(loop, kernels):
    for name, found in functions_of(loop, kernels).items():
        assert found >= LOOPS[loop], name
