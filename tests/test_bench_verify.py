"""What is verified before it is timed: a candidate may round, and nothing else."""

from __future__ import annotations

import pytest
import torch

from bench import verify
from bench.suites import combine as suite
from pama_ext import combine, reference

EPS = torch.finfo(torch.float32).eps


@pytest.fixture
def expected():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    return reference.combine(x.double()), combine(x)


def test_a_few_roundings_are_allowed_of_the_largest_number():
    exact = torch.tensor([1e-3, 10.0], dtype=torch.float64)
    verify.close("x", exact.float(), exact)
    verify.close("x", exact + 60 * EPS * 10, exact)
    with pytest.raises(AssertionError, match="x differs from the reference by"):
        verify.close("x", exact + 70 * EPS * 10, exact)


def test_numbers_that_should_be_0_are_measured_beside_a_size():
    zero = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(AssertionError, match="x differs"):
        verify.close("x", zero + 1e-7, zero)
    verify.close("x", zero + 1e-7, zero, at_least=1.0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_wrong(wrong):
    exact = torch.ones(3, dtype=torch.float64)
    got = exact.clone()
    got[1] = wrong
    with pytest.raises(AssertionError, match="differs"):
        verify.close("x", got, exact)


def test_a_candidate_may_give_less_than_all(expected):
    exact, ours = expected
    check = verify.combination(exact)
    check(ours)
    check(ours.advantages)
    check((ours.advantages, ours.weights))


def test_columns_are_told_apart():
    exact = torch.randn(4, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    check = verify.columns(exact)
    one, two = exact.float().unbind(-1)
    check([one, two.flatten()])
    with pytest.raises(AssertionError, match="objective 0 differs"):
        check([two, one])
    with pytest.raises(ValueError, match="zip"):
        check([one])


def test_unequal_objectives_are_unequal():
    """And otherwise the same, so that the rows of the table differ in nothing else."""
    plain, options = suite.inputs((50, 60, 4), "cpu")
    unequal, same = suite.inputs((50, 60, 4), "cpu", unequal=True)
    torch.testing.assert_close(unequal / plain, torch.tensor([1, 4 / 3, 5 / 3, 2]).expand_as(plain))
    assert all(torch.equal(options[name], same[name]) for name in options)
    assert combine(unequal, **same).weights.tolist() == [1.0, 0.0, 0.0, 0.0]
