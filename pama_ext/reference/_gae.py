"""Generalised advantage estimation as a loop over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_ext._combine import Advantages
from pama_ext._gae import each


def gae(
    rewards: Advantages,
    values: Advantages,
    *,
    dim: int = -1,
    mask: Tensor | None = None,
    gamma: float | Sequence[float] | Tensor = 1.0,
    lam: float | Sequence[float] | Tensor = 0.95,
    kl_penalty: Tensor | None = None,
    bootstrap: Advantages | None = None,
    offsets: Tensor | None = None,
) -> tuple[Any, Any]:
    """Generalised advantage estimation, the recursion as it is written down; see :func:`pama_ext.gae`."""
    dim %= 3 if offsets is None else 2
    names = tuple(values) if isinstance(values, Mapping) else None

    def last(x: Advantages) -> Tensor:  # objectives last, in the arithmetic's dtype
        stacked = torch.stack(each(x, dim, names), -1).detach()
        return stacked.to(torch.promote_types(stacked.dtype, torch.float32))

    v, r = last(values), last(rewards)
    dtype = torch.promote_types(v.dtype, r.dtype)
    v, r = v.to(dtype), r.to(dtype)
    n = v.shape[-1]
    valid = v.new_ones(v.shape[:-1], dtype=torch.bool) if mask is None else mask.detach() != 0
    penalty = v.new_zeros(valid.shape) if kl_penalty is None else kl_penalty.detach().to(dtype)
    gamma, lam = (torch.as_tensor(x, dtype=torch.float64, device=v.device).expand(n) for x in (gamma, lam))
    decay = (gamma * lam).to(dtype)
    gamma = gamma.to(dtype)

    # Every sequence as a row, from its first token on; `at` is where its tokens stand.
    tokens, shape = v.shape[:-1].numel(), v.shape
    bounds = torch.arange(shape[0] + 1, device=v.device) * shape[1] if offsets is None else offsets.to(torch.int64)
    starts, ends = bounds[:-1, None], bounds[1:, None]
    at = starts + torch.arange(int((ends - starts).max()) if starts.numel() else 0, device=v.device)
    exists = at < ends
    at = torch.where(exists, at, 0)
    row_v = v.reshape(tokens, n)[at]
    row_penalty, row_valid = (x.reshape(tokens, 1)[at] for x in (penalty, valid))
    row_valid = row_valid & exists.unsqueeze(-1)
    outcome = r.shape != shape
    row_r = None if outcome else r.reshape(tokens, n)[at]

    score = r if outcome else v.new_zeros(len(at), n)  # counts at the last valid token
    next_value = v.new_zeros(len(at), n) if bootstrap is None else last(bootstrap).to(dtype)
    next_advantage = v.new_zeros(len(at), n)
    row_advantages = torch.zeros_like(row_v)
    for t in reversed(range(at.shape[1])):
        here = row_valid[:, t]
        reward = (score if row_r is None else row_r[:, t]) - row_penalty[:, t]
        delta = reward + gamma * next_value - row_v[:, t]
        advantage = delta + decay * next_advantage
        row_advantages[:, t] = torch.where(here, advantage, 0.0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, row_v[:, t], next_value)
        score = torch.where(here, 0.0, score)

    advantages = v.new_zeros(tokens, n)
    advantages[at[exists]] = row_advantages[exists]
    advantages = advantages.reshape(shape)
    returns = torch.where(valid.unsqueeze(-1), advantages + v, 0.0)

    def as_values(x: Tensor) -> Any:
        types = [each(a, dim, names)[0].dtype for a in (rewards, values)]
        x = x.to(torch.promote_types(*types))
        if isinstance(values, Tensor):
            return x.movedim(-1, dim).contiguous()
        return list(x.unbind(-1)) if names is None else dict(zip(names, x.unbind(-1), strict=True))

    return as_values(advantages), as_values(returns)
