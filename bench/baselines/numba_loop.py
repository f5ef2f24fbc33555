"""The hand-written numba loops that ``pama_ext`` is compared with.

``combine`` at level "batch", with Noon and every statistic; ``gae`` without a mask.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numba import prange
from torch import Tensor

BLOCK = 1024  # tokens whose objectives are read again from the first-level cache
PARALLEL_FROM = 65536  # elements from which threads pay for themselves
COUNT, SUM, SQUARES, LOW, HIGH, POSITIVE, ACTIVE, GATED, NONFINITE = range(9)


def numba_loop(
    advantages: Tensor, *, mask: Tensor, log_ratio: Tensor, clip_high: float = 0.2
) -> tuple[Tensor, Any, Any, Any]:
    """As :func:`bench.baselines.eager`, the small results as numpy; parallel over the tokens where that pays."""
    n = advantages.shape[-1]
    parallel = advantages.numel() >= PARALLEL_FROM and torch.get_num_threads() > 1
    combined, weights, stats = np.empty(mask.shape, np.float32), np.empty(n), np.empty((9, n))
    value = (_parallel_loop if parallel else _sequential_loop)(
        advantages.view(-1, n).numpy(),
        mask.view(-1).numpy(),
        log_ratio.view(-1).numpy(),
        math.log1p(clip_high),
        torch.get_num_threads() if parallel else 1,
        combined.reshape(-1),
        weights,
        stats,
    )
    return torch.from_numpy(combined), weights, value, stats


def _loop(advantages, mask, log_ratio, bound, chunks, combined, weights, stats):  # type: ignore[no-untyped-def]
    tokens, n = advantages.shape
    sums = np.zeros((chunks, n, 9))
    sums[:, :, LOW] = np.inf
    sums[:, :, HIGH] = -np.inf
    for chunk in prange(chunks):
        first, last = tokens * chunk // chunks, tokens * (chunk + 1) // chunks
        for start in range(first, last, BLOCK):
            for i in range(n):  # one objective of a block at a time: the sums stay in registers, nothing branches
                count, positive, unclipped, nonfinite = 0, 0, 0, 0
                total, squares, low, high, gated = 0.0, 0.0, np.inf, -np.inf, 0.0
                for t in range(start, min(start + BLOCK, last)):
                    raw = np.float64(advantages[t, i])
                    valid = mask[t]
                    counted = valid & (abs(raw) < np.inf)
                    x = raw if counted else 0.0
                    count += counted
                    nonfinite += valid & (not counted)
                    total += x
                    squares += x * x
                    low = min(low, raw if counted else np.inf)
                    high = max(high, raw if counted else -np.inf)
                    active = (x > 0) & (log_ratio[t] <= bound)
                    positive += x > 0
                    unclipped += active
                    gated += x if active else 0.0
                part = sums[chunk, i]
                part[COUNT] += count
                part[SUM] += total
                part[SQUARES] += squares
                part[LOW] = min(part[LOW], low)
                part[HIGH] = max(part[HIGH], high)
                part[POSITIVE] += positive
                part[ACTIVE] += unclipped
                part[GATED] += gated
                part[NONFINITE] += nonfinite

    value = np.inf
    for i in range(n):
        whole = sums[:, i].sum(0)
        entries, above = max(whole[COUNT], 1.0), max(whole[POSITIVE], 1.0)
        mean = whole[SUM] / entries
        stats[0, i] = whole[COUNT]
        stats[1, i] = mean
        stats[2, i] = math.sqrt(max(whole[SQUARES] - entries * mean * mean, 0.0) / max(entries - 1, 1.0))
        stats[3, i] = sums[:, i, LOW].min() if whole[COUNT] else 0.0
        stats[4, i] = sums[:, i, HIGH].max() if whole[COUNT] else 0.0
        stats[5, i] = whole[POSITIVE] / entries
        stats[6, i] = (whole[POSITIVE] - whole[ACTIVE]) / above
        stats[7, i] = whole[GATED] / entries
        stats[8, i] = whole[NONFINITE]
        value = min(value, stats[7, i] if whole[COUNT] else np.inf)

    for i in range(n):  # Noon leaves no scalar below 0: equal weight over those tied at the minimum
        weights[i] = stats[7, i] == value if stats[0, i] else np.isinf(value)
    weights /= weights.sum()

    for chunk in prange(chunks):
        for t in range(tokens * chunk // chunks, tokens * (chunk + 1) // chunks):
            share = 0.0
            for i in range(n):
                x = advantages[t, i]
                share += weights[i] * (x if (x > 0) & (x < np.inf) else 0.0)
            combined[t] = share if mask[t] else 0.0
    return value


_sequential_loop = numba.njit(_loop)
_parallel_loop = numba.njit(parallel=True)(_loop)


def numba_gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``[B, T, N]``, rows in parallel."""
    numba.set_num_threads(torch.get_num_threads())
    advantages, returns = np.empty(rewards.shape, np.float32), np.empty(rewards.shape, np.float32)
    _gae(rewards.numpy(), values.numpy(), np.float32(gamma), np.float32(gamma * lam), advantages, returns)
    return torch.from_numpy(advantages), torch.from_numpy(returns)


@numba.njit(parallel=True)
def _gae(rewards, values, gamma, decay, advantages, returns):  # type: ignore[no-untyped-def]
    rows, length, n = rewards.shape
    for b in prange(rows):
        for i in range(n):
            following, running = np.float32(0.0), np.float32(0.0)
            for t in range(length - 1, -1, -1):
                value = values[b, t, i]
                running = rewards[b, t, i] + gamma * following - value + decay * running
                following = value
                advantages[b, t, i] = running
                returns[b, t, i] = running + value
