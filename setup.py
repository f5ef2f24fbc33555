"""Builds pama_ext._C with ninja: C++ by the host compiler, CUDA by nvcc if there is one (no GPU needed to build).

Switches: PAMA_EXT_CUDA = auto (default: CUDA if nvcc is found) | 1 (stop if it cannot) | 0, and TORCH_CUDA_ARCH_LIST.
torch's own CUDAExtension is not used: it refuses a CPU-only torch, whose headers serve nvcc just as well.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import ninja
import pybind11
import torch
from ninja import ninja_syntax
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
TORCH = Path(torch.__file__).parent
DEFAULT_ARCHITECTURES = "8.0 9.0+PTX"
NAMED_ARCHITECTURES = {
    "Volta": "7.0",
    "Turing": "7.5",
    "Ampere": "8.0 8.6",
    "Ada": "8.9",
    "Hopper": "9.0",
    "Blackwell": "10.0",
}

# Nobody looks at errno or at floating-point traps; if they counted, GCC would not make vectors of what has a condition.
CXX_FLAGS = "-std=c++20 -O3 -DNDEBUG -fno-math-errno -fno-trapping-math -fPIC -fvisibility=hidden"
CXX_FLAGS += " -Wall -Wextra -Werror -Wno-psabi -Wno-ignored-attributes"
NVCC_FLAGS = "-std=c++17 -O3 -Werror all-warnings -Xcompiler -fPIC,-fvisibility=hidden,-Wall"
# By file name: instruction sets that the kernel chooses among at run time, and the libtorch ABI that door 1 targets.
EXTRA_FLAGS = {
    "isa_avx2": "-mavx2 -mfma" if platform.machine() == "x86_64" else "",
    "isa_avx512": "-mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma" if platform.machine() == "x86_64" else "",
    "torch_library": "-DTORCH_TARGET_VERSION=0x020a000000000000",
}


def find_nvcc() -> str | None:
    """Path of nvcc: CUDA_HOME's, the one on PATH, or the customary place; None without one or if switched off."""
    switch = os.environ.get("PAMA_EXT_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        sys.exit(f"PAMA_EXT_CUDA: expected auto, 0 or 1, got {switch!r}")
    if switch == "0":
        return None
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [homes[0] and f"{homes[0]}/bin/nvcc", shutil.which("nvcc"), f"{homes[1]}/bin/nvcc"]
    nvcc = next((path for path in candidates if path and Path(path).exists()), None)
    if nvcc is None and switch == "1":
        sys.exit("PAMA_EXT_CUDA=1, but nvcc was not found: set CUDA_HOME or put nvcc on PATH")
    return nvcc


def architectures() -> list[tuple[str, str]]:
    """(virtual, real) architectures of TORCH_CUDA_ARCH_LIST, such as ("compute_90", "sm_90")."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES
    pairs = []
    for entry in re.findall(
        r"[^;\s]+", " ".join(NAMED_ARCHITECTURES.get(name, name) for name in re.split(r"[;\s]+", listed))
    ):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if not match or int(match[1]) < 7:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: expected entries from 7.0 on, such as 9.0 or 9.0+PTX, got {entry!r}")
        number = match[1] + match[2]
        pairs.append((f"compute_{number}", f"sm_{number}"))
        if match[3]:
            pairs.append((f"compute_{number}", f"compute_{number}"))
    return pairs


def cuda_library(nvcc: str) -> Path:
    """Folder of libcudart_static.a, which the module carries so that a CPU-only torch can import it."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, check=False)
    top = re.search(r"TOP=(.+)", dry_run.stderr)  # nvcc itself may be a wrapper that lies elsewhere
    home = Path(top[1].strip() if top else os.path.realpath(nvcc) + "/../..").resolve()
    for folder in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib", f"lib/{platform.machine()}-linux-gnu"):
        if (home / folder / "libcudart_static.a").exists():
            return home / folder
    sys.exit(f"libcudart_static.a was not found under {home}; PAMA_EXT_CUDA=0 builds without CUDA")


class BuildWithNinja(build_ext):
    """Writes build.ninja, runs it, and leaves the module where setuptools wants it."""

    def build_extension(self, ext: Extension) -> None:
        # Not build_temp, which an editable install makes anew each time: ninja then would start from nothing.
        folder = ROOT / "build" / f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
        folder.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(folder / "build.ninja", "w") as file:
            self.write(ninja_syntax.Writer(file, width=120), target)
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
        if self.verbose > 1:
            command.append("-v")
        if subprocess.run(command, check=False).returncode:
            sys.exit("building pama_ext._C failed; the compiler's messages are above")

    @staticmethod
    def write(n: ninja_syntax.Writer, target: Path) -> None:
        """One rule per compiler, one edge per source file."""
        nvcc = find_nvcc()
        pairs = architectures() if nvcc else []
        defines = f'-DPAMA_BUILT_WITH_TORCH=\\"{torch.__version__}\\"'
        defines += f' "-DPAMA_CUDA_ARCHITECTURES=\\"{" ".join(real for _, real in pairs)}\\""'
        defines += " -DPAMA_WITH_CUDA" if nvcc else ""
        ours = f"-I{shlex.quote(f'{ROOT}/csrc/include')} -I{shlex.quote(f'{ROOT}/csrc')}"
        theirs = (f"{TORCH}/include", pybind11.get_include(), sysconfig.get_paths()["include"])
        includes = " ".join([ours, *(f"-isystem {shlex.quote(path)}" for path in theirs)])
        cxx = os.environ.get("CXX", "c++")

        n.variable("ninja_required_version", "1.5")
        n.rule("cxx", f"{cxx} $flags {CXX_FLAGS} {defines} {includes} -MMD -MF $out.d -c $in -o $out",
               depfile="$out.d", deps="gcc", description="C++ $in")  # fmt: skip
        sources, libraries = sorted(ROOT.glob("csrc/**/*.cpp")), f"-L{shlex.quote(f'{TORCH}/lib')} -ltorch -ltorch_cpu"
        if nvcc:
            codes = " ".join(f"-gencode arch={virtual},code={real}" for virtual, real in pairs)
            compiler = f"{shlex.quote(nvcc)} -ccbin {shlex.split(cxx)[-1]}"
            n.rule("nvcc", f"{compiler} {NVCC_FLAGS} {codes} -DPAMA_WITH_CUDA {ours} "
                   "-MMD -MF $out.d -c $in -o $out", depfile="$out.d", deps="gcc", description="CUDA $in")  # fmt: skip
            sources = sorted(ROOT.glob("csrc/**/*.cu")) + sources  # first: combine.cu takes longest
            libraries += f" -L{shlex.quote(str(cuda_library(nvcc)))} -lcudart_static -lrt -lpthread -ldl"
        objects = []
        for source in sources:
            out = source.relative_to(ROOT).with_suffix(source.suffix + ".o")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            n.build(str(out), rule, str(source), variables={"flags": EXTRA_FLAGS.get(source.stem, "")})
            objects.append(str(out))
        undefined = (
            "-undefined dynamic_lookup" if sys.platform == "darwin" else "-Wl,--no-as-needed -Wl,--exclude-libs,ALL"
        )
        n.rule("link", f"{cxx} -shared $in {undefined} {libraries} -o $out", description="link $out")
        n.build(str(target), "link", objects)


setup(ext_modules=[Extension("pama_ext._C", sources=[])], cmdclass={"build_ext": BuildWithNinja})
