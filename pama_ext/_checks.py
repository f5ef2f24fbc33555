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
HAS_CUDA = bool(_C.cuda_architectures())  # asked here, as torch.compile traces what follows and calls nothing compiled


def options(dim: Any, clip_low: Any, clip_high: Any, noon: Any, level: Any, solver: Any, normalize: Any, nan: Any,
            skip_inactive: Any, process_group: Any) -> None:  # fmt: skip
    """Check the arguments of ``combine`` that are not tensors, for their meaning alone."""
    if isinstance(dim, bool) or not isinstance(dim, Integral):
        raise TypeError(f"dim: expected an int, got {kind_of(dim)}")
    for name, clip in (("clip_low", clip_low), ("clip_high", clip_high)):
        number_of(name, clip, clip_range=True)
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
            beside(name, tensor, shape, first, "advantages")
    if mask is not None:
        mask_dtype(mask)
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

    tokens, n, first = per_objective_shape("values", values, axis, time)
    if len(tokens) != time:
        want = "[B, T, N], or N tensors [B, T]" if time == 2 else "[total, N] with offsets, or N tensors [total]"
        raise ValueError(f"values: expected {want}, got {form(values)}")
    if not 1 <= n <= MAX_OBJECTIVES:
        raise ValueError(f"values: expected from 1 to {MAX_OBJECTIVES} objectives, got {n}")
    served("values", first)
    sequences = tokens[0] if offsets is None else _offsets(offsets, tokens[0], first)

    for name, argument, shapes in (
        ("rewards", rewards, (list(tokens), [sequences])),
        ("bootstrap", bootstrap, ([sequences],)),
    ):
        if argument is None and name == "bootstrap":
            continue
        shape, count, tensor = per_objective_shape(name, argument, axis, time)
        if count != n:
            raise ValueError(f"{name}: expected {n} objectives as in values, got {count}")
        if list(shape) not in shapes:
            want = " or ".join(map(str, shapes))
            raise ValueError(f"{name}: expected {want} for each objective, got {list(shape)}")
        if tensor.device != first.device:
            raise ValueError(f"{name}: expected device {first.device} as values, got {tensor.device}")
        same_keys(name, argument, values)

    for name, tensor in (("mask", mask), ("kl_penalty", kl_penalty)):
        if tensor is not None:
            beside(name, tensor, tokens, first, "values")
    if mask is not None:
        mask_dtype(mask)
    if kl_penalty is not None and kl_penalty.dtype not in FLOATING:
        raise TypeError(f"kl_penalty: expected a floating tensor, got {kl_penalty.dtype}")
    return axis


def per_objective(name: str, value: Any, n: int, first: Tensor) -> tuple[Tensor | None, list[float]]:
    """Check ``gamma`` or ``lam``; return it as a tensor or as N numbers."""
    if isinstance(value, Tensor):
        vector(name, value, n, first, "values")
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


def gramian(matrix: Any) -> None:
    """Check the argument of ``min_norm``."""
    floating("gramian", matrix)
    if matrix.dim() < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(f"gramian: expected [..., N, N], got {as_list(matrix.shape)}")
    if not 1 <= matrix.shape[-1] <= MAX_OBJECTIVES:
        raise ValueError(f"gramian: expected N from 1 to {MAX_OBJECTIVES}, got {matrix.shape[-1]}")
    served("gramian", matrix)


def _objectives(advantages: Sequence[Any], dim: int | None, names: tuple[Any, ...] | None) -> tuple[Sequence[int], int]:
    if not advantages:
        raise ValueError("advantages: expected at least one objective, got none")
    for i, tensor in enumerate(advantages):
        name = "advantages" if dim is not None else f"advantages[{names[i] if names else i!r}]"
        floating(name, tensor)
    if names is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(f"advantages: expected str keys, got {names!r}")
    first = advantages[0]
    served("advantages", first)

    if dim is None:
        shape, n = first.shape, len(advantages)
        if len(shape) not in (1, 2):
            raise ValueError(f"advantages: expected tensors [B] or [B, T], got {as_list(shape)}")
        for i, tensor in enumerate(advantages[1:], 1):
            for what in ("shape", "dtype", "device"):
                ours, theirs = getattr(tensor, what), getattr(first, what)
                if ours != theirs:
                    kind = TypeError if what == "dtype" else ValueError
                    raise kind(f"advantages: expected one {what} for all, got {theirs} and, at {i}, {ours}")
    else:
        if first.dim() not in (2, 3):
            raise ValueError(f"advantages: expected [B, N] or [B, T, N], got {as_list(first.shape)}")
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


def per_objective_shape(name: str, argument: Any, dim: int, time: int) -> tuple[torch.Size, int, Tensor]:
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
        floating(label, tensor)
        for what in ("shape", "dtype", "device"):
            ours, theirs = getattr(tensor, what), getattr(tensors[0], what)
            if ours != theirs:
                kind = TypeError if what == "dtype" else ValueError
                theirs, ours = (as_list(x) if what == "shape" else x for x in (theirs, ours))
                raise kind(f"{label}: expected one {what} for all, got {theirs} before and {ours}")
    first = tensors[0]
    if not isinstance(argument, Tensor):
        return first.shape, len(tensors), first
    if first.dim() not in (2, time + 1):
        want = "[B, T, N] or [B, N]" if time == 2 else "two dimensions with offsets"
        raise ValueError(f"{name}: expected {want}, got {as_list(first.shape)}")
    dim = objective_dim(first, dim)
    return first.shape[:dim] + first.shape[dim + 1 :], first.shape[dim], first


def form(argument: Any) -> str:
    """How a message calls tensors of the wrong shape."""
    if isinstance(argument, Tensor):
        return as_list(argument.shape)
    tensors = list(argument.values() if isinstance(argument, Mapping) else argument)
    return f"{len(tensors)} tensors {as_list(tensors[0].shape)}"


def _offsets(offsets: Any, total: int, first: Tensor) -> int:
    strided_tensor("offsets", offsets)
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"offsets: expected int32 or int64, got {offsets.dtype}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"offsets: expected [S + 1], got {as_list(offsets.shape)}")
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


def mask_dtype(mask: Tensor) -> None:
    """Check that a tensor can be a mask."""
    if mask.is_complex() or (mask.dtype not in FLOATING and mask.is_floating_point()):
        raise TypeError(f"mask: expected a bool, integer or floating tensor, got {mask.dtype}")


def _rewards(reward_weights: Any, first: Tensor, n: int) -> None:
    if reward_weights is None:
        return
    if isinstance(reward_weights, Tensor):
        vector("reward_weights", reward_weights, n, first, "advantages")
        return
    finite_numbers("reward_weights", reward_weights, n)


def finite_numbers(name: str, numbers: Any, n: int) -> None:
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


def number_of(name: str, value: Any, clip_range: bool = False) -> float:
    """Check that a value is a number, and return it."""
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


def floating(name: str, tensor: Any) -> None:
    """Check that a value is an ordinary floating tensor."""
    strided_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {tensor.dtype}")


def same_keys(name: str, argument: Any, values: Any) -> None:
    """Check that two dicts have the same keys."""
    if isinstance(argument, Mapping) and isinstance(values, Mapping) and set(argument) != set(values):
        raise ValueError(f"{name}: expected the keys of values {list(values)}, got {list(argument)}")


def objective_dim(objectives: Tensor, dim: int) -> int:
    """Where a tensor has its objectives, if with a dimension of time (or packed) they are at ``dim``, from 0 on."""
    return min(dim, 1) if objectives.dim() == 2 else dim


def beside(name: str, tensor: Any, shape: Sequence[int], first: Tensor, main: str) -> None:
    """Check a tensor that belongs to all objectives; ``main`` is the argument that ``first`` is of."""
    strided_tensor(name, tensor)
    if tensor.shape != shape:
        of = main if main == "log_probs" else "one objective"
        raise ValueError(f"{name}: expected the shape of {of} {as_list(shape)}, got {as_list(tensor.shape)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {main}, got {tensor.device}")


def vector(name: str, tensor: Tensor, n: int, first: Tensor, main: str) -> None:
    """Check a tensor with a number for each objective."""
    strided_tensor(name, tensor)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating tensor, got {tensor.dtype}")
    if tensor.shape != (n,):
        raise ValueError(f"{name}: expected shape [{n}], got {as_list(tensor.shape)}")
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device} as {main}, got {tensor.device}")


def served(name: str, tensor: Tensor) -> None:
    """Check that there are kernels for a tensor's device."""
    if tensor.device.type == "cuda" and not HAS_CUDA:
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


def as_list(shape: Sequence[int]) -> str:
    """How a message writes a shape."""
    return str(list(shape))
