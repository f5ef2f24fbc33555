"""The specification of this package in plain PyTorch, written in the order of the paper.

What the compiled kernels compute is defined here, one formula per line, on any device. The method is PAMA
(arXiv 2508.07768). Arithmetic is float64 for float64 input and float32 otherwise; pass ``advantages.double()``
for ground truth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_ext._result import Combined, ObjectiveStats

LOG_RATIO_LIMIT = 20.0

Advantages = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


def combine(advantages: Advantages, *, dim: int = -1, **options: Any) -> Combined:
    """Combine N objectives' advantages by PAMA; arguments and result are those of :func:`pama_ext.combine`."""
    stacked = _objectives_last(advantages, dim)
    shares, weights, value, stats = pama(stacked, **options)
    return _named(Combined(shares.sum(-1).to(stacked.dtype), weights, value, stats), advantages)


def combine_(advantages: Advantages, *, dim: int = -1, **options: Any) -> Combined:
    """Replace each objective's advantages by c_i A_i in place; see :func:`pama_ext.combine_`."""
    shares, weights, value, stats = pama(_objectives_last(advantages, dim), **options)
    if isinstance(advantages, Tensor):
        advantages.detach().movedim(dim, -1).copy_(shares)
    else:
        tensors = advantages.values() if isinstance(advantages, Mapping) else advantages
        for tensor, share in zip(tensors, shares.unbind(-1), strict=True):
            tensor.detach().copy_(share)
    return _named(Combined(advantages, weights, value, stats), advantages)


def pama(
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    log_ratio: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    noon: bool = True,
    level: str = "batch",
    solver: str = "closed_form",
    reward_weights: Tensor | Sequence[float] | None = None,
    nan: str = "ignore",
    skip_inactive: bool = False,
) -> tuple[Tensor, Tensor, Tensor, ObjectiveStats]:
    """One PAMA combination of ``advantages`` ``[B, N]`` or ``[B, T, N]``.

    Returns:
        ``(shares, weights, value, stats)``: ``shares`` is c_i A_i, shaped like ``advantages``; their sum over the
        objectives is the combined advantage. The others are as in :class:`pama_ext.Combined`.
    """
    raw = advantages.detach().to(torch.promote_types(advantages.dtype, torch.float32))
    n, tokens = raw.shape[-1], tuple(range(raw.dim() - 1))
    if reward_weights is not None:
        reward_weights = torch.as_tensor(reward_weights, dtype=raw.dtype, device=raw.device)

    # Which entries exist: `counted` is what the statistics see, `taken` what the combination sees.
    valid = torch.ones_like(raw, dtype=torch.bool) if mask is None else (mask != 0).unsqueeze(-1).expand_as(raw)
    counted = valid & torch.isfinite(raw)
    taken = counted if nan == "ignore" else valid

    # Noon PPO: A_i = max(A'_i, 0); NaN stays NaN.
    noon_advantages = torch.where(taken, raw, 0.0)
    if noon:
        noon_advantages = noon_advantages.clamp(min=0.0)
    weighted = noon_advantages
    if reward_weights is not None and solver != "fixed":
        weighted = noon_advantages * reward_weights

    # I(A): where A > 0 active iff u <= 1 + clip_high, where A < 0 iff u >= 1 - clip_low; as logarithms, in float64.
    gated = weighted
    if log_ratio is not None:
        log_u = log_ratio.detach().double().clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).unsqueeze(-1)
        not_above = log_u <= math.log1p(clip_high)
        not_below = log_u >= (math.log1p(-clip_low) if clip_low < 1 else -math.inf)
        gated = torch.where(torch.where(weighted > 0, not_above, not_below), weighted, 0.0)

    # The scalars a_i: means of I(A_i) over the whole batch, over each row, or of the token alone.
    pool = {"batch": tokens, "sequence": tokens[1:], "token": ()}[level]
    count = _sum(counted, pool)
    scalars = _sum(gated, pool) / count.clamp(min=1)
    has_data = _sum(taken, pool) > 0

    if solver == "fixed":
        weights = torch.full_like(scalars, 1.0 / n) if reward_weights is None else reward_weights.expand_as(scalars)
        value = torch.where(weights != 0, weights * scalars, 0.0).sum(-1)
    else:
        kept = has_data & (_sum(gated != 0, pool) > 0) if skip_inactive else has_data
        kept = torch.where(kept.any(-1, keepdim=True), kept, has_data)  # nobody active: all that have data
        kept = kept | ~kept.any(-1, keepdim=True)  # nobody has data: everybody, hence uniform
        weights, value = closed_form(scalars, kept)

    # The combination: sum over i of c_i A_i. Weight 0 and entries not taken add exactly 0, whatever stands there.
    spread = weights.reshape(weights.shape[:-1] + (1,) * len(pool) + (n,)).expand_as(raw)
    shares = torch.where(taken & (spread != 0), spread * weighted, 0.0)

    if level == "token":  # reported are the means over the tokens that have data
        used = has_data.any(-1, keepdim=True)
        total = used.sum()
        value = torch.where(used.squeeze(-1), value, 0.0).sum() / total.clamp(min=1)
        if solver == "fixed":
            weights = raw.new_full((n,), 1.0 / n) if reward_weights is None else reward_weights
        else:
            mean = torch.where(used, weights, 0.0).sum(tokens) / total.clamp(min=1)
            weights = torch.where(total > 0, mean, 1.0 / n)
    return shares, weights, value, statistics(raw, valid, noon_advantages, gated)


def closed_form(scalars: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Theorem 1 over the last dimension: s*, the projection of 0 onto [min a, max a], and weights that attain it.

    Args:
        scalars: a_i, floating, ``[..., N]``.
        kept: bool ``[..., N]``, the objectives that take part, at least one per problem; the others get weight 0.

    Returns:
        ``(weights [..., N], value [...])``; equal weights over ties; NaN if a kept scalar is NaN.
    """
    low = torch.where(kept, scalars, math.inf).amin(-1, keepdim=True)
    high = torch.where(kept, scalars, -math.inf).amax(-1, keepdim=True)
    at_low, at_high = kept & (scalars == low), kept & (scalars == high)

    scale = torch.maximum(high, -low)
    width = high / scale - low / scale
    low_share = torch.where((low > 0) | (low == high), 1.0, torch.where(high < 0, 0.0, high / scale / width))
    high_share = torch.where((low > 0) | (low == high), 0.0, torch.where(high < 0, 1.0, -low / scale / width))
    weights = torch.where(at_low, low_share / at_low.sum(-1, keepdim=True), 0.0)
    weights = weights + torch.where(at_high, high_share / at_high.sum(-1, keepdim=True), 0.0)

    undefined = torch.isnan(low) | torch.isnan(high)
    value = torch.minimum(torch.maximum(torch.zeros_like(low), low), high)
    return torch.where(undefined, math.nan, weights), torch.where(undefined, math.nan, value).squeeze(-1)


def statistics(raw: Tensor, valid: Tensor, noon_advantages: Tensor, gated: Tensor) -> ObjectiveStats:
    """The statistics of each objective; all arguments ``[..., N]``, see :class:`pama_ext.ObjectiveStats`."""
    raw, valid, noon_advantages, gated = (x.flatten(0, -2) for x in (raw, valid, noon_advantages, gated))
    counted = valid & torch.isfinite(raw)
    count = counted.sum(0)
    divisor = count.clamp(min=1)
    mean = torch.where(counted, raw, 0.0).sum(0) / divisor
    squares = torch.where(counted, raw - mean, 0.0).square().sum(0)
    nonzero = noon_advantages != 0
    edge = raw.new_full((1, raw.shape[1]), math.inf)  # amin and amax want at least one row
    return ObjectiveStats(
        count=count.to(raw.dtype),
        mean=mean,
        std=torch.where(count > 1, squares / (count - 1).clamp(min=1), 0.0).sqrt(),
        min=torch.where(count > 0, torch.cat([edge, torch.where(counted, raw, math.inf)]).amin(0), 0.0),
        max=torch.where(count > 0, torch.cat([-edge, torch.where(counted, raw, -math.inf)]).amax(0), 0.0),
        positive=(counted & (raw > 0)).sum(0) / divisor.to(raw.dtype),
        clipped=(nonzero & (gated == 0)).sum(0) / nonzero.sum(0).clamp(min=1).to(raw.dtype),
        active_mean=gated.sum(0) / divisor,
        nonfinite=(valid & ~torch.isfinite(raw)).sum(0).to(raw.dtype),
    )


def _sum(x: Tensor, over: tuple[int, ...]) -> Tensor:
    """Sum over some dimensions, none included (where ``Tensor.sum`` would sum over all)."""
    return x.sum(over) if over else x * 1


def _objectives_last(advantages: Advantages, dim: int) -> Tensor:
    if isinstance(advantages, Tensor):
        return advantages.movedim(dim, -1)
    return torch.stack(list(advantages.values() if isinstance(advantages, Mapping) else advantages), -1)


def _named(result: Combined, advantages: Advantages) -> Combined:
    if isinstance(advantages, Mapping):
        result.names = tuple(advantages)
    return result
