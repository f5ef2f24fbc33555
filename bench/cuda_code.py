"""What the CUDA compiler made of the kernels, judged without a GPU: ``python -m bench.cuda_code``.

Each file of kernels is compiled for each architecture with ``-Xptxas -v``; registers, stack frames and spills are what
ptxas says, and in the machine code the loads of 16 bytes and the accesses to local memory are counted. Needs nvcc, and
``cuobjdump`` and ``nvdisasm`` from the packages of these names.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from bench.environment import commit
from bench.tables import plain

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURES = ("80", "90", "100", "120")
FLAGS = ("-std=c++17", "-O3", "-DPAMA_WITH_CUDA", f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc")


@dataclass(frozen=True)
class Limit:
    """What a kernel may need, and how many loads of 16 bytes it must have."""

    registers: int
    wide_loads: int = 0


# Registers: what lets two blocks of 256 threads reside on a multiprocessor (128 a thread) or four (64); elsewhere
# hardly more than is needed. Loads: all that there are, by the types' sizes, so that one narrow layout is noticed: N at
# once or in turns up to 8 objectives, eight and one for 9 to 16 and for more, four and one by planes, and beside them.
# The direct kernels read their objectives twice, and a log_ratio as wide as they are once. What those for two and more
# read for the combination, some compilers cut down to what has a weight; that for one reads it as a whole, and has four
# loads more that bring objectives to shared memory.
LIMITS = {
    r"combine_kernel<(float|double)": Limit(128, wide_loads=148),
    r"combine_kernel<(Half|BFloat16)": Limit(128, wide_loads=94),
    **{
        f"combine_direct_kernel<({types}), {many}": Limit(registers, loads + beside)
        for types, beside in (("float", 1), ("double", 0), ("Half|BFloat16", 2))
        for many, registers, loads in ((1, 64, 7), (2, 128, 4), (3, 128, 6), (4, 128, 8))
    },
    r"gae_(warp|block)_kernel": Limit(64),
    r"policy_loss_kernel": Limit(128, wide_loads=15),
    r"value_loss_kernel": Limit(128, wide_loads=9),
    r"scale_kernel<float": Limit(40, wide_loads=1),
    r"scale_kernel<double": Limit(40, wide_loads=2),
    r"scale_kernel<(Half|BFloat16)": Limit(40),
    r"min_norm_kernel": Limit(96),
    r"measure_|rewrite|sum_rows|number_rows|find_groups": Limit(80),
}


@dataclass(frozen=True)
class Kernel:
    """A kernel on an architecture: registers a thread, bytes of stack and of spills, instructions of two kinds."""

    architecture: str
    name: str
    registers: int
    stack: int
    spilled: int
    wide_loads: int
    local_accesses: int

    def complaints(self) -> list[str]:
        """What is not as it should be."""
        limit = next((limit for pattern, limit in LIMITS.items() if re.search(pattern, self.name)), None)
        if limit is None:
            return ["no limits are set"]
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes are spilled")
        if self.registers > limit.registers:
            found.append(f"{self.registers} registers, expected at most {limit.registers}")
        if self.stack:
            found.append(f"a stack frame of {self.stack} bytes")
        if self.local_accesses:
            found.append(f"{self.local_accesses} accesses to local memory")
        if self.wide_loads < limit.wide_loads:
            found.append(f"{self.wide_loads} loads of 16 bytes, expected at least {limit.wide_loads}")
        return found


def tool(name: str) -> str | None:
    """Path of nvcc, cuobjdump or nvdisasm: of a package, of ``CUDA_HOME``, or on PATH."""
    packages = importlib.util.find_spec("nvidia")
    folders = [path for place in (packages.submodule_search_locations or () if packages else ())
               for path in Path(place).glob("cu*/bin")]  # fmt: skip
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin")
    return shutil.which(name, path=os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")]))


def complete() -> bool:
    """Whether all tools are there."""
    return all(tool(name) for name in ("nvcc", "cuobjdump", "nvdisasm", "c++filt"))


def kernels_of(source: Path, architecture: str, *flags: str) -> list[Kernel]:
    """The kernels of a file, compiled for an architecture, with more flags for nvcc."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/kernels.cubin"
        compiler = [str(tool("nvcc")), *FLAGS, *flags, "-Xptxas", "-v", "-cubin", f"-arch=sm_{architecture}"]
        told = run([*compiler, str(source), "-o", cubin]).stderr
        code = run([str(tool("cuobjdump")), "-sass", cubin]).stdout
    entry = re.compile(r"properties for (\w+)\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill "
                       r"loads\n.*?Used (\d+) registers")  # fmt: skip
    function = re.compile(r"Function : (\w+)\n(.*?)(?=Function :|\Z)", re.DOTALL)
    counts = {name: Counter(re.findall(r"\b(LDG?\.E\.128|LDL|STL)\b", body)) for name, body in function.findall(code)}
    found = []
    for name, stack, stores, loads, registers in entry.findall(told):
        if "3cub" in name:  # CUB's own
            continue
        counted = counts[name]
        found.append(
            Kernel(architecture, readable(name), int(registers), int(stack), int(stores) + int(loads),
                   counted["LDG.E.128"] + counted["LD.E.128"], counted["LDL"] + counted["STL"])
        )  # fmt: skip
    if not found:
        raise RuntimeError(f"{source.name}: ptxas names no kernel:\n{told}")
    return found


def readable(mangled: str) -> str:
    """``combine_kernel<float, (Kind)0>``."""
    name = run(["c++filt", mangled]).stdout.strip()
    name = re.sub(r"\(pama::\w+Params\)$", "", name)
    return re.sub(r"^void |pama::|\(anonymous namespace\)::|_GLOBAL__N__\w+::", "", name)


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """A command that has to succeed; what it says is shown if it does not."""
    environment = {**os.environ, "PATH": os.pathsep.join((str(Path(command[0]).parent), os.environ.get("PATH", "")))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done


def survey(architectures: Iterable[str] = ARCHITECTURES) -> list[Kernel]:
    """All kernels on all architectures."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    jobs = [(source, architecture) for architecture in architectures for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(lambda job: kernels_of(*job), jobs) for kernel in kernels]


def main(arguments: list[str] | None = None) -> int:
    """Print what was found, and return 1 if there is something to complain of."""
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_code", description=__doc__.partition("\n")[0])
    parser.add_argument("architectures", nargs="*", default=ARCHITECTURES, help="such as 90; default: %(default)s")
    parser.add_argument("--out", type=Path, help="a file for the record; without it none is written")
    options = parser.parse_args(arguments)
    header = {"commit": commit(), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}  # of what is compiled
    kernels = survey(options.architectures)
    rows = [[k.name, f"sm_{k.architecture}", *map(str, (k.registers, k.stack, k.spilled, k.wide_loads)),
             "; ".join(k.complaints())] for k in kernels]  # fmt: skip
    print(plain(["kernel", "", "registers", "stack", "spilled", "16-byte loads", ""], rows))
    if options.out:
        compiler = run([str(tool("nvcc")), "--version"]).stdout.strip().rpartition("\n")[2]
        header["compiler"] = compiler
        lines = ",\n".join(json.dumps(dataclasses.asdict(kernel)) for kernel in kernels)  # a line for each
        options.out.write_text(f'{{"header": {json.dumps(header)}, "kernels": [\n{lines}\n]}}\n')
    return int(any(k.complaints() for k in kernels))


if __name__ == "__main__":
    sys.exit(main())
