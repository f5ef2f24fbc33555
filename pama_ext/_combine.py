"""``combine`` and ``combine_``: meaning is checked here, then one of the two doors to the kernels is taken."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pama_ext import _C, _checks, _ops
from pama_ext._normalize import Normalize
from pama_ext._result import Combined, ObjectiveStats, PendingCombined

Advantages = Tensor | Sequence[Tensor] | Mapping[str, Tensor]

_is_tracing = torch.compiler.is_dynamo_compiling
_eager, _eager_ = _C.combine, _C.combine_  # door 2; None = not served, go through door 1


def combine(
    advantages: Advantages,
    *,
    dim: int = -1,
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
    out: Tensor | None = None,
    process_group: None = None,
) -> Combined:
    r"""Combine the advantages of N objectives into one, by PAMA (arXiv 2508.07768), in one fused pass.

    With A_i = max(A'_i, 0) (Noon), I(A) = A where the clipped surrogate still has a gradient and 0 elsewhere, and
    a_i the mean of I(A_i), the weights are the closed form of Theorem 1 for

    .. math:: \min_c \| \sum_i c_i a_i \|^2 \quad \text{s.t.} \quad \sum_i c_i = 1,\ c_i \ge 0

    and the result is the sum of c_i A_i. In PyTorch, for ``[B, T, N]`` advantages that are all valid::

        a = (advantages.clamp(min=0) * (log_ratio.exp() <= 1 + clip_high)[..., None]).mean((0, 1))
        weights = (a == a.min()) / (a == a.min()).sum()
        combined = (weights * advantages.clamp(min=0)).sum(-1)

    Args:
        advantages: A', ``[B, N]`` or ``[B, T, N]``, N from 1 to 64; or a sequence or dict of N tensors ``[B]`` or
            ``[B, T]`` (a dict's keys become the names of the objectives). float32, float64, bfloat16 or float16, any
            strides, CPU or CUDA. Read as detached.
        dim: the dimension of the objectives; not used for a sequence or dict.
        mask: ``[B]`` or ``[B, T]``, bool, integer or floating: non-zero = valid. What stands at the other positions,
            NaN and inf included, has no influence. None: all valid.
        log_ratio: ``[B]`` or ``[B, T]``, floating: log pi_theta - log pi_ref, clamped to +-20 before exp. None: all
            tokens are active; NaN: that token is not.
        clip_low: lower clip range, >= 0: A < 0 is active where u >= 1 - clip_low.
        clip_high: upper clip range, >= 0: A > 0 is active where u <= 1 + clip_high.
        noon: clamp negative advantages to 0 first; False keeps their sign.
        level: "batch", one solve over all valid tokens; "sequence", one per row of the first dimension; "group", one
            per group of ``normalize``; "token".
        solver: "closed_form" (Theorem 1); "min_norm", the exact minimum over the vectors of tokens, by
            :func:`pama_ext.min_norm` of their Gram matrix (the same for a single token); or "fixed": the weights are
            ``reward_weights``, 1/N each if absent.
        normalize: :class:`pama_ext.Normalize`, how the advantages are normalised before all else, and the combined
            advantage at the end.
        reward_weights: ``[N]``, a tensor on the device of ``advantages`` or a sequence of numbers; for the closed
            form and min-norm it multiplies each objective's advantages before the solve.
        nan: "ignore" leaves non-finite entries out, for their own objective only; "propagate" lets them through.
        skip_inactive: leave objectives without an active token out of the solve, with weight 0.
        out: tensor of the shape of one objective, dtype and device of ``advantages``, that receives the combination;
            may share memory with nothing else (refused where both are dense; the rest is the caller's care).
        process_group: not implemented yet.

    Returns:
        :class:`Combined`: ``advantages`` (shape of one objective, dtype of the input, 0 where masked), ``weights``,
        ``value`` and ``stats``; the last three float32, float64 for float64 input. Nothing requires grad.

    Raises:
        ValueError: a shape, device, range or option does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.
        NotImplementedError: ``process_group``.

    Errors are raised before any work. Values on a GPU are never inspected: no call here synchronises.
    """
    if not _is_tracing():
        result = _eager(advantages, dim, mask, log_ratio, clip_low, clip_high, noon, level, solver, normalize,
                        reward_weights, nan, skip_inactive, out, process_group)  # fmt: skip
        if result is not None:
            return result
    _checks.options(dim, clip_low, clip_high, noon, level, solver, _spec(normalize), nan, skip_inactive, process_group)
    return _combine_dispatcher(
        advantages, dim=dim, mask=mask, log_ratio=log_ratio, clip_low=clip_low, clip_high=clip_high, noon=noon,
        level=level, solver=solver, normalize=normalize, reward_weights=reward_weights, nan=nan,
        skip_inactive=skip_inactive, out=out,
    )  # fmt: skip


def combine_(
    advantages: Advantages,
    *,
    dim: int = -1,
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
    process_group: None = None,
) -> Combined:
    """Replace each objective's advantages by c_i A_i, in place: their sum over the objectives is the combination.

    Arguments and errors are those of :func:`combine`, but ``Normalize.combined`` has no in-place form.
    Nothing of the size of the input is allocated. ``advantages`` must not require grad and no two of its elements may
    share memory.

    Returns:
        :class:`Combined` whose ``advantages`` is the argument itself.
    """
    if not _is_tracing():
        result = _eager_(advantages, dim, mask, log_ratio, clip_low, clip_high, noon, level, solver, normalize,
                         reward_weights, nan, skip_inactive, None, process_group)  # fmt: skip
        if result is not None:
            return result
    _checks.options(dim, clip_low, clip_high, noon, level, solver, _spec(normalize), nan, skip_inactive, process_group)
    return _combine_dispatcher(
        advantages, dim=dim, mask=mask, log_ratio=log_ratio, clip_low=clip_low, clip_high=clip_high, noon=noon,
        level=level, solver=solver, normalize=normalize, reward_weights=reward_weights, nan=nan,
        skip_inactive=skip_inactive, in_place=True,
    )  # fmt: skip


@functools.lru_cache(maxsize=256, typed=True)
def _options(dim: Any, clip_low: Any, clip_high: Any, noon: Any, level: Any, solver: Any, normalize: Any, nan: Any,
             skip_inactive: Any, process_group: Any) -> _C.CombineOptions:  # fmt: skip
    """Options in the form of door 2; checked once for each combination a program uses."""
    _checks.options(dim, clip_low, clip_high, noon, level, solver, normalize, nan, skip_inactive, process_group)
    return _C.CombineOptions(
        dim, clip_low, clip_high, bool(noon), level, solver, normalize or "", nan, bool(skip_inactive)
    )


def _spec(normalize: Any) -> str | None:
    if normalize is not None and not isinstance(normalize, Normalize):
        raise TypeError(f"normalize: expected a pama_ext.Normalize, got {_checks.kind_of(normalize)}")
    return None if normalize is None else normalize._spec


def _combine_dispatcher(
    advantages: Advantages,
    *,
    dim: int = -1,
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
    out: Tensor | None = None,
    in_place: bool = False,
) -> Combined:
    """Door 1, ``torch.ops.pama_ext``: for compile, export, modes and subclasses, and for saying what is wrong."""
    names = tuple(advantages) if isinstance(advantages, Mapping) else None
    along = dim if isinstance(advantages, Tensor) else None
    tensors = _listed(advantages)
    shape, n = _checks.tensors(tensors, along, mask, log_ratio, reward_weights, out, in_place, names)
    if normalize is not None:
        _checks.groups(normalize, shape[0], tensors[0], in_place)
    values = None
    if reward_weights is not None and not isinstance(reward_weights, Tensor):
        values, reward_weights = [float(w) for w in reward_weights], None

    arguments = (
        tensors, along, mask, log_ratio, float(clip_low), float(clip_high), bool(noon), level, solver,
        normalize._spec if normalize else "", normalize._groups if normalize else None, reward_weights,
        values, nan, bool(skip_inactive),
    )  # fmt: skip
    combined: Any
    if in_place:
        combined, packed = advantages, torch.ops.pama_ext.combine_(*arguments)
    elif out is not None:
        combined, packed = out, torch.ops.pama_ext.combine_out(*arguments, out)
    else:
        combined, packed = torch.ops.pama_ext.combine(*arguments)
    if (in_place or out is not None) and not _is_tracing():  # as torch's own in-place operators
        torch.autograd.graph.increment_version(tensors if out is None else [out])
    result = _unpack(combined, packed, n, _solves(level, normalize, shape[0]))
    if names is not None:
        result.names = names
    return result


def _solves(level: str, normalize: Normalize | None, rows: int) -> int | None:
    """How many rows ``weights`` has; None if it has no rows."""
    if level == "group" and normalize is not None:
        if normalize.group_size is not None:
            return rows // normalize.group_size
        return rows if normalize.group_offsets is None else normalize.group_offsets.shape[0] - 1
    return rows if level == "sequence" else None


def _listed(advantages: Advantages) -> list[Tensor]:
    if isinstance(advantages, Tensor):
        return [advantages]
    if isinstance(advantages, Mapping):
        return list(advantages.values())
    if isinstance(advantages, Sequence) and not isinstance(advantages, str):
        return list(advantages)
    kind = type(advantages).__name__
    raise TypeError(f"advantages: expected a tensor, or a sequence or dict of tensors, got a {kind}")


def _unpack(combined: Any, packed: Tensor, n: int, rows: int | None) -> Combined:
    """Views of the packed results; their layout is written beside the schemas in csrc/torch_library.cpp."""
    solves = 1 if rows is None else rows
    *stats, weights, value = packed.split_with_sizes([n] * _ops.STATISTICS + [n * solves, solves])
    weights, value = (weights, value[0]) if rows is None else (weights.view(rows, n), value)
    return Combined(combined, weights, value, ObjectiveStats(*stats))


_C.set_python_side(PendingCombined, ObjectiveStats, Normalize, _options)
