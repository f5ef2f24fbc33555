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
OPERATORS = ("combine", "combine_out", "combine_", "min_norm", "gae")


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


# Advantages are constants of the policy gradient: no output requires grad, whatever the inputs do.
for _name in OPERATORS:
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
