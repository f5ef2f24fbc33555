"""``min_norm`` beside TorchJD's MGDA, for time and for how near the optimum they come: ``python -m bench.min_norm``.

TorchJD 0.18.0's ``MGDAWeighting`` is Frank-Wolfe with its own stopping rule, on the same Gram matrices. The last table
is the whole step: weights and combination of ``[64, 512, 10]`` advantages, there by a matrix product, MGDA and a sum.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import timer
from bench.groups import judge, report

OURS, MGDA = "min_norm", "TorchJD 0.18.0 MGDA"
SIZES = (3, 10, 32)
STEP = (64, 512, 10)
BOUND = 50.0  # at N = 10


def vectors(n: int, kind: str) -> Tensor:
    """``[n, 500]`` float64: normal, or with lengths over eight orders of magnitude."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 500, generator=generator, dtype=torch.float64)
    return x if kind == "normal" else x * 10 ** (8 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 4)


def mgda_step(advantages: Tensor) -> tuple[Tensor, Tensor]:
    """What a user of TorchJD writes: Noon, Gram matrix, MGDA, weighted sum."""
    from torchjd.aggregation import MGDAWeighting

    noon = advantages.clamp(min=0)
    flat = noon.flatten(0, -2)
    weights = MGDAWeighting()(flat.T @ flat / len(flat))
    return noon @ weights, weights


def main(arguments: list[str] | None = None) -> None:
    """Time, compare the norms, print the tables and the gates, write the record."""
    from torchjd.aggregation import MGDAWeighting

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the record there")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing budget of a matrix")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = {"header": timer.environment("cpu"), "tables": [], "gates": []}
    mgda = MGDAWeighting()
    for n in SIZES:
        for kind in ("normal", "lengths 1e-4 to 1e4"):
            x = vectors(n, kind)
            gramian = (x @ x.T).float()
            norms = {
                name: float((f(gramian).double() @ x).norm()) for name, f in ((OURS, pama_ext.min_norm), (MGDA, mgda))
            }
            times = timer.interleave(
                {OURS: functools.partial(pama_ext.min_norm, gramian), MGDA: functools.partial(mgda, gramian)},
                budget_s=options.seconds, rounds=(5, 50),
            )  # fmt: skip
            title = f"N = {n}, {kind}; norm of MGDA / of min_norm: {norms[MGDA] / norms[OURS]:.6g}"
            rows = report(title, times, OURS)
            record["tables"].append({"n": n, "vectors": kind, "norms": norms, "rows": rows})
            if n == 10:
                record["gates"].append(f"N = 10, {kind}  {judge(times, MGDA, OURS, BOUND)}")

    advantages = torch.randn(STEP, generator=torch.Generator().manual_seed(0))
    step = 'combine, solver="min_norm"'
    calls = {step: lambda: pama_ext.combine(advantages, solver="min_norm"),
             MGDA: functools.partial(mgda_step, advantages)}  # fmt: skip
    times = timer.interleave(calls, budget_s=options.seconds, rounds=(5, 50))
    record["tables"].append({"step": list(STEP), "rows": report(f"{list(STEP)}, the whole step", times, step)})
    print("", *record["gates"], sep="\n")
    if options.json:
        timer.write_json(options.json, record)


if __name__ == "__main__":
    main()
