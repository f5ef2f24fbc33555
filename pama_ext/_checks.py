"""What callers can get wrong, said once: every message names the argument, what was expected and what came."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pama_ext import _C

if TYPE_CHECKING:
    from pama_ext._normalize import Normalize

MAX_OBJECTIVES = 64
FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def options(dim: Any, clip_low: Any, clip_high: Any, noon: Any, level: Any, solver: Any, normalize: Any, nan: Any,
            skip_inactive: Any, process_group: Any) -> None:  # fmt: skip
    """Check the arguments of ``combine`` that are not tensors, for their meaning alone."""
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        raise TypeError(f"dim: expected an int, got {kind_of(dim)}")
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        _number(name, clip, clip_range=True)
    for name, flag in (("noon", noon), ("skip_inactive", skip_inactive)):
        if not isinstance(flag, (bool, Integral)):
            raise TypeError(f"{name}: expected a bool, got {kind_of(flag)}")
    one_of("level", level, ("batch", "sequence", "group", "token"))
    one_of("solver", solver, ("closed_form", "min_norm", "fixed"))
    one_of("nan", nan, ("ignore", "propagate"))
    if level == "group" and (normalize is None or normalize.split()[1] == "none"):
        raise ValueError('level: "group" needs a normalize with group_size, group_ids or group_offsets')
    if process_group is not None:
        raise NotImplementedError("process_group is not implemented yet")


def tensors(
    advantages: Sequence[Any],
    dim: int | None,
    mask: Any,
    log_ratio: Any,
    reward_weights: Any,
    out: Any,
    in_place: bool,
    names: tuple[Any, ...] | None,
) -> tuple[Sequence[int], int]:
    """Check the tensors of ``combine`` and return the shape of one objective and N.

    ``advantages`` is the one tensor that holds all objectives along ``dim``, or, if that is None, a tensor for each.
    """
    shape, n = _objectives(advantages, dim, names)
    first = advantages[0]
    for name, tensor in (("mask", mask), ("log_ratio", log_ratio), ("out", out)):
        if tensor is not None:
            _beside(name, tensor, shape, first, "advantages")
    if mask is not None:
        _mask_dtype(mask)
    if log_ratio is not None and log_ratio.dtype not in FLOATING:
        raise TypeError(f"log_ratio: expected a floating tensor, got {log_ratio.dtype}")
    _rewards(reward_weights, first, n)
    if out is not None:
        if out.dtype != first.dtype:
            raise TypeError(f"out: expected {first.dtype} as advantages, got {out.dtype}")
        if out.requires_grad:
            raise ValueError("out: expected a tensor that does not require grad")
    if in_place and any(t.requires_grad for t in advantages):
        raise ValueError("advantages: expected tensors that do not require grad, as they are written in place")
    return shape, n


def gae(rewards: Any, values: Any, dim: Any, mask: Any, kl_penalty: Any, bootstrap: Any, offsets: Any) -> int:
    """Check the tensors of ``gae`` and return the dimension of the objectives, from 0 on."""
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        raise TypeError(f"dim: expected an int, got {kind_of(dim)}")
    time = 2 if offsets is None else 1  # dimensions of one objective
    axis = int(dim)
    if not -time - 1 <= axis <= time:
        raise ValueError(f"dim: expected from {-time - 1} to {time}, got {dim}")
    axis %= time + 1

    tokens, n, first = _per_objective_shape("values", values, axis, time)
    if len(tokens) != time:
        want = "[B, T, N], or N tensors [B, T]" if time == 2 else "[total, N] with offsets, or N tensors [total]"
        raise ValueError(f"values: expected {want}, got {_form(values)}")
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"values: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    _served("values", first)
    sequences = tokens[0] if offsets is None else _offsets(offsets, tokens[0], first)

    for name, argument, shapes in (
        ("rewards", rewards, (list(tokens), [sequences])),
        ("bootstrap", bootstrap, ([sequences],)),
    ):
        if argument is None and name == "bootstrap":
            continue
        shape, count, tensor = _per_objective_shape(name, argument, axis, time)
        if count != n:
            raise ValueError(f"{name}: expected {n} objectives as in values, got {count}")
        if list(shape) not in shapes:
            want = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected {want} for each objective, got {list(shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as values, got {tensor.device}")
        _same_keys(name, argument, values)

    for name, tensor in (("mask", mask), ("kl_penalty", kl_penalty)):
        if tensor is not None:
            _beside(name, tensor, tokens, first, "values")
    if mask is not None:
        _mask_dtype(mask)
    if kl_penalty is not None and kl_penalty.dtype not in FLOATING:
        raise TypeError(f"kl_penalty: expected a floating tensor, got {kl_penalty.dtype}")
    return axis


def per_objective(name: str, value: Any, n: int, first: Tensor) -> tuple[Tensor | None, list[float]]:
    """Check ``gamma`` or ``lam``; return it as a tensor or as N numbers."""
    if isinstance(value, Tensor):
        _vector(name, value, n, first, "values")
        return value, []
    if isinstance(value, (str, bytes)) or not isinstance(value, (Real, Sequence)):
        raise TypeError(f"{name}: expected a float, {n} floats or a tensor, got {kind_of(value)}")
    numbers = [value] * n if isinstance(value, Real) else list(value)
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name}: expected floats, got {kind_of(number)}")
        if not 0 <= float(number) <= 1:
            raise ValueError(f"{name}: expected from 0 to 1, got {number}")
    if len(numbers) != n:
        raise ValueError(f"{name}: expected one per objective ({n}), got {len(numbers)}")
    return None, [float(number) for number in numbers]


AGGREGATES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")


def policy_options(
    clip_low: Any, clip_high: Any, dual_clip: Any, max_weight: Any, kl_coef: Any, aggregate: Any
) -> None:
    """Check the arguments of ``policy_loss`` that are not tensors, for their meaning alone."""
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        _number(name, clip, clip_range=True)
    if dual_clip is not None and not _number("dual_clip", dual_clip) > 1:
        raise ValueError(f"dual_clip: expected a number > 1, got {dual_clip}")
    if max_weight is not None and not 0 < _number("max_weight", max_weight) < math.inf:
        raise ValueError(f"max_weight: expected a finite number > 0, got {max_weight}")
    if dual_clip is not None and max_weight is not None:
        raise ValueError("dual_clip: expected none beside max_weight, with which nothing is clipped")
    if not 0 <= _number("kl_coef", kl_coef) < math.inf:
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
    _floating("log_probs", log_probs)
    if log_probs.dim() != 2:
        raise ValueError(f"log_probs: expected [B, T], got {_list(log_probs.shape)}")
    _served("log_probs", log_probs)
    shape = log_probs.shape
    for name, tensor in (("old_log_probs", old_log_probs), ("ref_log_probs", ref_log_probs), ("mask", mask)):
        if tensor is not None or name == "old_log_probs":
            _beside(name, tensor, shape, log_probs, "log_probs")
            if name != "mask":
                _floating(name, tensor)
    if mask is not None:
        _mask_dtype(mask)
    if ref_log_probs is None and kl_coef != 0:
        raise ValueError(f"ref_log_probs: expected them for kl_coef {kl_coef}, got None")
    if (advantages is None) == (objective_advantages is None):
        raise ValueError("advantages: expected either these or objective_advantages")
    if objective_advantages is None:
        if weights is not None:
            raise ValueError("weights: expected none without objective_advantages")
        _floating("advantages", advantages)
        _tokens_or_rows("advantages", advantages, advantages.shape, shape, log_probs)
        return 1
    name = "objective_advantages"
    each, n, first = _per_objective_shape(name, objective_advantages, 2, 2)
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"{name}: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    _tokens_or_rows(name, first, each, shape, log_probs)
    if isinstance(weights, Tensor):
        _vector("weights", weights, n, log_probs, "log_probs")
    elif weights is not None:
        _finite_numbers("weights", weights, n)
    return n


def value_loss(values: Any, old_values: Any, returns: Any, mask: Any, clip: Any, aggregate: Any) -> tuple[int, Tensor]:
    """Check the arguments of ``value_loss``; return how many objectives there are and a tensor of ``values``."""
    one_of("aggregate", aggregate, AGGREGATES)
    if clip is not None:
        _number("clip", clip, clip_range=True)
    shape, n, first = _heads_shape("values", values)
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"values: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    _served("values", first)
    for name, argument in (("returns", returns), ("old_values", old_values)):
        if name == "old_values" and clip is None:
            continue
        own, count, tensor = _heads_shape(name, argument)
        if count != n:
            raise ValueError(f"{name}: expected {n} objectives as in values, got {count}")
        if own != shape:
            raise ValueError(f"{name}: expected {_list(shape)} for each objective as in values, got {_list(own)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as values, got {tensor.device}")
        _same_keys(name, argument, values)
    if mask is not None:
        _beside("mask", mask, shape, first, "values")
        _mask_dtype(mask)
    return n, first


def normalizer(value: Any, first: Tensor, main: str) -> tuple[Tensor | None, float | None]:
    """Check ``normalizer``; return it as a tensor or as a number."""
    if value is None:
        return None, None
    if not isinstance(value, Tensor):
        if not 0 <= _number("normalizer", value) < math.inf:
            raise ValueError(f"normalizer: expected a finite number >= 0, got {value}")
        return None, float(value)
    strided_tensor("normalizer", value)
    if value.numel() != 1:
        raise ValueError(f"normalizer: expected a tensor of one element, got {_list(value.shape)}")
    wide_integers = (torch.int32, torch.int64, torch.uint32, torch.uint64)
    if value.dtype not in FLOATING and value.dtype not in wide_integers:
        raise TypeError(f"normalizer: expected a floating tensor or 32 or 64 bit integers, got {value.dtype}")
    if value.device != first.device:
        raise ValueError(f"normalizer: expected device {first.device} as {main}, got {value.device}")
    return value.detach(), None


def gramian(matrix: Any) -> None:
    """Check the argument of ``min_norm``."""
    _floating("gramian", matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"gramian: expected [..., N, N], got {_list(matrix.shape)}")
    if not 1 <= matrix.shape[-1] <= MAX_OBJECTIVES:
        raise ValueError(f"gramian: expected N from 1 to {MAX_OBJECTIVES}, got {matrix.shape[-1]}")
    _served("gramian", matrix)


def _objectives(advantages: Sequence[Any], dim: int | None, names: tuple[Any, ...] | None) -> tuple[Sequence[int], int]:
    if not advantages:
        raise ValueError("advantages: expected at least one objective, got none")
    for i, tensor in enumerate(advantages):
        name = "advantages" if dim is not None else f"advantages[{names[i] if names else i!r}]"
        _floating(name, tensor)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"advantages: expected str keys, got {names!r}")
    first = advantages[0]
    _served("advantages", first)

    if dim is None:
        shape, n = first.shape, len(advantages)
        if len(shape) not in (1, 2):
            raise ValueError(f"advantages: expected tensors [B] or [B, T], got {_list(shape)}")
        for i, tensor in enumerate(advantages[1:], 1):
            for what in ("shape", "dtype", "device"):
                ours, theirs = getattr(tensor, what), getattr(first, what)
                if ours != theirs:
                    kind = TypeError if what == "dtype" else ValueError
                    raise kind(f"advantages: expected one {what} for all, got {theirs} and, at {i}, {ours}")
    else:
        if first.dim() not in (2, 3):
            raise ValueError(f"advantages: expected [B, N] or [B, T, N], got {_list(first.shape)}")
        if not -first.dim() <= dim < first.dim():
            raise ValueError(f"dim: expected from {-first.dim()} to {first.dim() - 1}, got {dim}")
        dim %= first.dim()
        shape, n = first.shape[:dim] + first.shape[dim + 1 :], first.shape[dim]
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"advantages: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    return shape, n


def groups(normalize: Normalize, rows: int, first: Tensor, in_place: bool) -> None:
    """Check that the groups of ``normalize`` fit ``rows`` rows on the device of ``first``."""
    if in_place and normalize.combined != "none":
        raise ValueError("normalize: combined has no in-place form; use combine, with out= to save memory")
    size, ids, offsets = normalize.group_size, normalize.group_ids, normalize.group_offsets
    if size is not None and rows % size:
        raise ValueError(f"normalize: expected a group_size that divides the {rows} rows, got {size}")
    for name, tensor in (("group_ids", ids), ("group_offsets", offsets)):
        if tensor is not None and tensor.device != first.device:
            raise ValueError(f"normalize: expected {name} on {first.device} as advantages, got {tensor.device}")
    if ids is not None and ids.shape[0] != rows:
        raise ValueError(f"normalize: expected one of group_ids for each of {rows} rows, got {ids.shape[0]}")
    if offsets is not None:
        _ascending("normalize: expected group_offsets", offsets, rows)


def _per_objective_shape(name: str, argument: Any, dim: int, time: int) -> tuple[torch.Size, int, Tensor]:
    """Shape of one objective of an argument of ``gae``, how many there are, and a tensor of them."""
    if isinstance(argument, Tensor):
        tensors, labels = [argument], [name]
    elif isinstance(argument, Mapping):
        tensors, labels = list(argument.values()), [f"{name}[{key!r}]" for key in argument]
    elif isinstance(argument, Sequence) and not isinstance(argument, (str, bytes)):
        tensors, labels = list(argument), [f"{name}[{i}]" for i in range(len(argument))]
    else:
        raise TypeError(f"{name}: expected a tensor, or a sequence or dict of tensors, got {kind_of(argument)}")
    if not tensors:
        raise ValueError(f"{name}: expected at least one objective, got none")
    if isinstance(argument, Mapping) and not all(isinstance(key, str) for key in argument):
        raise TypeError(f"{name}: expected str keys, got {tuple(argument)!r}")
    for label, tensor in zip(labels, tensors, strict=True):
        _floating(label, tensor)
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(tensor, what), getattr(tensors[0], what)
            if ours != theirs:
                kind = TypeError if what == "dtype" else ValueError
                theirs, ours = (_list(x) if what == "shape" else x for x in (theirs, ours))
                raise kind(f"{label}: expected one {what} for all, got {theirs} before and {ours}")
    first = tensors[0]
    if not isinstance(argument, Tensor):
        return first.shape, len(tensors), first
    if first.dim() not in (2, time + 1):
        want = "[B, T, N] or [B, N]" if time == 2 else "two dimensions with offsets"
        raise ValueError(f"{name}: expected {want}, got {_list(first.shape)}")
    dim = objective_dim(first, dim)
    return first.shape[:dim] + first.shape[dim + 1 :], first.shape[dim], first


def _form(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return _list(argument.shape)
    tensors = list(argument.values() if isinstance(argument, Mapping) else argument)
    return f"{len(tensors)} tensors {_list(tensors[0].shape)}"


def _offsets(offsets: Any, total: int, first: Tensor) -> int:
    strided_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets: expected int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets: expected [S + 1], got {_list(offsets.shape)}")
    if offsets.device != first.device:
        raise ValueError(f"offsets: expected device {first.device} as values, got {offsets.device}")
    _ascending("offsets: expected offsets", offsets, total)
    sequences: int = offsets.shape[0] - 1
    return sequences


def _ascending(expected: str, offsets: Tensor, last: int) -> None:
    """Check offsets on the CPU; while tracing there is nothing to look at, and the operator does later."""
    if type(offsets) is Tensor and offsets.is_cpu and not torch.compiler.is_compiling():
        values = offsets.tolist()
        if values[0] != 0 or values[-1] != last or any(a > b for a, b in itertools.pairwise(values)):
            raise ValueError(f"{expected} that start at 0, ascend and end at {last}, got {values}")


def _mask_dtype(mask: Tensor) -> None:
    if mask.is_complex() or (mask.dtype not in FLOATING and mask.is_floating_point()):
        raise TypeError(f"mask: expected a bool, integer or floating tensor, got {mask.dtype}")


def _rewards(reward_weights: Any, first: Tensor, n: int) -> None:
    if reward_weights is None:
        return
    if isinstance(reward_weights, Tensor):
        _vector("reward_weights", reward_weights, n, first, "advantages")
        return
    _finite_numbers("reward_weights", reward_weights, n)


def _finite_numbers(name: str, numbers: Any, n: int) -> None:
    """Check a sequence with a number for each objective."""
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Sequence):
        raise TypeError(f"{name}: expected a tensor or a sequence of floats, got {kind_of(numbers)}")
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, Real):
            raise TypeError(f"{name}: expected floats, got {kind_of(number)}")
        if not -math.inf < _float(name, number) < math.inf:  # dynamo knows no isfinite of a number
            raise ValueError(f"{name}: expected finite numbers, got {number}")
    if len(numbers) != n:
        raise ValueError(f"{name}: expected one per objective ({n}), got {len(numbers)}")


def _number(name: str, value: Any, clip_range: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: expected a float, got {kind_of(value)}")
    number = _float(name, value)
    if clip_range and not number >= 0:
        raise ValueError(f"{name}: expected a clip range >= 0, got {value}")
    return number


def _float(name: str, value: Real) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name}: expected a number that a float holds, got {value}") from None


def _floating(name: str, tensor: Any) -> None:
    strided_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")


def _tokens_or_rows(name: str, tensor: Tensor, own: Sequence[int], shape: Sequence[int], first: Tensor) -> None:
    """Check that the shape of one objective is that of ``log_probs`` or of its rows, and the device of ``tensor``."""
    if own != shape and own != shape[:1]:
        each = " for each objective" if name == "objective_advantages" else ""
        raise ValueError(f"{name}: expected {_list(shape)} or {_list(shape[:1])}{each}, got {_list(own)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as log_probs, got {tensor.device}")


def _heads_shape(name: str, heads: Any) -> tuple[torch.Size, int, Tensor]:
    """Shape of one objective of an argument of ``value_loss``, how many there are, and a tensor of them."""
    if isinstance(heads, Tensor) and heads.dim() == 2:
        _floating(name, heads)
        return heads.shape, 1, heads
    forms = isinstance(heads, Tensor) and heads.dim() != 3
    shape, n, first = (heads.shape, 0, heads) if forms else _per_objective_shape(name, heads, 2, 2)
    if forms or len(shape) != 2:
        raise ValueError(f"{name}: expected [B, T, N], [B, T], or N tensors [B, T], got {_form(heads)}")
    return shape, n, first


def _same_keys(name: str, argument: Any, values: Any) -> None:
    if isinstance(argument, Mapping) and isinstance(values, Mapping) and set(argument) != set(values):
        raise ValueError(f"{name}: expected the keys of values {list(values)}, got {list(argument)}")


def objective_dim(objectives: Tensor, dim: int) -> int:
    """Where a tensor has its objectives, if with a dimension of time (or packed) they are at ``dim``, from 0 on."""
    return min(dim, 1) if objectives.dim() == 2 else dim


def _beside(name: str, tensor: Any, shape: Sequence[int], first: Tensor, main: str) -> None:
    """Check a tensor that belongs to all objectives; ``main`` is the argument that ``first`` is of."""
    strided_tensor(name, tensor)
    if tensor.shape != shape:
        of = main if main == "log_probs" else "one objective"
        raise ValueError(f"{name}: expected the shape of {of} {_list(shape)}, got {_list(tensor.shape)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {main}, got {tensor.device}")


def _vector(name: str, tensor: Tensor, n: int, first: Tensor, main: str) -> None:
    """Check a tensor with a number for each objective."""
    strided_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating tensor, got {tensor.dtype}")
    if tensor.shape != (n,):
        raise ValueError(f"{name}: expected shape [{n}], got {_list(tensor.shape)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {main}, got {tensor.device}")


def _served(name: str, tensor: Tensor) -> None:
    """Check that there are kernels for a tensor's device."""
    if tensor.device.type == "cuda" and not _C.cuda_architectures():
        raise ValueError(f"{name}: on {tensor.device}, but this build has no CUDA kernels (see PAMA_EXT_CUDA)")
    if tensor.device.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"{name}: expected a CPU or CUDA tensor, got {tensor.device}")


def strided_tensor(name: str, value: Any) -> None:
    """Check that a value is an ordinary tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {kind_of(value)}")
    if value.is_nested:
        raise TypeError(f"{name}: expected a strided tensor, got a nested one")
    if value.layout != torch.strided:
        raise TypeError(f"{name}: expected a strided tensor, got {value.layout}")


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    """Check that a value is one of some words."""
    if not isinstance(value, str):
        raise TypeError(f"{name}: expected a str, got {kind_of(value)}")
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, allowed))}, got {value!r}")


def kind_of(value: Any) -> str:
    """How a message calls a value of the wrong type."""
    return f"a {type(value).__name__}"


def _list(shape: Sequence[int]) -> str:
    return str(list(shape))
