"""The ways into the kernels, each taken for certain, and the judgement of what comes out of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from cases import Problem
from compare import ROUNDINGS, assert_close, compute_dtype
from torch import Tensor

from pama_ext import _C, Combined, Normalize, _combine, combine, reference

Result = TypeVar("Result")


def on_threads(count: int, call: Callable[[], Result]) -> Result:
    """What ``call`` returns when torch has so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(before)


def dispatcher(advantages: Any, *, in_place: bool = False, **keywords: Any) -> Combined:
    """Door 1: ``torch.ops.pama_ext``."""
    return _combine._combine_dispatcher(advantages, in_place=in_place, **keywords)


def eager(advantages: Any, *, in_place: bool = False, **keywords: Any) -> Combined:
    """Door 2: DLPack; fails if the compiled module declines, where ``pama_ext.combine`` would quietly take door 1."""
    arguments = inspect.signature(combine).bind(advantages, **keywords)
    arguments.apply_defaults()
    result = (_C.combine_ if in_place else _C.combine)(*arguments.args, *arguments.kwargs.values())
    if result is None:
        raise AssertionError("the eager door declined")
    return result


DOORS = {"dispatcher": dispatcher} | ({"eager": eager} if _C.has_door() else {})


def stacked(advantages: Any, dim: int = -1) -> Tensor:
    """The objectives of any layout, last."""
    return reference._combine._objectives_last(advantages, dim)


def _pama(problem: Problem, dtype: torch.dtype) -> tuple[Any, ...]:
    options = dict(problem.options)
    rewards = options.get("reward_weights")
    if isinstance(rewards, Tensor):
        options["reward_weights"] = rewards.to(dtype)
    combined, shares, weights, value, stats = reference.pama(problem.values.to(dtype), **options)
    return shares, combined, weights, value, stats


def assert_matches(result: Combined, problem: Problem, *, in_place: bool = False, weights: bool = True) -> None:
    """Every field of ``result`` against the float64 specification, the errors of the same-dtype one beside it.

    ``weights=False`` leaves out what follows from the weights, for problems whose scalars are nearly tied.
    """
    problem = problem.to(torch.device("cpu"))
    compute = compute_dtype(problem.values.dtype)
    shares, combined, expected_weights, value, stats = _pama(problem, torch.float64)
    base_shares, base_combined, base_weights, base_value, base_stats = _pama(problem, compute)
    # Rounding is relative to what was added up: the mean of |A|, the sum of the shares, the largest |a_i|.
    normalize = problem.options.get("normalize")
    samples = None if normalize is None else Normalize(over=normalize.over)
    size = reference.pama(problem.values.double().abs(), mask=problem.options.get("mask"), normalize=samples)[4].mean
    rewards = problem.options.get("reward_weights")
    fixed = problem.options.get("solver") == "fixed"
    factor = 1.0 if rewards is None or fixed else torch.as_tensor(rewards).double().abs()
    rounding = 1.0 if samples and samples.over == "row_sums" else ROUNDINGS * torch.finfo(compute).eps  # of the samples
    sizes = {"mean": size, "active_mean": size * factor, "std": stats.std + rounding * size}
    for name, actual, want, base in zip(stats._fields, result.stats, stats, base_stats, strict=True):
        assert actual.dtype == compute, name
        assert_close(actual, want, base, magnitude=sizes.get(name), what=name)

    if not weights:
        return
    assert_close(result.weights, expected_weights, _sane(base_weights, expected_weights), what="weights")
    share = torch.where(expected_weights == 0, 0.0, expected_weights.abs() * (size * factor)).sum(-1)
    token = problem.options.get("level") == "token"  # a mean over tokens, of one objective or another
    magnitude = (size * factor).max() if token and not fixed else torch.maximum(share, value.abs())
    assert_close(result.value, value, base_value, magnitude=magnitude, what="value")
    if in_place:
        got = stacked(result.advantages, problem.call()[1]["dim"])
        assert_close(got, shares, base_shares, what="shares")
    else:
        assert_close(result.advantages, combined, base_combined, magnitude=shares.abs().sum(-1), what="advantages")


def _sane(base: Tensor, expected: Tensor) -> Tensor | None:
    """PyTorch's weights as a baseline, unless it ties what does not tie or the reverse: that would excuse anything."""
    return base if torch.equal(base != 0, expected != 0) else None


def nearly_tied(problem: Problem) -> bool:
    """Whether rounding may decide which scalars are extreme: some lie within their error of an extreme, untied."""
    problem = problem.to(torch.device("cpu"))
    pools = [problem]
    if problem.options.get("level") == "sequence":
        names = [k for k in ("mask", "log_ratio") if k in problem.options]
        pools = [
            problem.but(row[None], **{k: problem.options[k][b : b + 1] for k in names})
            for b, row in enumerate(problem.values)
        ]
    largest = problem.values.double().nan_to_num(0, 0, 0).abs().max() if problem.values.numel() else 0.0
    error = 2 * ROUNDINGS * torch.finfo(compute_dtype(problem.values.dtype)).eps * largest
    for pool in pools:
        stats = _pama(pool, torch.float64)[4]
        scalars = stats.active_mean[stats.count > 0]
        gaps = torch.cat([scalars - scalars.min(), scalars.max() - scalars]) if len(scalars) else scalars
        if ((gaps > 0) & (gaps <= error)).any():
            return True
    return False
