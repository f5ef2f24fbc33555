"""What no launch on a CUDA device can be faster than: ``python -m bench.ceilings``.

Compiles ``ceilings.cu`` with nvcc, runs it, and writes the device time of empty kernels and of barriers, in
microseconds, beside the other records.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.__main__ import write
from bench.environment import RECORDS, ROOT, environment


def compile_program(target: Path, architecture: str = "native") -> None:
    """Compile the program for an architecture, by default that of the device that is there."""
    path = os.pathsep.join((f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.environ.get("PATH", "")))
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        sys.exit("nvcc was not found: set CUDA_HOME or put it on PATH")
    source = ROOT / "bench" / "ceilings.cu"
    subprocess.run([nvcc, "-std=c++17", "-O3", f"-arch={architecture}", str(source), "-o", str(target)], check=True)


def main(arguments: list[str] | None = None) -> None:
    """Compile, run, print and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder for the record")
    parser.add_argument("--commit", help="commit to record where there is no repository")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "ceilings"
        compile_program(program)
        found = json.loads(subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout)
    header = environment("cuda")
    header["commit"] = options.commit or header["commit"]
    for name, microseconds in found.items():
        print(f"{name:<50} {microseconds:.3f}")
    write(options.out / "ceilings.json", {"header": header, "microseconds": found})


if __name__ == "__main__":
    main()
