"""PAMA itself: normalisation, Noon, the indicator, the solve and the combination."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_ext._combine import Advantages
from pama_ext._normalize import Normalize
from pama_ext._result import Combined, ObjectiveStats
from pama_ext.reference._min_norm import min_norm_kept

LOG_RATIO_LIMIT = 20.0


def combine(advantages: Advantages, *, dim: int = -1, **options: Any) -> Combined:
    """Combine N objectives' advantages by PAMA; arguments and result are those of :func:`pama_ext.combine`."""
    stacked = _objectives_last(advantages, dim)
    combined, _, weights, value, stats = pama(stacked, **options)
    return _named(Combined(combined.to(stacked.dtype), weights, value, stats), advantages)


def combine_(advantages: Advantages, *, dim: int = -1, **options: Any) -> Combined:
    """Replace each objective's advantages by c_i A_i in place; see :func:`pama_ext.combine_`."""
    _, shares, weights, value, stats = pama(_objectives_last(advantages, dim), **options)
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
    normalize: Normalize | None = None,
    reward_weights: Tensor | Sequence[float] | None = None,
    nan: str = "ignore",
    skip_inactive: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, ObjectiveStats]:
    """One PAMA combination of ``advantages`` ``[B, N]`` or ``[B, T, N]``.

    Returns:
        ``(combined, shares, weights, value, stats)``: ``shares`` is c_i A_i, shaped like ``advantages``; their sum over
        the objectives is ``combined``, before ``Normalize.combined``. The others are as in
        :class:`pama_ext.Combined`.
    """
    normalize = normalize or Normalize()
    raw = advantages.detach().to(torch.promote_types(advantages.dtype, torch.float32))
    n, tokens = raw.shape[-1], tuple(range(raw.dim() - 1))
    group, groups = groups_of(normalize, raw.shape[0], raw.device)
    if reward_weights is not None:
        reward_weights = torch.as_tensor(reward_weights, dtype=raw.dtype, device=raw.device)

    # Which entries exist: `counted` is what the statistics see, `taken` what the combination sees.
    valid = torch.ones_like(raw, dtype=torch.bool) if mask is None else (mask != 0).unsqueeze(-1).expand_as(raw)
    by_row = normalize.over == "row_sums" and raw.dim() == 3
    if by_row:
        raw = row_sums(raw, valid).unsqueeze(1).expand_as(raw)
    counted = valid & torch.isfinite(raw)
    taken = counted if nan == "ignore" else valid

    # Normalize.by: each objective on its own; its samples are the tokens, or the rows.
    processed, dead = raw, raw.new_zeros(n)
    if normalize.by != "none" and raw.numel() > 0:
        pool, pools = (group, groups) if normalize.by == "group" else (torch.zeros_like(group), 1)
        if by_row:
            scores = torch.where(taken, raw, -math.inf).amax(1)
            processed, dead = normalised(scores, taken.any(1), pool, pools, normalize)
            processed = processed.unsqueeze(1).expand_as(raw)
        else:
            processed, dead = normalised(raw, taken, pool, pools, normalize)

    # Noon PPO: A_i = max(A'_i, 0); NaN stays NaN.
    noon_advantages = torch.where(taken, processed, 0.0)
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

    # The scalars a_i: means of I(A_i) over the whole batch, over each row or group, or of the token alone.
    def pooled(x: Tensor) -> Tensor:
        if level == "group":
            rows = _sum(x, tokens[1:])
            return rows.new_zeros(groups, *rows.shape[1:]).index_add(0, group, rows)
        return _sum(x, {"batch": tokens, "sequence": tokens[1:], "token": ()}[level])

    scalars = pooled(gated) / pooled(counted).clamp(min=1)
    has_data = pooled(taken) > 0

    if solver == "fixed":
        weights = torch.full_like(scalars, 1.0 / n) if reward_weights is None else reward_weights.expand_as(scalars)
        value = torch.where(weights != 0, weights * scalars, 0.0).sum(-1)
    else:
        kept = has_data & (pooled(gated != 0) > 0) if skip_inactive else has_data
        kept = torch.where(kept.any(-1, keepdim=True), kept, has_data)  # nobody active: all that have data
        kept = kept | ~kept.any(-1, keepdim=True)  # nobody has data: everybody, hence uniform
        one_token = level == "token" or (level == "sequence" and raw.dim() == 2)
        if solver == "closed_form" or one_token:  # of one token alone, the vector problem is the scalar one
            weights, value = closed_form(scalars, kept)
            value = value if solver == "closed_form" else value.abs()
        else:
            products = pooled(gated.unsqueeze(-1) * gated.unsqueeze(-2))
            gramian = products / pooled(taken.any(-1, keepdim=True)).clamp(min=1).unsqueeze(-1)
            weights = min_norm_kept(gramian, kept)
            value = (weights.unsqueeze(-1) * weights.unsqueeze(-2) * gramian).sum((-1, -2)).clamp(min=0).sqrt()

    # The combination: sum over i of c_i A_i. Weight 0 and entries not taken add exactly 0, whatever stands there.
    of_row = weights[group] if level == "group" else weights
    over = raw.dim() - 1 if level == "batch" else raw.dim() - 2 if level in ("sequence", "group") else 0
    spread = of_row.reshape(of_row.shape[:-1] + (1,) * over + (n,)).expand_as(raw)
    shares = torch.where(taken & (spread != 0), spread * weighted, 0.0)
    combined = shares.sum(-1)

    # Normalize.combined: the combination itself, over the tokens at which any objective has data.
    if normalize.combined != "none" and raw.numel() > 0:
        last = normalize.combined if isinstance(normalize.combined, Normalize) else normalize
        pool, pools = (group, groups) if normalize.combined == "group" else (torch.zeros_like(group), 1)
        used = taken.any(-1)
        whitened, _ = normalised(combined.unsqueeze(-1), used.unsqueeze(-1), pool, pools, last)
        combined = torch.where(used, whitened.squeeze(-1), 0.0)

    if level == "token":  # reported are the means over the tokens that have data
        used = has_data.any(-1, keepdim=True)
        total = used.sum()
        value = torch.where(used.squeeze(-1), value, 0.0).sum() / total.clamp(min=1)
        if solver == "fixed":
            weights = raw.new_full((n,), 1.0 / n) if reward_weights is None else reward_weights
        else:
            mean = torch.where(used, weights, 0.0).sum(tokens) / total.clamp(min=1)
            weights = torch.where(total > 0, mean, 1.0 / n)
    if level == "group" and normalize.group_ids is not None:  # how many groups there are is known to the ids alone
        weights, value = weights[group], value[group]
    return combined, shares, weights, value, statistics(raw, valid, processed, noon_advantages, gated, dead)


def groups_of(normalize: Normalize, rows: int, device: torch.device) -> tuple[Tensor, int]:
    """The group of each row, ``[B]`` int64, and how many groups there are; all rows are one if none are described."""
    if normalize.group_size is not None:
        return torch.arange(rows, device=device) // normalize.group_size, rows // normalize.group_size
    if normalize.group_offsets is not None:
        ends = normalize.group_offsets[1:].to(torch.int64)
        return torch.searchsorted(ends, torch.arange(rows, device=device), right=True), ends.shape[0]
    if normalize.group_ids is not None:
        names, group = torch.unique(normalize.group_ids.to(torch.int64), return_inverse=True)
        return group, names.shape[0]
    return torch.zeros(rows, dtype=torch.int64, device=device), 1


def row_sums(raw: Tensor, valid: Tensor) -> Tensor:
    """Each row's score: the sum over its valid entries, ``[B, T, N]`` to ``[B, N]``; non-finite if one of them is."""
    return torch.where(valid, raw, 0.0).double().sum(1).to(raw.dtype)


def normalised(x: Tensor, usable: Tensor, pool: Tensor, pools: int, how: Normalize) -> tuple[Tensor, Tensor]:
    """``x`` ``[B, ..., N]`` normalised, each objective over its usable samples in each pool of rows, in float64.

    Returns:
        the normalised samples (whatever, where not usable), and for each objective the number of pools that have
        samples but give only 0: constant ones, and those of one sample if ``singleton="zero"``.
    """
    n = x.shape[-1]
    if not (how.center or how.scale):
        return x, x.new_zeros(n)
    samples, used = x.double().reshape(-1, n), usable.reshape(-1, n)
    pool = pool.repeat_interleave(samples.shape[0] // x.shape[0])
    zero = samples.new_zeros(pools, n)
    count = zero.index_add(0, pool, used.double())
    mean = zero.index_add(0, pool, torch.where(used, samples, 0.0)) / count.clamp(min=1)
    squares = torch.where(used, samples - mean[pool], 0.0).square()
    variance = zero.index_add(0, pool, squares) / (count - how.correction).clamp(min=1)
    index = pool.unsqueeze(1).expand_as(samples)
    low = (zero + math.inf).scatter_reduce(0, index, torch.where(used, samples, math.inf), "amin")
    high = (zero - math.inf).scatter_reduce(0, index, torch.where(used, samples, -math.inf), "amax")

    single, constant = count == 1, (low == high) & (count > 1)
    if how.singleton == "raw":
        mean, variance = torch.where(single, 0.0, mean), torch.where(single, 1.0, variance)
        dead = constant
    else:
        dead = constant | single
    divisor = variance.sqrt() + how.eps if how.eps_in == "std" else (variance + how.eps).sqrt()
    result = samples - mean[pool] if how.center else samples
    result = result / divisor[pool] if how.scale else result
    broken = zero.index_add(0, pool, (used & ~torch.isfinite(samples)).double()) > 0  # only if nan="propagate"
    dead = dead & ~broken
    result = torch.where(dead[pool], 0.0, torch.where(broken[pool], math.nan, result))
    return result.to(x.dtype).reshape(x.shape), dead.sum(0).to(x.dtype)


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


def statistics(
    raw: Tensor, valid: Tensor, processed: Tensor, noon_advantages: Tensor, gated: Tensor, dead: Tensor
) -> ObjectiveStats:
    """The statistics of each objective, see :class:`pama_ext.ObjectiveStats`; ``dead`` ``[N]``, others ``[..., N]``."""
    raw, valid, processed, noon_advantages, gated = (
        x.flatten(0, -2) for x in (raw, valid, processed, noon_advantages, gated)
    )
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
        positive=(counted & (processed > 0)).sum(0) / divisor.to(raw.dtype),
        clipped=(nonzero & (gated == 0)).sum(0) / nonzero.sum(0).clamp(min=1).to(raw.dtype),
        active_mean=gated.sum(0) / divisor,
        nonfinite=(valid & ~torch.isfinite(raw)).sum(0).to(raw.dtype),
        dead_groups=dead,
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
