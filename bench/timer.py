"""Timing of several candidates in one interleaved run, and the header that every benchmark record carries.

Machines change speed for minutes at a time, so a time by itself says little. Candidates take turns in short blocks,
and what is reported besides the quantiles of each is the median of the ratios taken round by round.
"""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]  # (call, how many times) -> seconds for all of them
Times = dict[str, list[float]]  # seconds per call of each candidate, one entry per round

SETTLE_S = 0.01  # OpenMP workers spin for about 8 ms after a parallel region and would slow the next candidate
CUDA_CALLS = 8  # per block: few enough that the launch queue never fills and the host never waits for the device
GRAPH_CALLS = 20  # captured into one CUDA graph


def host_clock(call: Call, calls: int) -> float:
    """Seconds the host spends in ``calls`` calls; work queued on a device is waited for before and after, untimed."""
    _synchronize()
    gc.disable()
    try:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return time.perf_counter() - start
    finally:
        gc.enable()
        _synchronize()


def device_clock(replay: Call, calls: int) -> float:
    """Seconds the device spends in ``calls`` replays of a CUDA graph."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def graph_replay(call: Call) -> Call:
    """The replay of a CUDA graph that holds ``GRAPH_CALLS`` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            call()
    return graph.replay


def interleave(
    candidates: Mapping[str, Call],
    *,
    budget_s: float,
    clock: Clock = host_clock,
    block_s: float = 5e-4,
    max_calls: int = 1000,
    rounds: tuple[int, int] = (5, 300),
    settle_s: float = 0.0,
) -> Times:
    """Time the candidates in turn, round after round, each starting one place later than the round before.

    Args:
        candidates: what to time, already warm.
        budget_s: about how long the whole may take, seconds.
        clock: how a block of calls is timed.
        block_s: about how long one block lasts, seconds; at least one call.
        max_calls: most calls in a block.
        rounds: fewest and most rounds.
        settle_s: pause before each block, seconds.

    Returns:
        Seconds per call of each candidate, one entry per round: entry r of all candidates belongs together.
    """
    once = {name: min(clock(call, 1) for _ in range(2)) for name, call in candidates.items()}
    calls = {name: max(1, min(max_calls, round(block_s / max(seconds, 1e-9)))) for name, seconds in once.items()}
    round_s = sum(once[name] * (calls[name] + 1) + settle_s for name in candidates)
    repeats = max(rounds[0], min(rounds[1], round(budget_s / round_s)))

    names = list(candidates)
    times: Times = {name: [] for name in names}
    for r in range(repeats):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(settle_s)
            clock(candidates[name], 1)  # untimed: what the candidate before left in the caches is not its fault
            times[name].append(clock(candidates[name], calls[name]) / calls[name])
    return times


def interleave_device(candidates: Mapping[str, Call], *, budget_s: float) -> Times:
    """As :func:`interleave`, in seconds of the device alone: back to back in a CUDA graph, without the host."""
    replays = {name: graph_replay(call) for name, call in candidates.items()}
    times = interleave(replays, budget_s=budget_s, clock=device_clock)
    return {name: [seconds / GRAPH_CALLS for seconds in per_replay] for name, per_replay in times.items()}


def ratio(times: Times, name: str, base: str) -> float:
    """Median over the rounds of how many times as long ``name`` took as ``base``."""
    return statistics.median(a / b for a, b in zip(times[name], times[base], strict=True))


def quantiles(seconds: list[float]) -> dict[str, float]:
    """``{"p20_us", "p50_us", "p80_us"}`` of a list of seconds, in microseconds."""
    ordered = sorted(seconds)
    return {f"p{p}_us": ordered[round(p / 100 * (len(ordered) - 1))] * 1e6 for p in (20, 50, 80)}


def environment(device: str) -> dict[str, Any]:
    """Where and with what a record was made: device, CPU, driver, CUDA, torch, python, commit, date, threads, load."""
    cuda = device == "cuda" and torch.cuda.is_available()
    driver = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "cpu": _cpu_model(),
        "driver": _output(*driver).partition("\n")[0] if cuda else "",
        "cuda": torch.version.cuda or "",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),  # times of threaded calls mean little where others hold the cores
    }


def commit() -> str:
    """The commit checked out, with "-dirty" if tracked files differ from it; "unknown" outside a repository."""
    return _output("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"


def table(columns: list[str], rows: list[list[str]]) -> str:
    """Plain text with aligned columns: the first to the left, the others to the right."""
    cells = [columns, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in cells]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a record, making its folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {path}", file=sys.stderr)


def _synchronize() -> None:
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _output(*command: str) -> str:
    """What a command prints, or "" if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
