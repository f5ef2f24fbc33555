"""What a candidate must have computed: checks against the float64 reference, made before anything is timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import pama_ext
from bench.workload import Check

FLOOR = 2.5e-7  # relative error that a quantity may have in any case; four times that is what is aimed at
ROUNDINGS = 64  # of float32, of the largest magnitude expected


def close(what: str, got: Any, expected: Tensor, *, roundings: float = ROUNDINGS, at_least: float = 0.0) -> None:
    """Raise unless ``got`` is ``expected`` to rounding, of the largest magnitude expected or of ``at_least``."""
    error = (torch.as_tensor(got, device=expected.device).detach().double() - expected).abs().max()
    bound = roundings * torch.finfo(torch.float32).eps * max(float(expected.abs().max()), at_least)
    if not error <= bound:  # a NaN is not <= anything
        raise AssertionError(f"{what} differs from the reference by {error:.3g}, allowed {bound:.3g}")


def combination(expected: pama_ext.Combined, *, roundings: float = ROUNDINGS) -> Check:
    """Combined advantages and, as far as a candidate gives them, weights, value and statistics.

    Sums of very many float32 may round by more.
    """
    roundings = max(roundings, expected.advantages.numel() ** 0.5 / 2)

    def check(result: Any) -> None:
        combined, *others = (result,) if isinstance(result, Tensor) else result
        close("combined", combined, expected.advantages, roundings=roundings)
        for what, got in zip(("weights", "value"), others, strict=False):
            close(what, got, getattr(expected, what), roundings=roundings)
        if len(others) > 2:
            for what, got in zip(expected.stats._fields, others[2], strict=False):
                close(what, got, getattr(expected.stats, what), roundings=roundings, at_least=1.0)

    return check


def errors(result: Any, expected: pama_ext.Combined) -> dict[str, float]:
    """Errors of the weights and of each statistic, relative to its largest magnitude over the objectives."""
    _, weights, _, stats = result

    def relative(got: Tensor, exact: Tensor) -> float:
        exact = exact.double()
        off = (torch.as_tensor(got, device=exact.device) - exact).abs().max()
        return float(off / exact.abs().max()) if off else 0.0

    names = ("weights", *expected.stats._fields)
    return dict(zip(names, map(relative, (weights, *stats), (expected.weights, *expected.stats)), strict=False))


def beside(ours: Mapping[str, float], theirs: Mapping[str, float]) -> float:
    """How many times as large errors are as others, at most; a quantity of the others is never exact."""
    return max(error / (theirs[name] + FLOOR) for name, error in ours.items() if name in theirs)


def columns(expected: Tensor, *, roundings: float = ROUNDINGS) -> Check:
    """A list with a tensor for each objective, ``expected`` ``[..., N]``."""

    def check(result: Sequence[Tensor]) -> None:
        for i, (got, column) in enumerate(zip(result, expected.unbind(-1), strict=True)):
            close(f"objective {i}", got.reshape(column.shape), column, roundings=roundings)

    return check
