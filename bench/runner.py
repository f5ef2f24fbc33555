"""Verify, time, tabulate, judge: what is done with every workload alike, up to the record of a suite.

On the CPU a workload is timed with warm caches and, from ``COLD_BYTES`` on, one call at a time with swept ones. On CUDA
it is timed three ways: what the host spends, what the device spends (calls back to back in a CUDA graph), and what the
device spends on one call when its L2 cache has been swept.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from bench import timer
from bench.environment import environment
from bench.tables import plain
from bench.timer import Call, Times
from bench.workload import COPY, VIEWS, Candidate, Case, Gate, Workload

COPY_BYTES = 1 << 17  # bytes from which a copy shows the memory and not the cost of a call
COLD_BYTES = 1 << 20  # bytes from which a workload is timed with cold caches too
COLD_LIMIT_S = 0.05  # longer calls are not
Views = dict[str, Times]
Row = dict[str, Any]


def run(name: str, suite: Iterable[Workload], device: str, *, budget_s: float, quick: bool = False) -> dict[str, Any]:
    """Measure a suite, print its tables and its gates, and return its record.

    Args:
        name: of the suite.
        suite: its workloads.
        device: "cpu" or "cuda".
        budget_s: about how long one view of one workload may take, seconds.
        quick: leave out the largest workloads and what has to be compiled first.
    """
    header = environment(device)
    print("  ".join(f"{key}: {value}" for key, value in header.items() if value not in ("", {})))
    record: dict[str, Any] = {"suite": name, "header": header, "workloads": [], "gates": []}
    for workload in suite:
        if (quick and not workload.quick) or workload.device not in ("", device):
            continue
        case = prepare(workload, device, lambda _, candidate: not (quick and candidate.compiles))
        before = timer.core_clock()
        found = measure(case, device, budget_s)
        core = [{key: _short(us) for key, us in of.items()} for of in (before, timer.core_clock())]
        table = rows(case, found, device)
        medians = " and ".join(f"{of['p50_us']:.3g}" for of in core)
        print(f"\n{name}: {workload.name}\n{show(table)}\narithmetic alone, before and after: {medians} µs", flush=True)
        record["workloads"].append(
            {"name": workload.name, "sizes": dict(workload.sizes), "bytes": case.moved, "core": core, "rows": table}
        )
        found |= {figure: {name: [value] for name, value in of.items()} for figure, of in case.figures.items()}
        gates = [{"workload": workload.name, **judge(g, found, g.bound)} for g in workload.gates if g.device == device]
        record["gates"] += gates
    print("", *(f"{g['verdict']:<13}{g['workload']}: {said(g)}" for g in record["gates"]), sep="\n", flush=True)
    return record


def prepare(workload: Workload, device: str, chosen: Callable[[str, Candidate], bool]) -> Case:
    """The workload with the candidates chosen, each verified, and a copy of as many bytes.

    A wrong result stops everything. What somebody else's code cannot do here is left out, and said.
    """
    torch.compiler.reset()
    case = workload.build(device)
    ours = next(iter(case.candidates))
    candidates = {}
    for name, candidate in case.candidates.items():
        if not chosen(name, candidate):
            continue
        try:
            result = candidate.call()
        except Exception as error:
            if name == ours:
                raise
            print(f"{workload.name}: {name} is left out: {type(error).__name__}: {error}", file=sys.stderr)
            continue
        try:
            if candidate.check:
                candidate.check(result)
        except AssertionError as error:
            raise SystemExit(f"{workload.name}: {name}: {error}") from error
        candidates[name] = candidate
    half = sum(case.moved.values()) // 2
    if half >= COPY_BYTES // 2:
        source, target = torch.ones(2, half // 4, device=device)
        candidates[COPY] = Candidate(functools.partial(target.copy_, source))
    return dataclasses.replace(case, candidates=candidates)


def measure(case: Case, device: str, budget_s: float, views: Collection[str] = VIEWS) -> Views:
    """Seconds per call of every candidate, for each of ``views`` that there is."""
    calls = {name: candidate.call for name, candidate in case.candidates.items()}
    size = sum(case.moved.values())
    found: Views = {}
    if "host" in views:
        how: dict[str, Any] = {}
        if device == "cuda":
            how = {"max_calls": timer.CUDA_CALLS}
        elif not 0 < size < COPY_BYTES and torch.get_num_threads() > 1:
            how = {"block_s": timer.SETTLE_S / 2, "settle_s": timer.SETTLE_S}
        found["host"] = timer.interleave(calls, budget_s=budget_s, **how)
    if "device" in views and device == "cuda":
        graphs = captured(case.candidates, timer.GRAPH_CALLS)
        times = timer.interleave(calls | graphs, budget_s=budget_s, clock=timer.device_clock)
        found["device"] = {
            name: [s / timer.GRAPH_CALLS for s in seconds] if name in graphs else seconds
            for name, seconds in times.items()
        }
    if "cold" in views and (case.cold or size >= COLD_BYTES):
        known = found.get("host", {})
        short = {
            name: c
            for name, c in case.candidates.items()
            if min(known.get(name) or [timer.host_clock(c.call, 1) for _ in range(2)]) < COLD_LIMIT_S
        }
        once = {name: c.call for name, c in short.items()}
        clock = timer.host_clock
        if device == "cuda":
            once, clock = once | captured(short, 1), timer.device_clock
        clock = timer.cold(clock, timer.cache_sweep(device))
        found["cold"] = timer.interleave(once, budget_s=budget_s, clock=clock, max_calls=1, lead=False)
    return found


def captured(candidates: Mapping[str, Candidate], calls: int) -> dict[str, Call]:
    """Replays of CUDA graphs of ``calls`` calls each, of the candidates that can be captured."""
    found = {}
    for name, candidate in candidates.items():
        try:
            if candidate.graph:
                found[name] = timer.graph_replay(candidate.call, calls)
        except RuntimeError as error:
            torch.cuda.synchronize()
            reason = str(error).partition("\n")[0]
            print(f"{name}: timed as calls, since no CUDA graph holds it: {reason}", file=sys.stderr)
    return found


def rows(case: Case, found: Views, device: str) -> list[Row]:
    """What is recorded of each candidate in each view."""
    ours, size = next(iter(case.candidates)), sum(case.moved.values())
    table = []
    for view, times in found.items():
        on_host = device == "cpu" or view == "host"
        moves = COPY in times and (device == "cpu" or not on_host)
        for name, seconds in times.items():
            row: Row = {"candidate": name, "side": "host" if on_host else "device",
                        "cache": "cold" if view == "cold" else "warm",
                        **timer.quantiles(seconds), "rounds": len(seconds)}  # fmt: skip
            if ours in times:
                row["ratio"] = timer.ratio(times, name, ours)
            if moves and (case.candidates[name].check or name == COPY):
                row["gb_per_s"] = size / row["p50_us"] / 1e3
                row["share_of_copy"] = timer.ratio(times, COPY, name)
            row |= {figure: values[name] for figure, values in case.figures.items() if name in values}
            table.append({key: _short(value) for key, value in row.items()})
    return table


def judge(gate: Gate, found: Views, bound: float) -> dict[str, Any]:
    """What is recorded of a gate: PASS, MISS, or "not measured" where a candidate is missing."""
    times = found.get(gate.view, {})
    value = gate.value(times) if gate.names <= times.keys() else None
    verdict = "not measured" if value is None else "PASS" if gate.holds(value, bound) else "MISS"
    sign = "<=" if gate.at_most else ">="
    return {"text": gate.text, "sign": sign, "bound": bound, "value": _short(value), "verdict": verdict}


def said(gate: Mapping[str, Any]) -> str:
    """A judged gate in a line."""
    value = "" if gate["value"] is None else f": {gate['value']:.3g}"
    return f"{gate['text']} {gate['sign']} {gate['bound']:g}{value}"


def show(table: list[Row]) -> str:
    """The rows as plain text, a block for each view."""
    blocks = []
    for side, cache in dict.fromkeys((row["side"], row["cache"]) for row in table):
        block = [row for row in table if (row["side"], row["cache"]) == (side, cache)]
        keys = [key for key in dict.fromkeys(key for row in block for key in row) if key not in NOT_SHOWN]
        rounds = sorted({row["rounds"] for row in block})
        headings = [f"{side} time, caches {cache}, {' or '.join(map(str, rounds))} rounds"]
        headings += [HEADINGS.get(key, key) for key in keys]
        cells = [[row["candidate"], *(f"{row[key]:.4g}" if key in row else "" for key in keys)] for row in block]
        blocks.append(plain(headings, cells))
    return "\n\n".join(blocks)


NOT_SHOWN = ("candidate", "side", "cache", "rounds")
HEADINGS = {"p20_us": "p20 µs", "p50_us": "p50 µs", "p80_us": "p80 µs", "ratio": "/ first", "gb_per_s": "GB/s",
            "share_of_copy": "/ copy's"}  # fmt: skip


def _short(value: Any) -> Any:
    """A number to five digits, so that records stay readable."""
    return float(f"{value:.5g}") if isinstance(value, float) else value
