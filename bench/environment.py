"""Where, with what and of which commit a record was made: the header that every one carries."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "bench" / "records"
GENERATED = ("README.md", "bench/records", "docs/plots")  # a benchmark writes them; they change no figure
PEERS = ("trl", "verl", "torchrl", "torchjd", "liger-kernel", "numba", "triton")
PROCESSOR = Path("/proc/cpuinfo")
UNKNOWN_CACHE = 64 << 20  # bytes, where the system does not tell


def environment(device: str) -> dict[str, Any]:
    """Device, driver, processor, caches, threads, versions of everything measured, commit, date, load."""
    cuda = device == "cuda" and torch.cuda.is_available()
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "driver": _output(*driver).partition("\n")[0] if cuda else "",
        "cuda": torch.version.cuda or "",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": _instructions(),
        "caches": _caches() | ({"device": cache_bytes("cuda")} if cuda else {}),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": {name: version for name in PEERS if (version := _version(name))},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),  # times of threaded calls mean little where others hold the cores
    }


def commit() -> str:
    """The commit checked out, with "-dirty" if what could change a figure differs from it; "unknown" outside git."""
    name = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    others = [f":(exclude){path}" for path in GENERATED]
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no", "--", ".", *others)
    return f"{name}-dirty" if name and changed else name or "unknown"


def cache_bytes(device: str) -> int:
    """Size of the last cache before the memory of ``"cpu"`` or ``"cuda"``."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties("cuda").L2_cache_size)
    return max(_caches().values(), default=UNKNOWN_CACHE)


def _caches() -> dict[str, int]:
    """Bytes of the first core's data caches: ``{"L1": ..., "L2": ..., "L3": ...}``."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}"] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
    return found


def _instructions() -> str:
    """Which CPU kernel of this package runs here; "" where the package is not built yet."""
    try:
        from pama_ext import _C
    except ImportError:
        return ""
    return _C.cpu_instructions()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cpu_model() -> str:
    """Its name, and by which numbers the maker knows it: virtual machines shorten the name."""
    lines = PROCESSOR.read_text().splitlines() if PROCESSOR.exists() else []
    said = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    numbers = (f"{key.rpartition(' ')[2]} {said[key]}" for key in ("cpu family", "model") if key in said)
    return ", ".join((said.get("model name") or platform.processor(), *numbers))


def _output(*command: str) -> str:
    """What a command prints, or "" if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
