"""``policy_loss`` and ``value_loss``: meaning is checked here, then a door is taken; autograd keeps the gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pama_ext import _C, _loss_checks, _ops
from pama_ext._gae import each

Objectives = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class PolicyMetrics(NamedTuple):
    """What :func:`pama_ext.policy_loss` measures over the valid tokens: scalars on the device, 0 if there are none.

    float32, float64 where the loss is. Nothing here requires grad.

    Attributes:
        clip_fraction: share of tokens at which the clip holds the surrogate: A > 0 and u > 1 + clip_high, or A < 0 and
            u < 1 - clip_low; with ``max_weight``, u > max_weight.
        clip_fraction_low: the part of ``clip_fraction`` with A < 0; 0 with ``max_weight``.
        clip_fraction_dual: share of tokens with A < 0 and u > ``dual_clip``.
        approx_kl: mean of old_log_probs - log_probs, clamped to +-20. (Schulman's k3 estimate of the same is
            ``ratio_mean - 1 + approx_kl``.)
        ratio_mean: mean of u.
        ratio_max: largest u.
        ref_kl: mean of the k3 estimate of the KL divergence to the reference policy; None without ``ref_log_probs``.
        objective_clip_fraction: ``[N]``, ``clip_fraction`` as the loss of each objective alone would have it (with
            ``max_weight``, among tokens at which its advantage is not 0); None without ``objective_advantages``.
        objective_gradient_share: ``[N]``, what each objective contributes to the gradient: the sum over tokens of the
            magnitude of its part, as a share of that of all, 0 if there is no gradient; None likewise.
    """

    clip_fraction: Tensor
    clip_fraction_low: Tensor
    clip_fraction_dual: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    ref_kl: Tensor | None
    objective_clip_fraction: Tensor | None
    objective_gradient_share: Tensor | None


class ValueMetrics(NamedTuple):
    """What :func:`pama_ext.value_loss` measures for each objective: ``[N]`` on the device, 0 if no token is valid.

    float32, float64 where the loss is. Nothing here requires grad.

    Attributes:
        losses: the loss of each objective; their sum is the loss.
        clip_fraction: share of valid tokens at which the clipped value has the larger error.
        value_mean: mean of ``values`` over the valid tokens.
    """

    losses: Tensor
    clip_fraction: Tensor
    value_mean: Tensor


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
    r"""Clipped policy loss (PPO, Schulman et al. 2017, arXiv 1707.06347), its metrics and its gradient in one pass.

    With u = exp(log_probs - old_log_probs), the difference clamped to +-20, the loss of a token is

    .. math:: -\min(u A,\ \mathrm{clip}(u, 1 - \mathrm{clip\_low}, 1 + \mathrm{clip\_high})\, A)

    In PyTorch, for ``[B, T]`` advantages and a bool mask::

        u = (log_probs - old_log_probs).clamp(-20, 20).exp()
        loss = -torch.minimum(u * advantages, u.clamp(1 - clip_low, 1 + clip_high) * advantages)[mask].mean()

    Args:
        log_probs: log pi_theta of the tokens, ``[B, T]``, float32, float64, bfloat16 or float16, any strides, CPU or
            CUDA. The loss is differentiable in these alone, once; all else is read as detached.
        old_log_probs: those of the policy that sampled, ``[B, T]``.
        advantages: A, ``[B, T]``, or ``[B]``: one for all tokens of a row. What :func:`pama_ext.combine` returns.
        mask: ``[B, T]``, bool, integer or floating: non-zero = valid. What stands at the other positions, NaN and inf
            included, has no influence; the gradient is 0 there. None: all valid.
        clip_low: lower clip range, >= 0.
        clip_high: upper clip range, >= 0.
        dual_clip: > 1: where A < 0, the loss is at most -dual_clip A (Ye et al. 2020, arXiv 1912.09729; verl's
            ``clip_ratio_c``, TRL's ``delta``). None: no bound.
        max_weight: > 0: instead of the clipped surrogate, -min(u, max_weight) A log_probs with the truncated importance
            weight held constant, so that every token keeps a gradient (CISPO, arXiv 2506.13585). None: clipped.
        kl_coef: >= 0: this times exp(d) - d - 1, d = ref_log_probs - log_probs clamped to +-20 (the k3 estimate of the
            KL divergence to the reference policy), is added to the loss of each token.
        ref_log_probs: ``[B, T]``; needed for ``kl_coef``, without it only measured.
        aggregate: over tokens and rows: "token-mean" (sum / valid tokens), "token-sum", "seq-mean-token-sum" (sum /
            rows with a valid token), "seq-mean-token-mean" (the sum of each row's mean / rows with a valid token).
        normalizer: what the sum is divided by instead: a number >= 0, or a tensor of one element, floating or of 32 or
            64 bit integers, on the device of ``log_probs``. For gradient accumulation the tokens (rows) of all
            micro-batches; where ranks average their gradients, those of all ranks divided by their number. 0 gives
            a loss of 0. None: as ``aggregate`` says; 1 for "token-sum".
        objective_advantages: instead of ``advantages``, those of N objectives, for metrics of each: ``[B, T, N]`` or
            ``[B, N]``, or a sequence or dict of N tensors ``[B, T]`` or ``[B]``, N from 1 to 64. A is their sum by
            ``weights``; with those that :func:`pama_ext.combine_` leaves, weights of 1 make it PAMA's combination.
        weights: ``[N]``, a tensor on the device of ``log_probs`` or a sequence of numbers; an objective of weight 0
            adds nothing, whatever stands there. None: 1 each.

    Returns:
        ``(loss, metrics)``: the loss ``[]``, float64 where ``log_probs``, ``old_log_probs``, ``ref_log_probs`` or the
        advantages are, float32 otherwise; 0 where nothing is valid. :class:`PolicyMetrics`.

    Raises:
        ValueError: a shape, device, range or option does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.

    Errors are raised before any work. Nothing synchronises. The forward pass keeps one tensor like ``log_probs``, which
    the backward pass multiplies by the incoming gradient, in place unless the graph is retained; in float16 its entries
    u A are held within +-65504. Deterministic.
    """
    if not torch.compiler.is_dynamo_compiling() and forward_ad._current_level < 0:
        result = _C.policy_loss(log_probs, old_log_probs, advantages, mask, clip_low, clip_high, dual_clip, max_weight,
                                kl_coef, ref_log_probs, aggregate, normalizer, objective_advantages,
                                weights)  # fmt: skip
        if result is not None:
            loss, metrics, gradient, scale = result
            if gradient is None:
                return loss, metrics
            return _kept((loss, gradient, scale, 0), log_probs)[0], metrics
    return _policy_loss_dispatcher(
        log_probs, old_log_probs, advantages, mask=mask, clip_low=clip_low, clip_high=clip_high, dual_clip=dual_clip,
        max_weight=max_weight, kl_coef=kl_coef, ref_log_probs=ref_log_probs, aggregate=aggregate,
        normalizer=normalizer, objective_advantages=objective_advantages, weights=weights,
    )  # fmt: skip


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
    r"""Clipped value loss of N value heads (PPO, as in verl and TRL), its metrics and its gradient in one pass.

    The loss of a token is, for each objective,

    .. math:: \tfrac12 \max((V - R)^2, (\mathrm{clip}(V, V_{old} - \mathrm{clip}, V_{old} + \mathrm{clip}) - R)^2)

    aggregated over the tokens as in :func:`pama_ext.policy_loss` and summed over the objectives, so that each head gets
    the gradient it would get alone.

    Args:
        values: V, ``[B, T, N]``, ``[B, T]`` for a single objective, or a sequence or dict of N tensors ``[B, T]``, N
            from 1 to 64; float32, float64, bfloat16 or float16, any strides, CPU or CUDA. The loss is differentiable
            in these alone, once; all else is read as detached.
        old_values: V_old, those of the time of sampling, in the shape of ``values``. Not read, and may be None, without
            ``clip``.
        returns: R, in the shape of ``values``; those of :func:`pama_ext.gae`.
        mask: ``[B, T]``, bool, integer or floating: non-zero = valid. What stands at the other positions has no
            influence; the gradient is 0 there. None: all valid.
        clip: clip range of the values, >= 0. None: not clipped.
        aggregate: as in :func:`pama_ext.policy_loss`.
        normalizer: as in :func:`pama_ext.policy_loss`.

    Returns:
        ``(loss, metrics)``: the loss ``[]``, float64 where one of the three is, float32 otherwise; 0 where nothing is
        valid. :class:`ValueMetrics`.

    Raises:
        ValueError: a shape, device, range or option does not fit; the message names the argument.
        TypeError: an argument is of the wrong type or dtype.

    Errors are raised before any work. Nothing synchronises. Memory and determinism as of :func:`pama_ext.policy_loss`;
    the gradients of a list of heads are views of one tensor.
    """
    if not torch.compiler.is_dynamo_compiling() and forward_ad._current_level < 0:
        result = _C.value_loss(values, old_values, returns, mask, clip, aggregate, normalizer)
        if result is not None:
            loss, metrics, gradient, scale = result
            if gradient is None:
                return loss, metrics
            if isinstance(values, Tensor):
                return _kept((loss, gradient, scale, 0), values)[0], metrics
            return _kept((loss, gradient, scale, 1), *_heads(values))[0], metrics
    return _value_loss_dispatcher(
        values, old_values, returns, mask=mask, clip=clip, aggregate=aggregate, normalizer=normalizer
    )


class _Kept(torch.autograd.Function):
    """The node of a loss that is computed already: ``kept`` is ``(loss, gradient, scale, dimension of the rows)``.

    With ``row_dim`` 1 the gradient is ``[N, B, T]``, for N inputs. ``scale`` is an output besides the loss that nobody
    sees: as such it leads to the inputs, whatever happens to the loss.
    """

    @staticmethod
    def forward(ctx: Any, kept: tuple[Tensor, Tensor, Tensor, int], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        loss, gradient, scale, ctx.row_dim = kept
        ctx.save_for_backward(gradient, scale)
        ctx.set_materialize_grads(False)
        return loss, scale

    @staticmethod
    def backward(ctx: Any, incoming: Tensor | None, _: None) -> Any:
        if incoming is None:
            return (None,) * len(ctx.needs_input_grad)
        gradient, scale = ctx.saved_tensors
        # What nobody can ask for again is scaled where it stands.
        result = _C.scale(gradient, incoming, scale, ctx.row_dim, not _graph_is_retained())
        if result is None:  # not plain tensors: hooks on saved tensors, a mode, a subclass
            result = _ops.scaled(gradient, incoming, scale, ctx.row_dim, scale.shape[0] > 1)
        gradients = (result,) if ctx.row_dim == 0 else result.unbind(0)
        return None, *_ops.once(gradients, scale, incoming)


_kept: Any = _Kept.apply
_graph_is_retained: Any = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True)
_unpack_dual: Any = forward_ad.unpack_dual


def _policy_loss_dispatcher(
    log_probs: Any,
    old_log_probs: Any,
    advantages: Any = None,
    *,
    mask: Any = None,
    clip_low: Any = 0.2,
    clip_high: Any = 0.2,
    dual_clip: Any = None,
    max_weight: Any = None,
    kl_coef: Any = 0.0,
    ref_log_probs: Any = None,
    aggregate: Any = "token-mean",
    normalizer: Any = None,
    objective_advantages: Any = None,
    weights: Any = None,
) -> tuple[Tensor, PolicyMetrics]:
    """Door 1, ``torch.ops.pama_ext``: for compile, export, modes and subclasses, and for saying what is wrong."""
    _loss_checks.policy_options(clip_low, clip_high, dual_clip, max_weight, kl_coef, aggregate)
    n = _loss_checks.policy_loss(
        log_probs, old_log_probs, advantages, objective_advantages, weights, mask, ref_log_probs, kl_coef
    )
    divisor = _loss_checks.normalizer(normalizer, log_probs, "log_probs")
    columns = [advantages] if objective_advantages is None else _listed(objective_advantages)
    numbers = [1.0] * n if weights is None else [] if isinstance(weights, Tensor) else [float(w) for w in weights]
    needs_gradient = log_probs.requires_grad and torch.is_grad_enabled()
    loss, packed = _run(
        torch.ops.pama_ext.policy_loss, [log_probs], 0,
        log_probs, old_log_probs.detach(), [column.detach() for column in columns], objective_advantages is not None,
        _detached(weights if isinstance(weights, Tensor) else None), numbers, _detached(mask), _detached(ref_log_probs),
        float(clip_low), float(clip_high), _float(dual_clip), _float(max_weight), float(kl_coef), aggregate, *divisor,
        needs_gradient,
    )  # fmt: skip
    *scalars, ref_kl = packed[: _ops.POLICY_SCALARS].unbind(0)
    clipped = shares = None
    if objective_advantages is not None:
        clipped, shares = packed[_ops.POLICY_SCALARS :].split(n)
    return loss, PolicyMetrics(*scalars, None if ref_log_probs is None else ref_kl, clipped, shares)  # type: ignore[call-arg]


def _value_loss_dispatcher(
    values: Any,
    old_values: Any,
    returns: Any,
    *,
    mask: Any = None,
    clip: Any = None,
    aggregate: Any = "token-mean",
    normalizer: Any = None,
) -> tuple[Tensor, ValueMetrics]:
    """Door 1, ``torch.ops.pama_ext``."""
    n, first = _loss_checks.value_loss(values, old_values, returns, mask, clip, aggregate)
    divisor = _loss_checks.normalizer(normalizer, first, "values")
    names = tuple(values) if isinstance(values, Mapping) else None
    tensors = [values] if isinstance(values, Tensor) else _heads(values)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    olds = [] if clip is None else _heads(old_values, names)
    loss, packed = _run(
        torch.ops.pama_ext.value_loss, tensors, 0 if isinstance(values, Tensor) and values.dim() == 3 else 1,
        tensors, [x.detach() for x in olds], [x.detach() for x in _heads(returns, names)],
        0.0 if clip is None else float(clip), _detached(mask), aggregate, *divisor, needs_gradient,
    )  # fmt: skip
    return loss, ValueMetrics(*packed.split(n))


def _run(operator: Any, inputs: list[Tensor], row_dim: int, *arguments: Any) -> tuple[Tensor, Any]:
    """Loss and packed metrics; ``arguments`` end with whether a gradient is needed.

    The operator has a rule of autograd for code that is compiled. Called in eager it costs four times as much as the
    operator itself, so there the node of the eager door is hung on the loss.
    """
    needs_gradient = arguments[-1]
    if forward_ad._current_level >= 0 and any(_unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError("pama_ext: the losses have no forward-mode derivative")
    if torch.compiler.is_compiling():
        loss, _, _, packed = operator(*arguments)
        return loss, packed
    with torch.no_grad():
        loss, gradient, scale, packed = operator(*arguments)
    return _kept((loss, gradient, scale, row_dim), *inputs)[0] if needs_gradient else loss, packed


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _float(number: Any) -> float | None:
    return None if number is None else float(number)


def _listed(objectives: Objectives) -> list[Tensor]:
    """A tensor for each objective; a tensor ``[B, T, N]`` or ``[B, N]`` has them last."""
    return each(objectives, objectives.dim() - 1 if isinstance(objectives, Tensor) else 0)


def _heads(values: Any, names: tuple[str, ...] | None = None) -> list[Tensor]:
    """A tensor ``[B, T]`` for each value head, in the order of ``names`` if both are named."""
    return [values] if isinstance(values, Tensor) and values.dim() == 2 else each(values, 2, names)


_C.set_loss_metrics(PolicyMetrics, ValueMetrics)
