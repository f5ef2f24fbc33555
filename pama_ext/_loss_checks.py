"""What callers of the losses can get wrong; messages as in :mod:`pama_ext._checks`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pama_ext._checks import (
    FLOATING,
    MAX_OBJECTIVES,
    as_list,
    beside,
    finite_numbers,
    floating,
    form,
    mask_dtype,
    number_of,
    one_of,
    per_objective_shape,
    same_keys,
    served,
    strided_tensor,
    vector,
)

AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def policy_options(
    clip_low: Any, clip_high: Any, dual_clip: Any, max_weight: Any, kl_coef: Any, aggregate: Any
) -> None:
    """Check the arguments of ``policy_loss`` that are not tensors, for their meaning alone."""
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        number_of(name, clip, clip_range=True)
    if dual_clip is not None and not number_of("dual_clip", dual_clip) > 1:
        raise ValueError(f"dual_clip: expected a number > 1, got {dual_clip}")
    if max_weight is not None and not 0 < number_of("max_weight", max_weight) < math.inf:
        raise ValueError(f"max_weight: expected a finite number > 0, got {max_weight}")
    if dual_clip is not None and max_weight is not None:
        raise ValueError("dual_clip: expected none beside max_weight, with which nothing is clipped")
    if not 0 <= number_of("kl_coef", kl_coef) < math.inf:
        raise ValueError(f"kl_coef: expected a finite number >= 0, got {kl_coef}")
    one_of("aggregate", aggregate, AGGREGATES)


def policy_loss(
    log_probs: Any,
    old_log_probs: Any,
    advantages: Any,
    objective_advantages: Any,
    weights: Any,
    mask: Any,
    ref_log_probs: Any,
    kl_coef: Any,
) -> int:
    """Check the tensors of ``policy_loss`` and return how many advantages there are."""
    floating("log_probs", log_probs)
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs: expected [B, T], got {as_list(log_probs.shape)}")
    served("log_probs", log_probs)
    shape = log_probs.shape
    for name, tensor in (("old_log_probs", old_log_probs), ("ref_log_probs", ref_log_probs), ("mask", mask)):
        if tensor is not None or name == "old_log_probs":
            beside(name, tensor, shape, log_probs, "log_probs")
            if name != "mask":
                floating(name, tensor)
    if mask is not None:
        mask_dtype(mask)
    if ref_log_probs is None and kl_coef != 0:
        raise ValueError(f"ref_log_probs: expected them for kl_coef {kl_coef}, got None")
    if (advantages is None) == (objective_advantages is None):
        raise ValueError("advantages: expected either these or objective_advantages")
    if objective_advantages is None:
        if weights is not None:
            raise ValueError("weights: expected none without objective_advantages")
        floating("advantages", advantages)
        _tokens_or_rows("advantages", advantages, advantages.shape, shape, log_probs)
        return 1
    name = "objective_advantages"
    each, n, first = per_objective_shape(name, objective_advantages, 2, 2)
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"{name}: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    _tokens_or_rows(name, first, each, shape, log_probs)
    if isinstance(weights, Tensor):
        vector("weights", weights, n, log_probs, "log_probs")
    elif weights is not None:
        finite_numbers("weights", weights, n)
    return n


def value_loss(values: Any, old_values: Any, returns: Any, mask: Any, clip: Any, aggregate: Any) -> tuple[int, Tensor]:
    """Check the arguments of ``value_loss``; return how many objectives there are and a tensor of ``values``."""
    one_of("aggregate", aggregate, AGGREGATES)
    if clip is not None:
        number_of("clip", clip, clip_range=True)
    shape, n, first = _heads_shape("values", values)
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"values: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    served("values", first)
    for name, argument in (("returns", returns), ("old_values", old_values)):
        if name == "old_values" and clip is None:
            continue
        own, count, tensor = _heads_shape(name, argument)
        if count != n:
            raise ValueError(f"{name}: expected {n} objectives as in values, got {count}")
        if own != shape:
            raise ValueError(f"{name}: expected {as_list(shape)} for each objective as in values, got {as_list(own)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as values, got {tensor.device}")
        same_keys(name, argument, values)
    if mask is not None:
        beside("mask", mask, shape, first, "values")
        mask_dtype(mask)
    return n, first


def normalizer(value: Any, first: Tensor, main: str) -> tuple[Tensor | None, float | None]:
    """Check ``normalizer``; return it as a tensor or as a number."""
    if value is None:
        return None, None
    if not isinstance(value, Tensor):
        if not 0 <= number_of("normalizer", value) < math.inf:
            raise ValueError(f"normalizer: expected a finite number >= 0, got {value}")
        return None, float(value)
    strided_tensor("normalizer", value)
    if value.numel() != 1:
        raise ValueError(f"normalizer: expected a tensor of one element, got {as_list(value.shape)}")
    wide_integers = (torch.int32, torch.int64, torch.uint32, torch.uint64)
    if value.dtype not in FLOATING and value.dtype not in wide_integers:
        raise TypeError(f"normalizer: expected a floating tensor or 32 or 64 bit integers, got {value.dtype}")
    if value.device != first.device:
        raise ValueError(f"normalizer: expected device {first.device} as {main}, got {value.device}")
    return value.detach(), None


def _tokens_or_rows(name: str, tensor: Tensor, own: Sequence[int], shape: Sequence[int], first: Tensor) -> None:
    """Check that the shape of one objective is that of ``log_probs`` or of its rows, and the device of ``tensor``."""
    if own != shape and own != shape[:1]:
        each = " for each objective" if name == "objective_advantages" else ""
        raise ValueError(f"{name}: expected {as_list(shape)} or {as_list(shape[:1])}{each}, got {as_list(own)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as log_probs, got {tensor.device}")


def _heads_shape(name: str, heads: Any) -> tuple[torch.Size, int, Tensor]:
    """Shape of one objective of an argument of ``value_loss``, how many there are, and a tensor of them."""
    if isinstance(heads, Tensor) and heads.dim() == 2:
        floating(name, heads)
        return heads.shape, 1, heads
    forms = isinstance(heads, Tensor) and heads.dim() != 3
    shape, n, first = (heads.shape, 0, heads) if forms else per_objective_shape(name, heads, 2, 2)
    if forms or len(shape) != 2:
        raise ValueError(f"{name}: expected [B, T, N], [B, T], or N tensors [B, T], got {form(heads)}")
    return shape, n, first
