"""The losses in PyTorch: tensors ``[B, T]``, values and returns ``[B, T, N]``, means over the tokens of ``mask``."""

from __future__ import annotations

import torch
from torch import Tensor


def policy_alone(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """The clipped policy loss, as a user would write it."""
    losses, _, _ = _surrogate(log_probs, old, advantages)
    return (losses * mask).sum() / mask.sum()


def policy(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Loss and metrics, what they share computed once."""
    losses, ratio, log_ratio = _surrogate(log_probs, old, advantages)
    count = mask.sum()
    with torch.no_grad():
        ratio, log_ratio = ratio * mask, log_ratio * mask
        high, low = (advantages > 0) & (ratio > 1.2), (advantages < 0) & (ratio < 0.8) & mask
        low_fraction = low.sum() / count
        metrics = (high.sum() / count + low_fraction, low_fraction, -log_ratio.sum() / count, ratio.sum() / count,
                   ratio.max())  # fmt: skip
    return (losses * mask).sum() / count, metrics


def value(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The value loss that verl has, of all heads, and its metrics for each."""
    error = (values - returns).square()
    other = (torch.clamp(values, old - 0.2, old + 0.2) - returns).square()
    valid, count = mask.unsqueeze(-1), mask.sum()
    losses = 0.5 * (torch.maximum(error, other) * valid).sum((0, 1)) / count
    with torch.no_grad():
        metrics = losses.detach(), ((other > error) & valid).sum((0, 1)) / count, (values * valid).sum((0, 1)) / count
    return losses.sum(), metrics


def _surrogate(log_probs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of each token, its ratio, and the logarithm of that."""
    log_ratio = (log_probs - old).clamp(-20, 20)
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages), ratio, log_ratio
