"""The CPU kernel is compiled for several instruction sets; each that this machine has is tested, not only the best."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LEVELS, SHAPES, SOLVERS, make
from compare import assert_same_bits, assert_same_result
from doors import assert_matches

from pama_ext import _C, combine, combine_

BEST = _C.cpu_instructions()
ALL = ("avx512", "avx2", "generic")


@pytest.fixture(params=ALL)
def instructions(request):
    if not _C.use_cpu_instructions(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.use_cpu_instructions(BEST)


def test_the_choice_takes_effect(instructions):
    assert _C.cpu_instructions() == instructions


def test_an_unknown_set_is_refused():
    assert not _C.use_cpu_instructions("avx1024")
    assert _C.cpu_instructions() == BEST


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(instructions, shape, dtype, level):
    problem = make(SHAPES[shape], dtype=dtype, level=level)
    assert_matches(combine(problem.values, **problem.options), problem, weights=False)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("options", [{}, {"noon": False}, {"nan": "propagate"}, {"skip_inactive": True}], ids=str)
def test_in_place_and_out(instructions, solver, options):
    for level in LEVELS:
        problem = make((5, 131, 3), level=level, solver=solver, **options)
        expected = combine(problem.values, **problem.options)
        out = torch.full((5, 131), float("nan"))
        assert_same_result(combine(problem.values, out=out, **problem.options), expected)
        shares = problem.values.clone()
        combine_(shares, **problem.options)
        assert_matches(combine(problem.values, **problem.options), problem, weights=False)
        weighted = torch.stack([shares[..., i] for i in range(3)], -1)
        torch.testing.assert_close(weighted.sum(-1), expected.advantages, equal_nan=True)


def test_objectives_take_no_part_in_the_order_of_sums(instructions):
    """Duplicates tie exactly and permuting permutes bits, whatever the width of the vectors."""
    problem = make((3, 700, 4))
    result = combine(problem.values, **problem.options)
    order = [2, 0, 3, 1]
    permuted = combine(problem.values[..., order], **problem.options)
    for ours, theirs in zip(result.stats, permuted.stats, strict=True):
        assert_same_bits(ours[order], theirs)
    assert_same_bits(result.weights[order], permuted.weights)
    twice = combine(torch.cat([problem.values, problem.values], -1), **problem.options)
    assert_same_bits(twice.weights[:4], twice.weights[4:])
    assert_same_bits(twice.value, result.value)
