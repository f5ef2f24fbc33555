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
from collections import Counter

import pytest

from pama_ext import _C

LOOPS = {
    "add_up": {"prefetcht0", "prefetcht1"},  # into either cache, as the core likes it
    "add_blocks": {"prefetcht0", "prefetcht1"},
    "solve_plain_tokens": {"prefetcht0", "prefetcht1"},
    "walk": {"prefetcht0"},
}
FUNCTION = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
PREFETCH = re.compile(r"\tprefetch\w+")

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which("objdump") is None, reason="not x86-64, or no objdump"
)


@functools.cache
def prefetches(module: str) -> dict[str, Counter[str]]:
    """The prefetch instructions in each function of a module, by its name; without the parts that GCC calls cold."""
    command = ["objdump", "--disassemble", "--demangle", "--no-show-raw-insn", module]
    found: dict[str, Counter[str]] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as listing:
        assert listing.stdout is not None
        here: Counter[str] = Counter()
        for line in listing.stdout:
            if match := FUNCTION.match(line):
                here = Counter()
                if ".cold" not in match["name"]:
                    found[match["name"]] = here
            else:
                here.update(match.strip() for match in PREFETCH.findall(line))
    assert listing.returncode == 0
    return found


def functions_of(loop: str, kernels: str, module: str = _C.__file__) -> dict[str, Counter[str]]:
    """Those that hold a loop of one instruction set, whatever it was compiled for; all, where it is not by itself."""
    of_kernels = {name: found for name, found in prefetches(module).items() if f"pama::{kernels}::" in name}
    named = re.compile(rf"\bpama::{kernels}::\w+<\w+>::{loop}<")
    return {name: found for name, found in of_kernels.items() if named.search(name)} or {
        "all": sum(of_kernels.values(), Counter())
    }


@pytest.mark.parametrize(
    ("loop", "kernels"),
    [
        *(
            (loop, kernels)
            for loop in ("add_up", "add_blocks", "solve_plain_tokens")
            for kernels in ("generic", "avx2", "avx512")
        ),
        *(("walk", kernels) for kernels in ("avx2", "avx512")),  # the other has too few registers for it
    ],
)
def test_the_next_tile_is_prefetched(loop, kernels):
    if loop.startswith("add"):  # never part of another function
        assert "all" not in functions_of(loop, kernels)
    for name, found in functions_of(loop, kernels).items():
        assert found.keys() >= LOOPS[loop], name


@pytest.mark.parametrize(("kernels", "most"), [("avx2", 6), ("avx512", 4)])
def test_the_walk_asks_for_each_objective_and_for_what_stands_beside_them(kernels, most):
    """A line of each, the gates' among them, in each of its forms."""
    seen = set()
    for name, found in functions_of("walk", kernels).items():
        if match := re.search(r"::walk<(\d+), (?:true|false), (?:true|false), ", name):
            seen.add(n := int(match[1]))
            assert found["prefetcht0"] >= n + 1, name
    if not seen:
        pytest.skip("the compiler has made it part of another function")
    assert seen == set(range(2, most + 1))
