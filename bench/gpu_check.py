"""Build, test, sanitise and time the package on a machine with a CUDA device: ``make gpu-check``.

Every stage is a command of its own; a stage that fails does not stop the others. Tests and sanitizers run side by side,
and tests in many processes where pytest-xdist is there; what is timed runs alone. A record is written in any case: the
machine, the commit, each stage's exit status, seconds and last line (all of its last lines if it failed). Each suite of
benchmarks is a stage, whose own record lies beside it. Needs no network and no virtual environment: it uses what the
Python that runs it has installed.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import suites
from bench.__main__ import write
from bench.environment import RECORDS, ROOT, environment

WHOLE_S = 510  # all stages together
TAIL_LINES = 80  # kept of a stage that failed
BENCH_S = 1.0  # for one view of one workload: with nobody else on the machine, times hardly vary
NOT_FOUND = 127  # as a shell says it
HANGS_S = 180  # a test that takes longer waits for a kernel that never ends: its process tells where, and ends


def ends_when_hanging(seconds: float) -> tuple[str, ...]:
    """Options of pytest: a process that is stuck in a test so long shows where, and exits; xdist starts another."""
    return ("-o", f"faulthandler_timeout={seconds}", "-o", "faulthandler_exit_on_timeout=true")


@dataclass(frozen=True)
class Stage:
    """One command, the environment variables it is given besides, and the most seconds it may take.

    Stages that follow each other and are ``beside`` run at the same time.
    """

    command: tuple[str, ...]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False


def stages(out: Path, commit: str = "") -> dict[str, Stage]:
    """All stages by name, in the order they run; what is measured is written to ``out``."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "-ra", "--tb=short", *ends_when_hanging(HANGS_S), "tests")
    required = {"PAMA_EXT_REQUIRE_CUDA": "1"}
    if importlib.util.find_spec("xdist"):  # many processes of one thread, with some cores left for the sanitizers
        pytest += ("-n", str(max(1, (os.cpu_count() or 1) - 4)), "--dist", "worksteal")
        required["OMP_NUM_THREADS"] = "1"
    where = ("--out", str(out.resolve()), *(("--commit", commit) if commit else ()))
    bench = ("--device", "cuda", "--seconds", str(BENCH_S), *where)
    return {
        "build": Stage((python, "setup.py", "build_ext", "--inplace"), 240, {"PAMA_EXT_CUDA": "1"}),
        "tests": Stage(pytest, 400, required, beside=True),
        "gpu-tests": Stage((*pytest, "-m", "cuda"), 240, required, beside=True),
        **{tool: sanitizer(tool) for tool in ("memcheck", "racecheck", "initcheck", "synccheck")},
        "ceilings": Stage((python, "-m", "bench.ceilings", *where), 60),
        **{name: Stage((python, "-m", "bench", name, *bench), 420) for name in suites.NAMES},
    }


def sanitizer(tool: str) -> Stage:
    """The short run under one tool of compute-sanitizer, every tensor in an allocation of its own."""
    path = os.pathsep.join((os.environ.get("PATH", ""), f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"))
    program = shutil.which("compute-sanitizer", path=path) or "compute-sanitizer"
    command = (program, "--tool", tool, "--error-exitcode", "1", sys.executable, "-m", "bench.sanitize")
    return Stage(command, 120, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, beside=True)


def run(name: str, stage: Stage, limit_s: float) -> dict[str, Any]:
    """Run a stage, its output passed on as it comes, and return its entry in the record."""
    print(f"== {name}: {' '.join(stage.command)}", flush=True)
    start = time.monotonic()
    tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    try:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env={**os.environ, **stage.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        status, tail = NOT_FOUND, collections.deque([str(error)])
        print(error)
    else:
        watchdog = threading.Timer(limit_s, os.killpg, (process.pid, signal.SIGKILL))
        watchdog.start()
        with process:
            for line in process.stdout or ():
                print(f"{name}: {line}", end="", flush=True)
                tail.append(line.rstrip())
        watchdog.cancel()
        status = process.returncode
    seconds = time.monotonic() - start
    if status == -signal.SIGKILL:
        tail.append(f"killed after {seconds:.0f} s, allowed {limit_s:.0f} s")
    print(f"== {name}: exit status {status}, {seconds:.1f} s\n", flush=True)

    summary = next((line for line in reversed(tail) if line), "")
    entry = {"stage": name, "status": status, "seconds": round(seconds, 1), "summary": summary}
    return entry if status == 0 else {**entry, "output": list(tail)}


def check(chosen: dict[str, Stage]) -> list[dict[str, Any]]:
    """Run the chosen stages; what is over the time for the whole is cut off."""
    end = time.monotonic() + WHOLE_S

    def run_one(name: str) -> dict[str, Any]:
        return run(name, chosen[name], min(chosen[name].limit_s, max(1.0, end - time.monotonic())))

    entries = []
    for beside, names in itertools.groupby(chosen, key=lambda name: chosen[name].beside):
        together = list(names)
        with ThreadPoolExecutor(len(together) if beside else 1) as pool:
            entries += pool.map(run_one, together)
    return entries


def record_name(header: dict[str, Any]) -> str:
    """``DATE_DEVICE_COMMIT.json``, safe as a file name."""
    text = "_".join((header["date"][:16].replace(":", ""), header["device"], header["commit"]))
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text) + ".json"


def main(arguments: list[str] | None = None) -> int:
    """Run the stages asked for, write the record and return 0 if all of them passed, else 1."""
    names = tuple(stages(RECORDS))
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    usual = [name for name in names if name != "gpu-tests"]  # which are a part of "tests"
    parser.add_argument("--stages", nargs="+", choices=names, default=usual, metavar="STAGE",
                        help=f"of {', '.join(names)}; by default all but gpu-tests")  # fmt: skip
    parser.add_argument("--out", type=Path, default=RECORDS, help="folder for the records")
    parser.add_argument("--commit", default="", help="commit to record where there is no repository")
    options = parser.parse_args(arguments)

    header = environment("cuda")
    header["commit"] = options.commit or header["commit"]
    known = stages(options.out, options.commit)
    entries = check({name: stage for name, stage in known.items() if name in options.stages})
    write(options.out / record_name(header), {"header": header, "stages": entries})
    for entry in entries:
        verdict = "FAIL" if entry["status"] else "pass"
        print(f"{verdict}  {entry['stage']:<10} {entry['seconds']:6.1f} s  {entry['summary'][:90]}")
    return int(any(entry["status"] for entry in entries))


if __name__ == "__main__":
    sys.exit(main())
