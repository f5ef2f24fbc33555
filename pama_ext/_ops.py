"""Loads the compiled module; fake kernels and the no-grad rule of its operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import pama_ext._C  # noqa: F401  registers torch.ops.pama_ext
except ModuleNotFoundError as error:
    raise ImportError("pama_ext is not built; in its source tree: pip install --no-build-isolation -e .") from error
except ImportError as error:
    raise ImportError(
        f"pama_ext's binary does not fit torch {torch.__version__} ({error}). It needs torch >= 2.10; "
        "in its source tree, rebuild it: pip install --no-build-isolation --force-reinstall --no-deps ."
    ) from error

STATISTICS = 10  # fields of ObjectiveStats, rows of the packed statistics

_library = torch.library.Library("pama_ext", "FRAGMENT")
POLICY_SCALARS = 7  # fields of PolicyMetrics that are not those of objectives
CONSTANT = ("combine", "combine_out", "combine_", "min_norm", "gae")  # operators whose results never require grad


def _packed(advantages: list[Tensor], dim: int | None, arguments: tuple[Any, ...]) -> Tensor:
    """``arguments``: those of the operators, from ``mask`` on."""
    level, normalize, groups = arguments[5], arguments[7], arguments[8]
    first = advantages[0]
    n = len(advantages) if dim is None else first.shape[dim]
    solves: Any = 1
    if level in ("sequence", "group"):
        solves = first.shape[0] if dim is None or dim % first.dim() else first.shape[1]
    if level == "group":
        kind, size = normalize.split()[1:3]
        solves = solves // int(size) if kind == "size" else solves if kind == "ids" else groups.shape[0] - 1
    wide = first.dtype == torch.float64
    return first.new_empty(STATISTICS * n + solves * (n + 1), dtype=torch.float64 if wide else torch.float32)


@torch.library.register_fake("pama_ext::combine", lib=_library)
def _(advantages: list[Tensor], dim: int | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    first = advantages[0]
    shape = first.shape if dim is None else first.shape[: dim % first.dim()] + first.shape[dim % first.dim() + 1 :]
    return first.new_empty(shape), _packed(advantages, dim, arguments)


@torch.library.register_fake("pama_ext::combine_out", lib=_library)
@torch.library.register_fake("pama_ext::combine_", lib=_library)
def _(advantages: list[Tensor], dim: int | None, *arguments: Any) -> Tensor:
    return _packed(advantages, dim, arguments)


@torch.library.register_fake("pama_ext::min_norm", lib=_library)
def _(gramian: Tensor) -> Tensor:
    wide = gramian.dtype == torch.float64
    return gramian.new_empty(gramian.shape[:-1], dtype=torch.float64 if wide else torch.float32)


@torch.library.register_fake("pama_ext::gae", lib=_library)
def _(rewards: list[Tensor], values: list[Tensor], dim: int, *arguments: Any) -> tuple[Tensor, Tensor]:
    first = values[0]
    shape = (*first.shape[:dim], len(values), *first.shape[dim:])
    dtype = torch.promote_types(rewards[0].dtype, first.dtype)
    return first.new_empty(shape, dtype=dtype), first.new_empty(shape, dtype=dtype)


@torch.library.register_fake("pama_ext::policy_loss", lib=_library)
def _(log_probs: Tensor, old_log_probs: Tensor, advantages: list[Tensor], per_objective: bool, *arguments: Any) -> Any:
    ref_log_probs, aggregate, needs_gradient = arguments[3], arguments[9], arguments[-1]
    floats = [log_probs, old_log_probs, *advantages, *([] if ref_log_probs is None else [ref_log_probs])]
    metrics = POLICY_SCALARS + (2 * len(advantages) if per_objective else 0)
    return _loss(floats, log_probs, log_probs.shape, aggregate, log_probs.shape[0], metrics, needs_gradient)


@torch.library.register_fake("pama_ext::value_loss", lib=_library)
def _(values: list[Tensor], old_values: list[Tensor], returns: list[Tensor], *arguments: Any) -> Any:
    aggregate, needs_gradient = arguments[2], arguments[-1]
    first, whole = values[0], values[0].dim() == 3
    n = first.shape[2] if whole else len(values)
    shape = first.shape if whole else (n, *first.shape)
    floats = [*values, *old_values, *returns]
    return _loss(floats, first, shape, aggregate, first.shape[0], 3 * n, needs_gradient)


def _loss(
    floats: list[Tensor], like: Tensor, shape: Any, aggregate: str, rows: Any, metrics: Any, needs_gradient: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, gradient, scale and metrics of a fake loss whose gradient has that shape."""
    wide = torch.float64 if any(x.dtype == torch.float64 for x in floats) else torch.float32
    scales = 1 + rows if aggregate == "seq-mean-token-mean" else 1
    loss, scale, packed = (like.new_empty(size, dtype=wide) for size in ((), (scales,), (metrics,)))
    return loss, like.new_empty(shape if needs_gradient else (0,)), scale, packed


def scaled(gradient: Tensor, incoming: Tensor, scale: Tensor, row_dim: int, by_row: bool) -> Tensor:
    """What a loss keeps for backward, times the incoming gradient; 0 stays 0, whatever that is."""
    factor = (incoming * scale[0]).reshape([1] * gradient.dim())  # of no dimension, it would be rounded to a half
    if by_row:
        factor = factor * scale[1:].reshape([-1 if d == row_dim else 1 for d in range(gradient.dim())])
    return torch.where(gradient == 0, 0.0, gradient * factor).to(gradient.dtype)


def once(gradients: tuple[Tensor, ...], output: Tensor, incoming: Tensor) -> tuple[Tensor, ...]:
    """The gradients; where the graph of backward is recorded, behind a node that says there is no second derivative.

    An output of the loss's node, and ``incoming``, lead to all that a second derivative could be asked for.
    """
    if not torch.is_grad_enabled():
        return gradients
    inputs = (*(gradient.detach().requires_grad_() for gradient in gradients), output, incoming)
    refuse = torch._C._functions.DelayedError(b"pama_ext: the losses have no second derivative", len(inputs))
    refused: tuple[Tensor, ...] = refuse(*inputs)
    return refused[:-2]


def _differentiable(name: str, aggregate_at: int, lists: tuple[int, ...]) -> None:
    """Make a loss differentiable in its first input; the others at ``lists`` are lists of tensors."""

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, gradient, scale, metrics = output
        ctx.save_for_backward(gradient, scale)
        ctx.mark_non_differentiable(gradient, metrics)  # but not scale: it leads to the inputs, see once
        ctx.set_materialize_grads(False)
        ctx.by_row = inputs[aggregate_at] == "seq-mean-token-mean"
        ctx.listed = len(inputs[0]) if isinstance(inputs[0], (list, tuple)) else 0
        ctx.apart = ctx.listed and inputs[0][0].dim() == 2  # the gradient is [N, B, T]
        # None for each of the others, in a list where torch.library takes them for a list of tensors.
        ctx.others = [
            [None] * len(x) if k in lists or (isinstance(x, (list, tuple)) and not x) else None
            for k, x in enumerate(inputs) if k > 0
        ]  # fmt: skip

    def backward(ctx: Any, incoming: Tensor | None, *unused: Any) -> tuple[Any, ...]:
        gradient, scale = ctx.saved_tensors
        if incoming is None:
            return ([None] * ctx.listed if ctx.listed else None, *ctx.others)
        if gradient.dim() == 1:
            raise RuntimeError(f"pama_ext::{name} was called with needs_gradient=False")
        result = scaled(gradient, incoming, scale, 1 if ctx.apart else 0, ctx.by_row)
        gradients = once(result.unbind(0) if ctx.apart else (result,), scale, incoming)
        return (list(gradients) if ctx.listed else gradients[0], *ctx.others)

    torch.library.register_autograd(f"pama_ext::{name}", backward, setup_context=keep, lib=_library)


_differentiable("policy_loss", aggregate_at=13, lists=(2,))
_differentiable("value_loss", aggregate_at=5, lists=(1, 2))

# Advantages are constants of the policy gradient: no output requires grad, whatever the inputs do.
for _name in CONSTANT:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
