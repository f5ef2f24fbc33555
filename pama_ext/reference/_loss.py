"""The losses, one formula per line; autograd differentiates them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_ext._loss import Objectives, PolicyMetrics, ValueMetrics
from pama_ext.reference._combine import LOG_RATIO_LIMIT


def policy_loss(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    max_weight: float | None = None,
    kl_coef: float = 0.0,
    ref_log_probs: Tensor | None = None,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
    objective_advantages: Objectives | None = None,
    weights: Tensor | Sequence[float] | None = None,
) -> tuple[Tensor, PolicyMetrics]:
    """The clipped policy loss; see :func:`pama_ext.policy_loss`."""
    objectives = torch.zeros(0) if objective_advantages is None else _last(objective_advantages)
    given = [x for x in (log_probs, old_log_probs, advantages, objectives, ref_log_probs) if x is not None]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    new, old = log_probs.to(dtype), old_log_probs.detach().to(dtype)
    valid = torch.ones_like(new, dtype=torch.bool) if mask is None else mask != 0

    def per_token(x: Tensor) -> Tensor:  # [B] or [B, T]; of what is not valid nothing is left
        x = x.detach().to(dtype)
        return torch.where(valid, x.unsqueeze(1) if x.dim() == 1 else x, 0.0)

    # A: given, or the sum of c_i A_i over the objectives.
    each, c = [], new.new_ones(0)
    if advantages is not None:
        advantage = per_token(advantages)
    else:
        each = [per_token(x) for x in objectives.unbind(-1)]
        c = torch.as_tensor([1.0] * len(each) if weights is None else weights, dtype=dtype, device=new.device).detach()
        advantage = sum((torch.where(c_i != 0, c_i * a_i, 0.0) for c_i, a_i in zip(c, each, strict=True)), 0.0 * c[0])

    # u, and the surrogate.
    new = torch.where(valid, new, 0.0)
    log_ratio = torch.where(valid, new - old, 0.0)
    bounded = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    u = bounded.exp()
    if max_weight is not None:
        weight = u.detach().clamp(max=max_weight)
        losses = -weight * advantage * new
        high = u > max_weight
        low = dual = torch.zeros_like(high)
        slope = weight
    else:
        losses = -torch.minimum(u * advantage, u.clamp(1 - clip_low, 1 + clip_high) * advantage)
        high, low = (advantage > 0) & (u > 1 + clip_high), (advantage < 0) & (u < 1 - clip_low)
        dual = torch.zeros_like(high)
        if dual_clip is not None:
            dual = (advantage < 0) & (u > dual_clip)
            losses = torch.where(dual, -dual_clip * advantage, losses)
        slope = torch.where(high | low | dual | (log_ratio != bounded), 0.0, u.detach())

    # KL to the reference policy, by the k3 estimator.
    k3 = torch.zeros_like(losses)
    if ref_log_probs is not None:
        apart = torch.where(valid, ref_log_probs.detach().to(dtype) - new, 0.0)
        apart = apart.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        k3 = apart.expm1() - apart
        if kl_coef != 0:
            losses = losses + kl_coef * k3

    loss, token_weight = aggregated(losses, valid, aggregate, normalizer)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid, x.detach(), 0.0).sum(dtype=dtype) / valid.sum().clamp(min=1).to(dtype)

    clip_fractions, shares = None, None
    if each:
        beyond = [
            (a_i != 0) & high if max_weight is not None
            else ((a_i > 0) & (u > 1 + clip_high)) | ((a_i < 0) & (u < 1 - clip_low))
            for a_i in each
        ]  # fmt: skip
        clip_fractions = torch.stack([mean(x) for x in beyond])
        parts = [
            torch.where(valid & (c_i != 0), (c_i * a_i * slope).abs(), 0.0) for c_i, a_i in zip(c, each, strict=True)
        ]
        moved = torch.stack([(part * token_weight).sum() for part in parts])
        shares = torch.where(moved.sum() != 0, moved / moved.sum(), 0.0)
    some = torch.cat([torch.where(valid & ~u.isnan(), u.detach(), 0.0).flatten(), u.new_zeros(1)])
    metrics = PolicyMetrics(
        clip_fraction=mean(high | low),
        clip_fraction_low=mean(low),
        clip_fraction_dual=mean(dual),
        approx_kl=mean(-bounded),
        ratio_mean=mean(u),
        ratio_max=some.max(),
        ref_kl=None if ref_log_probs is None else mean(k3),
        objective_clip_fraction=clip_fractions,
        objective_gradient_share=shares,
    )
    return loss, metrics


def value_loss(
    values: Objectives,
    old_values: Objectives | None,
    returns: Objectives,
    *,
    mask: Tensor | None = None,
    clip: float | None = None,
    aggregate: str = "token-mean",
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, ValueMetrics]:
    """The clipped value loss of N heads; see :func:`pama_ext.value_loss`."""
    names = tuple(values) if isinstance(values, Mapping) else None
    v, target = _heads(values, names), _heads(returns, names).detach()
    old = v.detach() if clip is None or old_values is None else _heads(old_values, names).detach()
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in (v, target, old)) else torch.float32
    valid = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device) if mask is None else mask != 0
    v, target, old = (torch.where(valid.unsqueeze(-1), x.to(dtype), 0.0) for x in (v, target, old))

    errors = (v - target).square()
    beyond = torch.zeros_like(errors, dtype=torch.bool)
    if clip is not None:
        other = (torch.maximum(torch.minimum(v, old + clip), old - clip) - target).square()
        beyond = other > errors
        errors = torch.where(beyond, other, errors)  # where both are as large, V has its gradient
    each, _ = zip(*(aggregated(e / 2, valid, aggregate, normalizer) for e in errors.unbind(-1)), strict=True)

    def mean(x: Tensor) -> Tensor:
        return torch.where(valid.unsqueeze(-1), x.detach(), 0.0).sum((0, 1), dtype=dtype) / valid.sum().clamp(min=1)

    losses = torch.stack(each)
    return losses.sum(), ValueMetrics(losses.detach(), mean(beyond), mean(v))


def aggregated(
    losses: Tensor, valid: Tensor, aggregate: str, normalizer: float | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The loss of losses ``[B, T]``, and what each token counts for in its sum, ``[B, 1]``."""
    lengths = valid.sum(1, keepdim=True)
    weight = torch.ones_like(lengths, dtype=losses.dtype)
    if aggregate == "seq-mean-token-mean":
        weight = weight / lengths.clamp(min=1)
    divisor: Any = {"token-mean": lengths.sum(), "token-sum": 1.0}.get(aggregate, (lengths > 0).sum())
    if normalizer is not None:
        divisor = normalizer
    divisor = torch.as_tensor(divisor, dtype=torch.float64, device=losses.device).detach().reshape(())
    factor = torch.where(divisor != 0, 1 / divisor, 0.0).to(losses.dtype)
    return torch.where(valid, losses * weight, 0.0).sum() * factor, weight


def _last(objectives: Objectives) -> Tensor:
    """The objectives of any form, last."""
    if isinstance(objectives, Tensor):
        return objectives
    return torch.stack(list(objectives.values() if isinstance(objectives, Mapping) else objectives), -1)


def _heads(values: Any, names: tuple[str, ...] | None) -> Tensor:
    if isinstance(values, Tensor):
        return values.unsqueeze(-1) if values.dim() == 2 else values
    return torch.stack([values[k] for k in names or values] if isinstance(values, Mapping) else list(values), -1)
