"""``gae``: generalised advantage estimation for N value heads; meaning is checked here, then a door is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from pama_ext import _C, _checks

Objectives = TypeVar("Objectives", Tensor, Sequence[Tensor], Mapping[str, Tensor])
PerObjective = float | Sequence[float] | Tensor


def gae(
    rewards: Tensor | Sequence[Tensor] | Mapping[str, Tensor],
    values: Objectives,
    *,
    dim: int = -1,
    mask: Tensor | None = None,
    gamma: PerObjective = 1.0,
    lam: PerObjective = 0.95,
    kl_penalty: Tensor | None = None,
    bootstrap: Tensor | Sequence[Tensor] | Mapping[str, Tensor] | None = None,
    offsets: Tensor | None = None,
) -> tuple[Objectives, Objectives]:
    r"""Advantages and returns of N objectives, each by its own value head, in one pass and without a loop over time.

    Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438), over the valid tokens of each sequence
    for each objective i, from the last to the first:

    .. math::
        \delta_t = r_t + \gamma_i V_{t+1} - V_t, \qquad A_t = \delta_t + \gamma_i \lambda_i A_{t+1}, \qquad
        R_t = A_t + V_t

    where t + 1 is the next valid token. Behind the last one, V is ``bootstrap`` and A is 0.

    Args:
        rewards: r, ``[B, T, N]``; or ``[B, N]``, one score for each sequence, which counts at its last valid token.
            Also a sequence or dict of N tensors ``[B, T]`` or ``[B]``. float32, float64, bfloat16 or float16, any
            strides, CPU or CUDA. Read as detached, like all that follows.
        values: V, ``[B, T, N]``, or a sequence or dict of N tensors ``[B, T]``. N from 1 to 64.
        dim: the dimension of the objectives in tensors that hold all of them; where ``[B, N]`` has no dimension of
            time, the one it would be after removing that of ``values``.
        mask: ``[B, T]``, bool, integer or floating: non-zero = valid. Tokens that are not are skipped, the recursion
            is carried over them, and the results are 0 there. Whatever stands there has no influence. None: all valid.
        gamma: discount, from 0 to 1: a float, or one for each objective as ``[N]`` floats or a tensor on the device of
            ``values``, which is not looked at.
        lam: lambda, from 0 to 1, likewise.
        kl_penalty: ``[B, T]``, floating: subtracted from the reward of every objective at each token.
        bootstrap: ``[B, N]``, or a sequence or dict of N tensors ``[B]``: the value after the last token. None: 0.
        offsets: ``[S + 1]``, int32 or int64, from 0 to ``total``, ascending: the sequences follow each other without
            padding. Then ``[B, T]`` above is ``[total]``, and ``[B]`` is ``[S]``; ``rewards`` of the shape of
            ``values`` are those of tokens. On a GPU offsets are not looked at.

    Returns:
        ``(advantages, returns)``, both in the form of ``values``, of the dtype to which ``rewards`` and ``values``
        promote, contiguous; computed in float32, in float64 where one of them is. Nothing requires grad.

    Raises:
        ValueError: a shape, device or range does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.

    Errors are raised before any work. A value that is not finite spreads to the tokens before it, as the recursion has
    it, and to no other sequence or objective. Deterministic; legal in a CUDA graph.
    """
    if not torch.compiler.is_dynamo_compiling():
        result: tuple[Any, Any] | None = _C.gae(rewards, values, dim, mask, gamma, lam, kl_penalty, bootstrap, offsets)
        if result is not None:
            return result
    return _gae_dispatcher(
        rewards, values, dim=dim, mask=mask, gamma=gamma, lam=lam, kl_penalty=kl_penalty, bootstrap=bootstrap,
        offsets=offsets,
    )  # fmt: skip


def _gae_dispatcher(
    rewards: Any,
    values: Any,
    *,
    dim: int = -1,
    mask: Tensor | None = None,
    gamma: PerObjective = 1.0,
    lam: PerObjective = 0.95,
    kl_penalty: Tensor | None = None,
    bootstrap: Any = None,
    offsets: Tensor | None = None,
) -> tuple[Any, Any]:
    """Door 1, ``torch.ops.pama_ext``: for compile, export, modes and subclasses, and for saying what is wrong."""
    dim = _checks.gae(rewards, values, dim, mask, kl_penalty, bootstrap, offsets)
    names = tuple(values) if isinstance(values, Mapping) else None
    columns = each(values, dim)
    n, first = len(columns), columns[0]
    gammas, lams = (_checks.per_objective(name, x, n, first) for name, x in (("gamma", gamma), ("lam", lam)))
    listed = not isinstance(values, Tensor)
    after = [] if bootstrap is None else each(bootstrap, dim, names)
    results = torch.ops.pama_ext.gae(
        each(rewards, dim, names), columns, 0 if listed else dim, mask, *gammas, *lams, kl_penalty, after, offsets
    )
    if not listed:
        return results[0], results[1]
    advantages, returns = (list(result.unbind(0)) for result in results)
    if names is None:
        return advantages, returns
    return dict(zip(names, advantages, strict=True)), dict(zip(names, returns, strict=True))


def each(objectives: Any, dim: int, names: tuple[str, ...] | None = None) -> list[Tensor]:
    """A tensor for each objective, in the order of ``names`` if both are named; ``dim`` as :func:`gae` has it, >= 0."""
    if isinstance(objectives, Tensor):
        return list(objectives.unbind(_checks.objective_dim(objectives, dim)))
    if isinstance(objectives, Mapping):
        return [objectives[name] for name in names or tuple(objectives)]
    return list(objectives)
