"""The comparator of the suite: errors are judged by arithmetic, and by those of PyTorch in the same dtype.

``assert_close`` allows each element

    FACTOR x (error of same-dtype PyTorch)  +  ROUNDINGS roundings of the arithmetic  +  one rounding when it is stored

where a rounding is eps x magnitude and the magnitude, unless told, is that of the expected value. Errors of PyTorch
count relative to the magnitude as well, so a large error at a large element excuses none at a small one.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR = 4.0  # may be so many times as wrong as PyTorch in the same dtype
ROUNDINGS = 8.0  # in float32 8 eps, about 1e-6: the floor that the design allows

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the arithmetic, of the weights and of the statistics."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding_floor(expected: Tensor, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
    """What correct arithmetic may differ from ``expected`` by, if ``dtype`` is what the result is stored in."""
    arithmetic, storage = torch.finfo(compute_dtype(dtype)), torch.finfo(dtype)
    floor = ROUNDINGS * arithmetic.eps * magnitude + arithmetic.smallest_normal * arithmetic.eps
    if (
        storage.eps > arithmetic.eps
    ):  # to nearest: half a unit in the last place, at least of the smallest normal number
        floor = floor + storage.eps / 2 * torch.clamp(expected.abs() + floor, min=storage.smallest_normal)
    return floor


def assert_close(
    actual: Tensor, expected: Tensor, baseline: Tensor | None = None, *, magnitude: Tensor | None = None, what: str = ""
) -> None:
    """``actual`` is ``expected`` (float64) up to rounding and FACTOR times the error of ``baseline``."""
    if expected.dtype != torch.float64:
        raise TypeError(f"expected: float64 is the truth here, got {expected.dtype}")
    if actual.shape != expected.shape:
        raise AssertionError(f"{what}: shape {list(actual.shape)}, expected {list(expected.shape)}")
    dtype, got, truth = actual.dtype, actual.detach().cpu().double(), expected.detach().cpu()
    if got.numel() == 0:
        return
    stored = truth.to(dtype).double()  # overflows where the truth does not fit the dtype
    for kind, wrong in (
        ("NaN", got.isnan() != stored.isnan()),
        ("inf", (got.isinf() | stored.isinf()) & (got != stored)),
    ):
        if wrong.any():
            at = _coordinate(wrong.flatten().int().argmax(), wrong.shape)
            raise AssertionError(f"{what}: {kind} at {at}: got {got[at].item()}, expected {truth[at].item()}")

    usable = stored.isfinite()
    scale = truth.abs() if magnitude is None else magnitude.detach().cpu().double().expand_as(truth)
    scale = torch.where(usable, scale, 0.0).nan_to_num(posinf=0.0)
    error = torch.where(usable, (got - truth).abs(), 0.0)
    allowed = rounding_floor(torch.where(usable, truth, 0.0), scale, dtype)
    if baseline is not None:
        reference = (baseline.detach().cpu().double() - truth).abs()
        relative = torch.where((scale > 0) & reference.isfinite(), reference / scale, 0.0).max()
        allowed = allowed + FACTOR * relative * scale
    if (error <= allowed).all():
        return
    excess = error / allowed
    at = _coordinate(excess.argmax(), excess.shape)
    raise AssertionError(
        f"{what}: {int((error > allowed).sum())} of {error.numel()} elements are off; worst at {at}: "
        f"got {got[at].item()!r}, expected {truth[at].item()!r}, error {error[at].item():.3g}, "
        f"allowed {allowed[at].item():.3g} ({excess[at].item():.3g} times as much)"
    )


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    """Same shape, dtype, device and bits; any NaN equals any NaN, but 0.0 is not -0.0."""
    for part in ("shape", "dtype", "device"):
        if getattr(actual, part) != getattr(expected, part):
            raise AssertionError(f"{what}: {part} {getattr(actual, part)}, expected {getattr(expected, part)}")
    a, b = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    different = a.view(BITS[a.element_size()]) != b.view(BITS[b.element_size()])
    if a.is_floating_point():
        different &= ~(a.isnan() & b.isnan())
    if different.any():
        at = _coordinate(different.flatten().int().argmax(), a.shape)
        raise AssertionError(
            f"{what}: {int(different.sum())} of {a.numel()} elements differ in bits; first at {at}: "
            f"{a[at].item()!r} and {b[at].item()!r}"
        )


def assert_same_result(actual, expected, what: str = "") -> None:
    """Two :class:`pama_ext.Combined` with the same bits in every field."""
    for name in ("advantages", "weights", "value"):
        a, b = getattr(actual, name), getattr(expected, name)
        if isinstance(a, Tensor):
            assert_same_bits(a, b, f"{what} {name}")
    for name, a, b in zip(actual.stats._fields, actual.stats, expected.stats, strict=True):
        assert_same_bits(a, b, f"{what} stats.{name}")


def _coordinate(flat: Tensor, shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in torch.unravel_index(flat, shape))
