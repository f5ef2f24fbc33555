"""Cost of one ``combine`` beside what a user would run instead: ``python -m bench.latency``.

Every candidate is first verified against the float64 reference, then all of them are timed in one interleaved run
(see :mod:`bench.timer`). All compute level "batch", Noon, closed form and every statistic.

Two copies by ``Tensor.copy_`` show what the memory can do. ``copy`` moves as many bytes as ``combine`` has to (each
input read once, the result written once), so both find the caches alike; ``copy, cold`` moves more than caches hold,
and is compared by bytes per second.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import baselines, timer
from bench.timer import Call, Times

try:
    from bench.numba_loop import numba_loop
except ImportError:  # numba is an optional comparison
    numba_loop = None

UNIT, COPY, COLD = "a + a", "copy", "copy, cold"
OURS, OURS_OUT, CUSTOM_OP = "combine", "combine, out=", "custom_op in Python"
EAGER, NUMBA = "eager PyTorch", "numba loop"
HOST_ONLY = ("dispatcher", "dispatcher, out=", CUSTOM_OP)  # on the device, the kernel of `combine`
COLD_BYTES = 1 << 26  # read, and as many written
QUICK_S, FULL_S = 0.3, 4.0  # timing budget of a workload
THREADS_FROM = 32768  # elements from which a candidate may use threads
ROUNDING = 64 * torch.finfo(torch.float32).eps  # of the largest magnitude expected


@dataclass(frozen=True)
class Workload:
    """One input: ``advantages`` of a shape, alone or with a bool ``mask`` and a ``log_ratio``; float32."""

    shape: tuple[int, ...]
    masked: bool = True
    quick: bool = True  # part of a --quick run

    def __str__(self) -> str:
        return f"{list(self.shape)}{', mask, log_ratio' if self.masked else ''}"

    @property
    def bytes(self) -> int:
        """Bytes that have to move: each input read once, the result written once."""
        tokens = math.prod(self.shape[:-1])
        return tokens * (4 * self.shape[-1] + (1 + 4 if self.masked else 0) + 4)

    def inputs(self, device: str) -> tuple[Tensor, dict[str, Tensor]]:
        """The advantages and the keyword arguments, the same in every run."""
        generator = torch.Generator().manual_seed(0)
        advantages = torch.randn(self.shape, generator=generator).to(device)
        if not self.masked:
            return advantages, {}
        mask = torch.rand(self.shape[:-1], generator=generator) < 0.9
        log_ratio = 0.2 * torch.randn(self.shape[:-1], generator=generator)
        return advantages, {"mask": mask.to(device), "log_ratio": log_ratio.to(device)}


HOST, SMALL, SMALL_TOKENS = Workload((4, 2), masked=False), Workload((64, 3)), Workload((8, 128, 2))
LARGE, WIDE = Workload((512, 1024, 3)), Workload((512, 1024, 10), quick=False)
WORKLOADS = (HOST, SMALL, SMALL_TOKENS, Workload((64, 512, 3)), LARGE, WIDE)


@dataclass(frozen=True)
class Gate:
    """A figure to hold: the ratio of two candidates on one workload, at most or at least a bound."""

    workload: Workload
    name: str
    base: str
    bound: float
    at_most: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def judge(self, measured: dict[Workload, Times]) -> str:
        """One line: PASS, MISS or "not measured"."""
        sign = "<=" if self.at_most else ">="
        text = f"{self.name} / {self.base} {sign} {self.bound:g} on {self.workload}"
        times = measured.get(self.workload, {})
        if self.name not in times or self.base not in times:
            return f"-     {text}: not measured"
        value = timer.ratio(times, self.name, self.base)
        held = value <= self.bound if self.at_most else value >= self.bound
        return f"{'PASS' if held else 'MISS'}  {text}: {value:.2f}"


GATES = (
    Gate(HOST, OURS, UNIT, 2.0, at_most=True),
    Gate(HOST, OURS_OUT, UNIT, 1.2, at_most=True),
    Gate(HOST, CUSTOM_OP, OURS, 3.0),
    Gate(HOST, EAGER, OURS, 3.0),
    Gate(SMALL, EAGER, OURS, 40.0, devices=("cpu",)),
    Gate(SMALL_TOKENS, EAGER, OURS, 40.0, devices=("cpu",)),
    Gate(LARGE, EAGER, OURS, 15.0, devices=("cpu",)),
    *(Gate(workload, NUMBA, OURS, 1.0, devices=("cpu",)) for workload in WORKLOADS if workload.masked),
)


def written(function: Callable[..., Any], advantages: Tensor, options: dict[str, Tensor], out: Tensor | None) -> Call:
    """The call as a user writes it; unpacking stored keywords instead would add a tenth to the smallest calls."""
    if not options:
        return (lambda: function(advantages)) if out is None else (lambda: function(advantages, out=out))
    mask, log_ratio = options["mask"], options["log_ratio"]
    if out is None:
        return lambda: function(advantages, mask=mask, log_ratio=log_ratio)
    return lambda: function(advantages, mask=mask, log_ratio=log_ratio, out=out)


def candidates(workload: Workload, device: str, *, compiled: bool) -> dict[str, Call]:
    """What is timed on one workload; the computations among them have been verified."""
    advantages, options = workload.inputs(device)
    out = torch.empty(workload.shape[:-1], device=device)
    dispatcher = pama_ext._combine._combine_dispatcher
    functions: dict[str, tuple[Callable[..., Any], Tensor | None]] = {
        OURS: (pama_ext.combine, None),
        OURS_OUT: (pama_ext.combine, out),
        "dispatcher": (dispatcher, None),
        "dispatcher, out=": (dispatcher, out),
        EAGER: (baselines.eager, None),
        "reference": (pama_ext.reference.combine, None),
    }
    if compiled:
        functions["torch.compile"] = baselines.compiled(), None
    if numba_loop is not None and device == "cpu" and workload.masked:
        functions[NUMBA] = numba_loop, None
    if not options:
        functions[CUSTOM_OP] = baselines.custom_op, None
    calls = {name: written(function, advantages, options, to) for name, (function, to) in functions.items()}
    expected = pama_ext.reference.combine(advantages.double(), **options)
    for name, call in calls.items():
        verify(name, call(), expected)

    small = torch.ones(4, 2, device=device)
    calls = {UNIT: lambda: small + small, **calls}
    if advantages.numel() >= THREADS_FROM:
        for name, size in ((COPY, workload.bytes // 2), (COLD, COLD_BYTES)):
            source, target = torch.zeros(2, size // 4, device=device)
            calls[name] = functools.partial(target.copy_, source)
    return calls


def verify(name: str, result: Any, expected: pama_ext.Combined) -> None:
    """Stop unless the combined advantages, and the weights if there are any, are those of the float64 reference."""
    got = (result,) if isinstance(result, Tensor) else result[:2]
    for what, ours, theirs in zip(("combined", "weights"), got, expected, strict=False):
        error = (torch.as_tensor(ours, device=theirs.device).double() - theirs).abs().max()
        if not error <= ROUNDING * theirs.abs().max():
            raise SystemExit(f"{name}: {what} differ from the reference by {error:.3g}")


def measure(workload: Workload, device: str, *, compiled: bool, budget_s: float) -> dict[str, Times]:
    """Seconds per call of every candidate: ``{"host": ...}``, and ``"device"`` on CUDA."""
    calls = candidates(workload, device, compiled=compiled)
    if device == "cuda":
        host = timer.interleave(calls, budget_s=budget_s, max_calls=timer.CUDA_CALLS)
        kernels = {name: call for name, call in calls.items() if name not in HOST_ONLY}
        return {"host": host, "device": timer.interleave_device(kernels, budget_s=budget_s)}
    if COPY in calls and torch.get_num_threads() > 1:
        return {"host": timer.interleave(calls, budget_s=budget_s, block_s=timer.SETTLE_S / 2, settle_s=timer.SETTLE_S)}
    return {"host": timer.interleave(calls, budget_s=budget_s)}


def report(workload: Workload, side: str, times: Times) -> list[dict[str, Any]]:
    """Print the table of one timed run and return its rows."""
    rows: list[dict[str, Any]] = []
    for name, seconds in times.items():
        row = {"candidate": name, **timer.quantiles(seconds), "rounds": len(seconds)}
        row |= {f"/ {base}": timer.ratio(times, name, base) for base in (UNIT, OURS)}
        if COPY in times and name not in (UNIT, COPY, COLD):
            row[f"% of {COPY}"] = 100 * timer.ratio(times, COPY, name)
            row[f"% of {COLD}"] = 100 * timer.ratio(times, COLD, name) * workload.bytes / (2 * COLD_BYTES)
        rows.append(row)
    columns = [key for key in max(rows, key=len) if key not in ("candidate", "rounds")]
    cells = [[row["candidate"], *(f"{row[c]:.2f}" if c in row else "" for c in columns)] for row in rows]
    headings = ["", *(column.replace("_us", " µs") for column in columns)]
    print(f"\n{workload}: {side} time, {rows[0]['rounds']} rounds\n{timer.table(headings, cells)}")
    if COPY in times:
        speeds = {COPY: workload.bytes, COLD: 2 * COLD_BYTES}
        print(", ".join(f"{c}: {size / statistics.median(times[c]) / 1e9:.1f} GB/s" for c, size in speeds.items()))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Verify, time, print the tables and the gates, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds, no torch.compile, no widest workload")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="threads of PyTorch, numba and pama_ext")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no CUDA device")
    if options.threads:
        torch.set_num_threads(options.threads)

    record: dict[str, Any] = {"header": timer.environment(options.device), "tables": []}
    print("  ".join(f"{key}: {value}" for key, value in record["header"].items() if value != ""))
    measured: dict[Workload, Times] = {}
    for workload in WORKLOADS:
        if options.quick and not workload.quick:
            continue
        budget_s = QUICK_S if options.quick else FULL_S
        runs = measure(workload, options.device, compiled=not options.quick, budget_s=budget_s)
        measured[workload] = runs["host"]
        for side, times in runs.items():
            rows = report(workload, side, times)
            record["tables"].append({"workload": str(workload), "side": side, "rows": rows})

    record["gates"] = [gate.judge(measured) for gate in GATES if options.device in gate.devices]
    print("", *record["gates"], sep="\n")
    if options.json:
        timer.write_json(options.json, record)


if __name__ == "__main__":
    main()
