"""The CPU kernel is compiled for several instruction sets; each that this machine has is tested, not only the best."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES, LEVELS, SHAPES, SOLVERS, make, normal
from compare import assert_same_bits, assert_same_result
from doors import assert_matches

from pama_ext import _C, Normalize, ObjectiveStats, combine, combine_, reference

BEST = _C.cpu_instructions()


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [*LEVELS, "group"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8, 16, 60, 120])
def test_groups_of_every_size(instructions, size, level, dtype):
    """Sizes that a vector holds, that it does not, that are done side by side and that are not, and one for a lane."""
    normalize = Normalize(by="group", group_size=size, singleton="raw")
    for shape in ((480, 5), (240, 3, 2)):
        problem = make(shape, dtype, draw=normal, level=level, normalize=normalize)
        assert_matches(combine(problem.values, **problem.options), problem, weights=False)
        whole = problem.but(mask=torch.ones(shape[:-1]), log_ratio=None)
        plain = whole.but(mask=None)
        for name, ours, theirs in zip(
            ObjectiveStats._fields,
            combine(plain.values, **plain.options).stats,
            combine(whole.values, **whole.options).stats,
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, msg=name)  # with and without a look at the mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 16, 17, 31, 64])
def test_the_last_tokens_are_those_of_their_objective(instructions, n, dtype):
    """Vectors end within a tensor: wherever that is, a token's entries are its own, and what follows has no say."""
    tokens = 40  # more than two vectors of any kind
    wide = torch.full((2 + tokens + 2, n), torch.nan, dtype=dtype)
    for length in range(1, tokens + 1):
        advantages = wide[2 : 2 + length]
        advantages.copy_(torch.arange(length * n).view(length, n) % 251 - 100)
        for i in {0, 1, n - 1}:
            picked = combine(advantages, noon=False, solver="fixed", reward_weights=torch.eye(n)[i])
            assert_same_bits(picked.advantages, advantages[:, i].clone())
            assert picked.stats.min.tolist() == advantages.min(0).values.tolist()
            assert picked.stats.max.tolist() == advantages.max(0).values.tolist()


@pytest.mark.parametrize("n", [*range(1, 18), 31, 32, 33, 63, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_objectives_beside_each_other_are_parted(instructions, dtype, n):
    """Each number of objectives that is parted by shuffles, and others; rows that are no multiple of a vector."""
    for rows in (1, 15, 16, 17, 1024, 1100):
        values = (torch.arange(rows * n).reshape(rows, n) % 251).to(dtype)
        picked = [combine(values, solver="fixed", reward_weights=torch.eye(n)[i]).advantages for i in range(n)]
        assert torch.equal(torch.stack(picked, -1), values)
        stats = combine(values).stats
        assert torch.equal(stats.min, values.amin(0).to(stats.min)) and torch.equal(
            stats.max, values.amax(0).to(stats.max)
        )


@pytest.mark.parametrize("combined", ["batch", "group"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_combination_of_zero_is_not_one_without_data(instructions, combined, dtype):
    """Both are 0 before the last normalisation; after it only what has no data is. Tiny ones round to 0, not to -0."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 4
    values = torch.tensor([[1.0], [0.0], [torch.nan], [-tiny], [2.0], [0.0]], dtype=torch.float32).to(dtype)
    normalize = Normalize(group_size=6, combined=combined, eps=0.0)
    result = combine(values, noon=False, normalize=normalize).advantages.double()
    expected = reference.combine(values.double(), noon=False, normalize=normalize).advantages
    torch.testing.assert_close(result, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-6)
    assert result[2] == 0 and (result[[1, 3, 5]] < -0.3).all()


@pytest.mark.parametrize("n", [1, 2, 5, 7, 33])
def test_the_gram_matrix(instructions, n):
    problem = make((3, 700, n), torch.float64, draw=normal, solver="min_norm", level="sequence")
    result, expected = (f(problem.values, **problem.options) for f in (combine, reference.combine))
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.advantages, expected.advantages, rtol=1e-9, atol=1e-9)
