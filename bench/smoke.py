"""The regression guard: ratios of a few cheap workloads against bounds with wide margins, never absolute times.

A bound is what a slow or busy machine still keeps; a ratio outside of it twice in a row means that something broke. On
one thread, unless told otherwise: where others hold a core, a parallel region waits for it, and that of only one of the
two calls, while ratios on one thread stay within a few percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from bench import runner
from bench.workload import COPY, Candidate, Gate, Workload

BUDGET_S = 0.3  # for one view of one workload


def main(suites: Mapping[str, Iterable[Workload]], device: str) -> int:
    """Judge every cheap workload that has a bound for this; 1 if one of them fails, else 0."""
    failed = 0
    for suite in suites.values():
        for workload in suite:
            gates = [gate for gate in workload.gates if gate.smoke is not None and gate.device == device]
            if gates and workload.quick:
                failed += not holds(workload, gates, device)
    print("FAIL: a ratio is outside of its bound" if failed else "all ratios are within their bounds")
    return int(failed > 0)


def holds(workload: Workload, gates: list[Gate], device: str) -> bool:
    """Time the candidates that the gates need, and once more those whose gate failed."""
    for attempt in ("", ", again"):
        needed = {COPY}.union(*(gate.names for gate in gates))

        def chosen(name: str, _: Candidate, needed: set[str] = needed) -> bool:
            return name in needed

        case = runner.prepare(workload, device, chosen)
        found = runner.measure(case, device, BUDGET_S, {gate.view for gate in gates})
        judged = [runner.judge(gate, found, gate.smoke or 0.0) for gate in gates]
        for entry in judged:
            print(f"{entry['verdict']:<13}{workload.name}{attempt}: {runner.said(entry)}", flush=True)
        gates = [gate for gate, entry in zip(gates, judged, strict=True) if entry["verdict"] == "MISS"]
        if not gates:
            return True
    return False
