"""``min_norm``: the exact min-norm point of the simplex for a Gram matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from pama_ext import _C, _checks


def min_norm(gramian: Tensor) -> Tensor:
    r"""Weights of the shortest vector in the convex hull of N vectors, from their Gram matrix.

    .. math:: \min_c c^\top G c \quad \text{s.t.} \quad \sum_i c_i = 1,\ c_i \ge 0

    The problem of MGDA (Desideri 2012; Sener and Koltun 2018), solved exactly by the active-set method of Wolfe (1976),
    in float64 and with the vectors scaled to one length, so that they may differ by many orders of magnitude. Vectors
    that the matrix cannot tell from each other get equal weights; where some have length 0, these share all of it.

    Args:
        gramian: G, ``[..., N, N]``, symmetric (the upper triangle is read) and positive semidefinite, N from 1 to 64;
            float32, float64, bfloat16 or float16, CPU or CUDA. Read as detached.

    Returns:
        c, ``[..., N]``, float32, for float64 float64; NaN where a matrix is not finite. Deterministic.

    Raises:
        ValueError: not N x N, too many vectors, or not a CPU or CUDA tensor.
        TypeError: not a strided floating tensor.
    """
    if not torch.compiler.is_dynamo_compiling():
        weights: Tensor | None = _C.min_norm(gramian)
        if weights is not None:
            return weights
    _checks.gramian(gramian)
    n = gramian.shape[-1]
    weights = torch.ops.pama_ext.min_norm(gramian.reshape(-1, n, n))
    return weights.reshape(gramian.shape[:-1])
