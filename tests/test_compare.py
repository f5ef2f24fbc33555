"""The comparator passes what it should and fails, naming the place, what it should not."""

from __future__ import annotations

import math

import pytest
import torch
from compare import FACTOR, ROUNDINGS, assert_close, assert_same_bits, rounding_floor
from doors import on_threads

TRUTH = torch.tensor([[1.0, -2.0, 3.0], [1e-3, 0.0, 1e6]], dtype=torch.float64)
EPS = torch.finfo(torch.float32).eps


def changed(at: tuple[int, int], value: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    result = TRUTH.to(dtype)
    result[at] = value
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_rounded_truth_passes(dtype):
    truth = TRUTH.clamp(max=1e4)
    assert_close(truth.to(dtype), truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_of_a_unit_passes_and_a_whole_one_fails(dtype):
    truth = torch.tensor([1.0], dtype=torch.float64)
    next_one = (1 + torch.finfo(dtype).eps) * torch.ones(1, dtype=torch.float64)
    assert_close(next_one.to(dtype), (truth + next_one) / 2)
    with pytest.raises(AssertionError, match="times as much"):
        assert_close(next_one.to(dtype), truth)


def test_floor_is_rounding_times_magnitude():
    assert_close(changed((0, 2), 3 * (1 + (ROUNDINGS - 1) * EPS)), TRUTH)
    with pytest.raises(AssertionError, match=r"worst at \(0, 2\)"):
        assert_close(changed((0, 2), 3 * (1 + (ROUNDINGS + 2) * EPS)), TRUTH)
    assert_close(changed((0, 2), 3 * (1 + (ROUNDINGS + 2) * EPS)), TRUTH, magnitude=torch.tensor(10.0))


def test_small_elements_are_judged_by_their_own_magnitude():
    with pytest.raises(AssertionError, match=r"result: 1 of 6 elements are off; worst at \(1, 0\)"):
        assert_close(changed((1, 0), 1.001e-3), TRUTH, what="result")
    with pytest.raises(AssertionError, match=r"\(1, 1\)"):
        assert_close(changed((1, 1), EPS), TRUTH)


def test_baseline_error_allows_a_factor_and_no_more():
    error = 100 * EPS
    baseline = changed((0, 0), 1 + error)
    assert_close(changed((0, 2), 3 * (1 + FACTOR * error)), TRUTH, baseline)
    with pytest.raises(AssertionError, match=r"\(0, 2\)"):
        assert_close(changed((0, 2), 3 * (1 + 2 * FACTOR * error)), TRUTH, baseline)
    with pytest.raises(AssertionError, match=r"\(1, 0\)"):  # what is large at 1e6 excuses nothing at 1e-3
        assert_close(changed((1, 0), 2e-3), TRUTH, changed((1, 2), 1e6 * (1 + error)))


def test_non_finite_baseline_excuses_nothing():
    with pytest.raises(AssertionError, match=r"\(0, 0\)"):
        assert_close(changed((0, 0), 2.0), TRUTH, changed((0, 0), math.nan))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_positions_are_compared(bad):
    truth = TRUTH.clone()
    truth[1, 1] = bad
    assert_close(changed((1, 1), bad), truth)
    for actual, expected in ((changed((1, 1), bad), TRUTH), (changed((0, 0), 1.0), truth)):
        with pytest.raises(AssertionError, match=r"(NaN|inf) at \(1, 1\)"):
            assert_close(actual, expected)
    if math.isinf(bad):
        with pytest.raises(AssertionError, match="inf at"):
            assert_close(changed((1, 1), -bad), truth)


def test_overflow_of_the_dtype_is_expected():
    truth = torch.tensor([1e6], dtype=torch.float64)
    assert_close(torch.tensor([math.inf], dtype=torch.float16), truth)
    with pytest.raises(AssertionError, match="inf at"):
        assert_close(torch.tensor([60000.0], dtype=torch.float16), truth)


def test_misuse():
    with pytest.raises(TypeError, match="float64 is the truth"):
        assert_close(TRUTH.float(), TRUTH.float())
    with pytest.raises(AssertionError, match="shape"):
        assert_close(TRUTH.float(), TRUTH[0])


def test_floor_of_a_small_half_is_half_its_last_place():
    zero = torch.zeros((), dtype=torch.float64)
    step = 2.0**-24  # distance between subnormal halves
    floor = rounding_floor(zero, zero, torch.float16)
    assert step / 2 <= floor < step


def test_same_bits():
    x = torch.tensor([1.0, math.nan, 0.0])
    assert_same_bits(x, x.clone())
    assert_same_bits(-x[1:2], x[1:2])
    for other, what in (
        (torch.tensor([1.0, math.nan, -0.0]), r"first at \(2,\)"),
        (torch.tensor([1.0 + EPS, math.nan, 0.0]), r"1 of 3 elements differ in bits; first at \(0,\)"),
        (x.double(), "dtype"),
        (x[:2], "shape"),
    ):
        with pytest.raises(AssertionError, match=what):
            assert_same_bits(x, other)


@pytest.mark.parametrize("count", [1, 2])
def test_threads_are_as_many_as_asked_for_and_then_as_before(count):
    before = torch.get_num_threads()
    assert on_threads(count, torch.get_num_threads) == count
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        on_threads(count, lambda: 1 / 0)
    assert torch.get_num_threads() == before
