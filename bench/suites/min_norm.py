"""``min_norm`` beside TorchJD's MGDA, for time and for how near to the optimum they come; and the whole step.

TorchJD's ``MGDAWeighting`` is Frank-Wolfe with its own stopping rule, on the same Gram matrices. "norm / optimum" is
the length of the combined vector over that of the shortest. The step is weights and combination of advantages
``[64, 512, 10]``, there by a matrix product, MGDA and a weighted sum: with Noon, where MGDA is soon done, without, and
of objectives that correlate, as rewards do, which takes MGDA longer.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench import verify
from bench.baselines import peers
from bench.workload import Candidate, Case, Gate, Workload, bytes_of

OURS, MGDA, STEP = "min_norm", "TorchJD MGDA", 'combine, solver="min_norm"'
NORM = "norm / optimum"
SIZES, KINDS = (3, 10, 32), ("normal", "lengths 1e-4 to 1e4")
STEP_SHAPE = (64, 512, 10)
STEPS = (("with Noon", True, 0.0), ("without Noon", False, 0.0), ("with Noon, correlated", True, 0.9))
EXACT = 1e-6  # relative


def vectors(n: int, kind: str) -> Tensor:
    """``[n, 500]`` float64: normal, or with lengths over eight orders of magnitude."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 500, generator=generator, dtype=torch.float64)
    return x if kind == "normal" else x * 10 ** (8 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 4)


def simplex(weights: Tensor) -> None:
    """The check of what only comes near to the optimum."""
    verify.close("sum of weights", weights.sum(), torch.ones((), dtype=torch.float64, device=weights.device))
    if not bool((weights >= -1e-6).all()):
        raise AssertionError(f"weights are negative: {weights.tolist()}")


def build(device: str, *, n: int, kind: str) -> Case:
    """One Gram matrix."""
    x = vectors(n, kind).to(device)
    gramian = (x @ x.T).float()

    def norm(weights: Tensor) -> float:
        return float((weights.double() @ x).norm())

    optimum = norm(pama_ext.reference.min_norm(x @ x.T))

    def exact(weights: Tensor) -> None:
        simplex(weights)
        if norm(weights) > (1 + EXACT) * optimum:
            raise AssertionError(f"norm {norm(weights)}, optimum {optimum}")

    found = {OURS: Candidate(functools.partial(pama_ext.min_norm, gramian), exact)}
    if peers.installed("torchjd"):
        found[MGDA] = Candidate(functools.partial(peers.mgda, gramian), simplex, graph=False)
    norms = {name: norm(candidate.call()) / optimum for name, candidate in found.items()}
    return Case(found, figures={NORM: norms})


def build_step(device: str, *, shape: tuple[int, ...], noon: bool, correlation: float) -> Case:
    """The whole step, of objectives any two of which correlate so much."""
    generator = torch.Generator().manual_seed(0)
    own, common = (torch.randn(*shape[:-1], n, generator=generator) for n in (shape[-1], 1))
    advantages = ((1 - correlation) ** 0.5 * own + correlation**0.5 * common).to(device)
    expected = pama_ext.reference.combine(advantages.double(), solver="min_norm", noon=noon)

    def near(result: tuple[Tensor, Tensor]) -> None:
        combined, weights = result
        simplex(weights)
        kept = (advantages.clamp(min=0) if noon else advantages).double()
        verify.close("combined", combined, kept @ weights.double())
        ours, best = (float((kept @ w.double()).norm()) for w in (weights, expected.weights))
        if ours > 1.1 * best:
            raise AssertionError(f"norm {ours}, optimum {best}")

    def whole() -> Any:
        return pama_ext.combine(advantages, solver="min_norm", noon=noon)

    found = {STEP: Candidate(whole, verify.combination(expected))}
    if peers.installed("torchjd"):
        found[MGDA] = Candidate(functools.partial(peers.mgda_step, advantages, noon), near, graph=False)
    return Case(found, bytes_of(advantages=advantages, out=advantages[..., 0]))


def gates(ours: str, smoke: float | None) -> tuple[Gate, ...]:
    """The factor to TorchJD, which synchronises: on CUDA the time until the device is done counts."""
    return Gate(MGDA, ours, 50.0, smoke=smoke), Gate(MGDA, ours, 50.0, view="device", device="cuda")


SUITE = (
    *(
        Workload(f"N = {n}, {kind}", functools.partial(build, n=n, kind=kind), gates(OURS, 15.0) if n == 10 else ())
        for n in SIZES
        for kind in KINDS
    ),
    *(
        Workload(
            f"the whole step, {list(STEP_SHAPE)}, {about}",
            functools.partial(build_step, shape=STEP_SHAPE, noon=noon, correlation=correlation),
            gates(STEP, 0.9),
        )
        for about, noon, correlation in STEPS
    ),
)
