"""``combine`` at level "batch" in Triton, as a good user would write it: Noon, closed form, every statistic.

Three kernels: one reads everything and leaves the moments of each program, one merges them and solves, one weighs.
``TRITON_INTERPRET=1`` runs them without a GPU.
"""

# ruff: noqa: N803
from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 2048  # elements that a program holds at a time
PROGRAMS = 512  # at most, so that the merge stays short
SUMS = 9  # rows of the partial results: count, mean, M2, min, max, positive, active, gated, nonfinite


def triton_combine(
    advantages: Tensor, *, mask: Tensor | None = None, log_ratio: Tensor | None = None, clip_high: float = 0.2
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """As :func:`bench.baselines.eager.by_batch`, of dense ``advantages`` ``[..., N]``."""
    n = advantages.shape[-1]
    tokens = advantages.numel() // n
    width = triton.next_power_of_2(n)
    rows = max(16, TILE // width)
    tiles = triton.cdiv(tokens, rows)
    programs = min(tiles, PROGRAMS)
    kept = {"dtype": torch.float32, "device": advantages.device}
    partial, stats, solved = (torch.empty(size, **kept) for size in ((SUMS, programs, width), (9, n), (n + 1,)))
    combined = torch.empty(advantages.shape[:-1], **kept)
    has_mask, has_ratio = mask is not None, log_ratio is not None
    bits = mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask

    _measure[(programs,)](
        advantages, bits, log_ratio, partial, tokens, n, tiles, math.log1p(clip_high), has_mask, has_ratio, rows, width
    )
    _solve[(1,)](partial, stats, solved, programs, n, triton.next_power_of_2(programs), width, num_warps=8)
    _weigh[(tiles,)](advantages, bits, solved, combined, tokens, n, has_mask, rows, width)
    return combined, solved[:n], solved[n], stats.unbind(0)


@triton.jit
def _tile(advantages, mask, tile, tokens, n, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens and advantages of a tile ``[ROWS, WIDTH]``, which of them are valid, and which of these are finite."""
    t = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    i = tl.arange(0, WIDTH)
    there = (t < tokens)[:, None] & (i < n)[None, :]
    x = tl.load(advantages + t[:, None] * n + i[None, :], mask=there, other=0.0)
    valid = there
    if HAS_MASK:
        valid = valid & (tl.load(mask + t, mask=t < tokens, other=0) != 0)[:, None]
    return t, x, valid, valid & (tl.abs(x) < float("inf"))


@triton.jit
def _measure(  # type: ignore[no-untyped-def]
    advantages, mask, log_ratio, partial, tokens, n, tiles, bound,
    HAS_MASK: tl.constexpr, HAS_RATIO: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Moments of every PROGRAMS-th tile, merged as Chan does, and sums."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    count = tl.zeros((WIDTH,), tl.float32)
    mean, squares, positive, active, gated, nonfinite = count, count, count, count, count, count
    low, high = count + float("inf"), count - float("inf")
    for tile in range(program, tiles, programs):
        t, x, valid, counted = _tile(advantages, mask, tile, tokens, n, HAS_MASK, ROWS, WIDTH)
        here = tl.sum(counted.to(tl.float32), 0)
        x = tl.where(counted, x, 0.0)
        local = tl.sum(x, 0) / tl.maximum(here, 1.0)
        centred = tl.where(counted, x - local[None, :], 0.0)
        total = tl.maximum(count + here, 1.0)
        apart = local - mean
        squares += tl.sum(centred * centred, 0) + apart * apart * count * here / total
        mean += apart * here / total
        count += here
        low = tl.minimum(low, tl.min(tl.where(counted, x, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(counted, x, -float("inf")), 0))
        above = x > 0.0
        open_ = above
        if HAS_RATIO:
            ratio = tl.load(log_ratio + t, mask=t < tokens, other=float("inf"))
            open_ = above & (ratio <= bound)[:, None]
        positive += tl.sum(above.to(tl.float32), 0)
        active += tl.sum(open_.to(tl.float32), 0)
        gated += tl.sum(tl.where(open_, x, 0.0), 0)
        nonfinite += tl.sum(valid.to(tl.float32) - counted.to(tl.float32), 0)
    at = partial + program * WIDTH + tl.arange(0, WIDTH)
    step = programs * WIDTH
    tl.store(at, count)
    tl.store(at + step, mean)
    tl.store(at + 2 * step, squares)
    tl.store(at + 3 * step, low)
    tl.store(at + 4 * step, high)
    tl.store(at + 5 * step, positive)
    tl.store(at + 6 * step, active)
    tl.store(at + 7 * step, gated)
    tl.store(at + 8 * step, nonfinite)


@triton.jit
def _solve(partial, stats, solved, programs, n, PROGRAMS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Statistics of all tokens, and equal weight over the objectives whose scalar is the smallest."""
    p, i = tl.arange(0, PROGRAMS), tl.arange(0, WIDTH)
    at = partial + p[:, None] * WIDTH + i[None, :]
    there = (p < programs)[:, None] & (i < n)[None, :]
    step = programs * WIDTH
    counts = tl.load(at, mask=there, other=0.0)
    means = tl.load(at + step, mask=there, other=0.0)
    count = tl.sum(counts, 0)
    divisor = tl.maximum(count, 1.0)
    mean = tl.sum(counts * means, 0) / divisor
    apart = means - mean[None, :]
    squares = tl.sum(tl.load(at + 2 * step, mask=there, other=0.0) + counts * apart * apart, 0)
    low = tl.min(tl.load(at + 3 * step, mask=there, other=float("inf")), 0)
    high = tl.max(tl.load(at + 4 * step, mask=there, other=-float("inf")), 0)
    positive = tl.sum(tl.load(at + 5 * step, mask=there, other=0.0), 0)
    active = tl.sum(tl.load(at + 6 * step, mask=there, other=0.0), 0)
    scalars = tl.sum(tl.load(at + 7 * step, mask=there, other=0.0), 0) / divisor
    nonfinite = tl.sum(tl.load(at + 8 * step, mask=there, other=0.0), 0)

    kept = (i < n) & (count > 0)
    value = tl.min(tl.where(kept, scalars, float("inf")), 0)
    tied = tl.where(value < float("inf"), kept & (scalars == value), i < n).to(tl.float32)
    tl.store(solved + i, tied / tl.sum(tied, 0), mask=i < n)
    tl.store(solved + n, tl.where(value < float("inf"), value, 0.0))

    tl.store(stats + i, count, mask=i < n)
    tl.store(stats + n + i, mean, mask=i < n)
    tl.store(stats + 2 * n + i, tl.sqrt(squares / tl.maximum(count - 1.0, 1.0)), mask=i < n)
    tl.store(stats + 3 * n + i, tl.where(count > 0, low, 0.0), mask=i < n)
    tl.store(stats + 4 * n + i, tl.where(count > 0, high, 0.0), mask=i < n)
    tl.store(stats + 5 * n + i, positive / divisor, mask=i < n)
    tl.store(stats + 6 * n + i, (positive - active) / tl.maximum(positive, 1.0), mask=i < n)
    tl.store(stats + 7 * n + i, scalars, mask=i < n)
    tl.store(stats + 8 * n + i, nonfinite, mask=i < n)


@triton.jit
def _weigh(
    advantages, mask, solved, combined, tokens, n, HAS_MASK: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):  # type: ignore[no-untyped-def]
    """The weighted sum of what Noon leaves."""
    t, x, _, counted = _tile(advantages, mask, tl.program_id(0), tokens, n, HAS_MASK, ROWS, WIDTH)
    i = tl.arange(0, WIDTH)
    weights = tl.load(solved + i, mask=i < n, other=0.0)
    shares = tl.where(counted, tl.maximum(x, 0.0) * weights[None, :], 0.0)
    tl.store(combined + t, tl.sum(shares, 1), mask=t < tokens)
