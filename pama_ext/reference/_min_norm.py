"""The exact min-norm point of the simplex, one problem after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def min_norm(gramian: Tensor) -> Tensor:
    """Min-norm point of the simplex; see :func:`pama_ext.min_norm`.

    Wolfe's method: minimise over the affine hull of a support, step back to the simplex where that leaves it, and let
    in the vector that points down most, until none does.
    """
    matrices = gramian.detach().double().reshape(-1, *gramian.shape[-2:])
    weights = [_min_norm_point((g + g.T) / 2) for g in matrices]
    dtype = torch.promote_types(gramian.dtype, torch.float32)
    shape = gramian.shape[:-1]
    return torch.stack(weights).reshape(shape).to(dtype) if weights else gramian.new_zeros(shape, dtype=dtype)


def min_norm_kept(gramian: Tensor, kept: Tensor) -> Tensor:
    """:func:`min_norm` of the objectives that are ``kept`` ``[..., N]``; the others get weight 0."""
    weights = torch.zeros_like(kept, dtype=gramian.dtype)
    for problem in torch.ones(kept.shape[:-1]).nonzero().tolist() or ([[]] if kept.dim() == 1 else []):
        at = tuple(problem)
        some = kept[at].nonzero().squeeze(-1)
        point = min_norm(gramian[at][some][:, some])
        if point.isnan().any():
            weights[at] = math.nan
        else:
            weights[at][some] = point
    return weights


def _min_norm_point(gram: Tensor) -> Tensor:
    lengths = gram.diagonal().clamp(min=0).sqrt()
    if not torch.isfinite(gram).all():
        return torch.full_like(lengths, math.nan)
    if (lengths == 0).any():
        return (lengths == 0) / (lengths == 0).sum().double()
    # u = c * lengths, in units of the shortest: a unit diagonal, raised by 2^-42 so that the minimum is unique.
    scaled = gram / lengths / lengths.unsqueeze(1)
    scaled.diagonal().fill_(1 + 2.0**-42)
    b = lengths.min() / lengths
    u = torch.zeros_like(b)
    u[lengths.argmin()] = 1.0
    for _ in range(20 * len(b)):
        slope = scaled @ u - (u @ scaled @ u) * b
        slope[u > 0] = 0.0
        if slope.min() >= -4e-16 * len(b) * (u.sum() + b.max() * (u @ scaled @ u)):
            break
        support = [*(u > 0).nonzero().squeeze(-1).tolist(), int(slope.argmin())]
        while True:
            point = torch.zeros_like(u)
            point[support] = torch.linalg.solve(scaled[support][:, support], b[support])
            point = point / (b @ point)
            if (point[support] > 0).all():
                break
            steps = {j: float(u[j] / (u[j] - point[j])) for j in support if point[j] <= 0}
            step = min(steps.values())
            u = u + step * (point - u)
            support = [j for j in support if j not in steps or steps[j] > step]
            u[[j for j in range(len(u)) if j not in support]] = 0.0
        u = point
    return u * b / (u @ b)
