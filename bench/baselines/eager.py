"""``combine`` and ``gae`` in PyTorch as written by hand for speed; ``combine`` with Noon, closed form, every statistic.

Combinations take ``advantages`` ``[..., N]`` with ``mask`` and ``log_ratio`` ``[...]`` and return
``(combined [...], weights [N], value [], stats)``, stats in the order of :class:`pama_ext.ObjectiveStats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import pama_ext
from pama_ext import reference

Result = tuple[Tensor, Tensor, Tensor, Any]


class Measured(NamedTuple):
    """One pass over the advantages, objectives first: what both levels go on with. Shapes ``[N, tokens]``, ``[N]``."""

    counted: Tensor
    noon: Tensor
    gated: Tensor
    scalars: Tensor
    stats: tuple[Any, ...]


def measure(
    advantages: Tensor, mask: Tensor | None, log_ratio: Tensor | None, clip_high: float, raw: Tensor | None = None
) -> Measured:
    """Statistics: objectives first, int32 counts, each temporary used more than once.

    ``raw`` is what the advantages were before they were normalised.
    """
    processed = advantages.flatten(0, -2).t().contiguous()  # [N, tokens]: reductions run along memory
    raw = processed if raw is None else raw.flatten(0, -2).t().contiguous()
    counted = raw.abs() < math.inf
    if mask is not None:
        counted.logical_and_(mask.flatten())
    count = counted.sum(1, dtype=torch.int32)
    divisor = count.clamp(min=1)

    noon = processed.where(counted, 0.0)
    mean = (noon if raw is processed else raw.where(counted, 0.0)).sum(1) / divisor
    filled = raw.where(counted, mean[:, None])  # the mean in place of what does not count: neutral in all three
    low, high = filled.amin(1), filled.amax(1)
    deviation = torch.linalg.vector_norm(filled.sub_(mean[:, None]), dim=1)
    std = deviation / (divisor - 1).clamp_(min=1).sqrt()

    noon.clamp_(min=0.0)
    positive = (noon > 0).sum(1, dtype=torch.int32)
    gated, active = noon, positive
    if log_ratio is not None:
        gated = noon * (log_ratio.flatten() <= math.log1p(clip_high))
        active = (gated > 0).sum(1, dtype=torch.int32)
    scalars = gated.sum(1) / divisor
    clipped = (positive - active) / positive.clamp(min=1)
    nonfinite = (raw.shape[1] if mask is None else mask.sum(dtype=torch.int32)) - count
    stats = (count, mean, std, low, high, positive / divisor, clipped, scalars, nonfinite)
    return Measured(counted, noon, gated, scalars, stats)


def by_batch(
    advantages: Tensor, *, mask: Tensor | None = None, log_ratio: Tensor | None = None, clip_high: float = 0.2,
    raw: Tensor | None = None,
) -> Result:  # fmt: skip
    """Level "batch". With Noon all scalars are >= 0: equal weight over the objectives tied at the minimum."""
    _, noon, _, scalars, stats = measure(advantages, mask, log_ratio, clip_high, raw)
    value = scalars.masked_fill(stats[0] == 0, math.inf).amin()
    weights = (scalars == value).to(noon.dtype)
    weights /= weights.sum()
    return (weights @ noon).view(advantages.shape[:-1]), weights, value, stats


def by_token(
    advantages: Tensor, *, mask: Tensor | None = None, log_ratio: Tensor | None = None, clip_high: float = 0.2
) -> Result:
    """Level "token": the same of each token alone; weights and value are means over the tokens with data."""
    counted, noon, gated, _, stats = measure(advantages, mask, log_ratio, clip_high)
    gated = gated.masked_fill(counted.logical_not(), math.inf)
    value = gated.amin(0)
    shares = (gated == value).logical_and_(counted).to(noon.dtype)
    shares /= shares.sum(0).clamp_(min=1)
    combined = (shares * noon).sum(0).view(advantages.shape[:-1])
    used = value < math.inf
    tokens = used.sum()
    return combined, shares.sum(1) / tokens, value.where(used, 0.0).sum() / tokens, stats


def group_norm(rewards: Tensor, group_size: int, eps: float = 1e-4) -> tuple[Tensor, Tensor]:
    """``rewards`` ``[B, N]``, normalised, and for each objective how many groups are constant."""
    groups = rewards.view(-1, group_size, rewards.shape[1])
    std, mean = torch.std_mean(groups, 1, keepdim=True)
    return ((groups - mean) / (std + eps)).view_as(rewards), (groups.amax(1) == groups.amin(1)).sum(0)


def by_group_norm(rewards: Tensor, group_size: int) -> Result:
    """Group norm, then the combination; the statistics end with the constant groups."""
    advantages, dead = group_norm(rewards, group_size)
    combined, weights, value, stats = by_batch(advantages, raw=rewards)
    return combined, weights, value, (*stats, dead)


def gae_scan(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns ``[B, T, N]`` by log2(T) doublings: after step s a token has the sum over 2^s tokens."""
    advantages = rewards - values
    advantages[:, :-1] += gamma * values[:, 1:]
    reach, decay = 1, gamma * lam
    while reach < rewards.shape[1]:
        advantages[:, :-reach] += decay * advantages[:, reach:]  # the right side is computed first
        reach, decay = 2 * reach, decay * decay
    return advantages, advantages + values


def gae_pipeline(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Result:
    """Scan, whitening over the batch, and combination."""
    advantages, _ = gae_scan(rewards, values, gamma, lam)
    std, mean = torch.std_mean(advantages, (0, 1))
    return by_batch((advantages - mean) / (std + 1e-4), raw=advantages)


def specification(advantages: Tensor, **options: Any) -> Result:
    """``pama_ext.reference`` in the form of the others."""
    combined, _, weights, value, stats = reference.pama(advantages, **options)
    return combined, weights, value, stats


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` of a function, for the shapes it is first called with."""
    return torch.compile(function, fullgraph=True, dynamic=False)


@torch.library.custom_op("pama_bench::combine", mutates_args=())
def custom_op(advantages: Tensor) -> Tensor:
    """The compiled kernel behind a Python ``custom_op``: the usual way to put one into PyTorch."""
    return pama_ext.combine(advantages).advantages
