"""What a user would run instead of ``pama_ext.combine``: level "batch", Noon, closed form, every statistic.

Each takes ``advantages`` ``[..., N]`` with ``mask`` and ``log_ratio`` ``[...]`` and returns
``(combined [...], weights [N], value [], stats)``, stats in the order of :class:`pama_ext.ObjectiveStats`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import pama_ext
from pama_ext import reference

Result = tuple[Tensor, Tensor, Tensor, Any]


def eager(
    advantages: Tensor, *, mask: Tensor | None = None, log_ratio: Tensor | None = None, clip_high: float = 0.2
) -> Result:
    """PyTorch as written by hand for speed: objectives first, int32 counts, each temporary used more than once.

    With Noon all scalars are >= 0, so the closed form is equal weight over the objectives tied at the minimum.
    """
    raw = advantages.flatten(0, -2).t().contiguous()  # [N, tokens]: reductions run along memory
    counted = raw.abs() < math.inf
    if mask is not None:
        counted.logical_and_(mask.flatten())
    count = counted.sum(1, dtype=torch.int32)
    divisor = count.clamp(min=1)

    positive_part = raw.where(counted, 0.0)
    mean = positive_part.sum(1) / divisor
    filled = raw.where(counted, mean[:, None])  # the mean in place of what does not count: neutral in all three
    low, high = filled.amin(1), filled.amax(1)
    deviation = torch.linalg.vector_norm(filled.sub_(mean[:, None]), dim=1)
    std = deviation / (divisor - 1).clamp_(min=1).sqrt()

    positive_part.clamp_(min=0.0)
    positive = (positive_part > 0).sum(1, dtype=torch.int32)
    gated, active = positive_part, positive
    if log_ratio is not None:
        gated = positive_part * (log_ratio.flatten() <= math.log1p(clip_high))
        active = (gated > 0).sum(1, dtype=torch.int32)
    scalars = gated.sum(1) / divisor

    value = scalars.masked_fill(count == 0, math.inf).amin()
    weights = (scalars == value).to(raw.dtype)
    weights /= weights.sum()
    combined = (weights @ positive_part).view(advantages.shape[:-1])

    clipped = (positive - active) / positive.clamp(min=1)
    nonfinite = (raw.shape[1] if mask is None else mask.sum(dtype=torch.int32)) - count
    stats = (count, mean, std, low, high, positive / divisor, clipped, scalars, nonfinite)
    return combined, weights, value, stats


def specification(advantages: Tensor, **options: Any) -> Result:
    """``pama_ext.reference`` on plain tensors, the form that ``torch.compile`` is given."""
    combined, _, weights, value, stats = reference.pama(advantages, **options)
    return combined, weights, value, stats


def compiled() -> Callable[..., Result]:
    """``torch.compile`` of the specification, for the shapes it is first called with."""
    torch.compiler.reset()
    return torch.compile(specification, fullgraph=True, dynamic=False)


@torch.library.custom_op("pama_bench::combine", mutates_args=())
def custom_op(advantages: Tensor) -> Tensor:
    """The compiled kernel behind a Python ``custom_op``: the usual way to put one into PyTorch."""
    return pama_ext.combine(advantages).advantages
