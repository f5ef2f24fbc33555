"""How the time of ``combine`` grows: with N at a fixed number of tokens, and with the tokens at a fixed N.

Level "batch", mask and log_ratio. Each point is a workload with candidates of :mod:`bench.suites.combine`. "growth"
times our call at several sizes in one interleaved run, since only such times may be compared with each other: sizes at
which a call costs more than its launch. "One thread" shows from where on threads pay. With warm caches the smaller ones
gain by lying in nearer caches than the larger; with cold ones all come from memory. A token of few objectives brings
more mask and result for each element, which "byte moved" accounts for.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import pama_ext
from bench import verify
from bench.suites import combine
from bench.workload import COMPILED, COPY, Candidate, Case, Gate, Growth, Workload

ROW = 64  # tokens
SHOWN = (combine.OURS, combine.ALONE, combine.EAGER, COMPILED, combine.NUMBA, combine.TRITON)
LARGE = 1_500_000  # elements from which on the figures of large calls are aimed at
BOUND = 1.3


class Series(NamedTuple):
    """The points on a device: N at ``fixed_tokens``, and tokens at N = ``fixed_objectives``."""

    objectives: tuple[int, ...]
    tokens: tuple[int, ...]
    fixed_objectives: int
    fixed_tokens: int
    past_launch: int  # elements from which a call costs more than its launch
    view: str


N = (2, 4, 8, 16, 32, 64)
SERIES = {
    "cpu": Series(N, tuple(4**k for k in range(3, 12)), 4, 1 << 18, 1 << 19, "host"),
    "cuda": Series(N, tuple(4**k for k in range(3, 13)), 4, 1 << 21, 1 << 22, "device"),
}


def build(device: str, *, tokens: int, n: int) -> Case:
    """One point: some of what :mod:`bench.suites.combine` times."""
    case = combine.build(device, shape=(tokens // ROW, ROW, n))
    return Case({name: case.candidates[name] for name in SHOWN if name in case.candidates}, case.moved, case.figures)


def build_growth(device: str, *, sizes: dict[str, tuple[int, int]]) -> Case:
    """Our call at sizes ``(tokens, N)``, in one run."""
    found = {}
    for name, (tokens, n) in sizes.items():
        advantages, options = combine.inputs((tokens // ROW, ROW, n), device)
        check = verify.combination(pama_ext.reference.combine(advantages.double(), **options))
        found[name] = Candidate(combine.written(pama_ext.combine, advantages, options), check)
    return Case(found, cold=True)


def gates_of(elements: int) -> tuple[Gate, ...]:
    """What is aimed at beside others at so many elements; CI judges it elsewhere."""
    gates = combine.LARGE_GATES if elements >= LARGE else ()
    if elements <= combine.SMALL:
        gates = (*combine.SMALL_GATES, combine.NUMBA_GATE)
    gates = tuple(dataclasses.replace(gate, smoke=None) for gate in gates if gate.names <= {*SHOWN, COPY})
    return gates + combine.ACCURACY


def points(device: str, along: str) -> tuple[Workload, ...]:
    """The workloads along ``"objectives"`` or ``"tokens"``."""
    series = SERIES[device]
    if along == "objectives":
        sizes = {f"N = {n}": (series.fixed_tokens, n) for n in series.objectives}
        title = f"{series.fixed_tokens} tokens"
    else:
        sizes = {f"{tokens} tokens": (tokens, series.fixed_objectives) for tokens in series.tokens}
        title = f"N = {series.fixed_objectives}"
    single = tuple(
        Workload(
            f"along {along}, {title}: {name}",
            functools.partial(build, tokens=tokens, n=n),
            gates_of(tokens * n),
            quick=tokens * n <= 1 << 20,
            device=device,
            sizes={"objectives": n, "tokens": tokens},
        )
        for name, (tokens, n) in sizes.items()
    )
    past = {name: (tokens, n) for name, (tokens, n) in sizes.items() if tokens * n >= series.past_launch}
    elements = {name: tokens * n for name, (tokens, n) in past.items()}
    moved = {name: tokens * (4 * n + 1 + 4 + 4) for name, (tokens, n) in past.items()}
    judged = [("element", elements, series.view), ("element", elements, "cold")]
    judged += [("byte moved", moved, "cold")] if along == "objectives" else []
    first, *_, last = past
    gates = tuple(
        Growth(last, first, BOUND, at_most=True, view=view, device=device, unit=unit, units=units)
        for unit, units, view in judged
    )
    build_past = functools.partial(build_growth, sizes=past)
    return *single, Workload(f"growth along {along}, {title}", build_past, gates, device=device)


SUITE = tuple(workload for device in SERIES for along in ("objectives", "tokens") for workload in points(device, along))
