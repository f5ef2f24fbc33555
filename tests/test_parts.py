"""Problems so large that the CPU kernel cuts them into parts, which threads share and whose results merge in order.

Whatever a part has to itself (moments, sums of products, maps of groups, guesses) meets here what others have: the
reference says what comes out, one thread and two have to agree to the bit.
"""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS, Problem, lay_out, make, normal
from compare import assert_same_bits, assert_same_result
from doors import assert_matches, nearly_tied, on_threads, stacked
from hypothesis import given, settings
from hypothesis import strategies as st

from pama_ext import Normalize, combine, combine_, reference

SHAPES = {
    "rows of tokens": (120, 211, 3),
    "a long row": (1, 25_013, 3),
    "short rows": (12_500, 2, 3),
    "many objectives": (67, 91, 17),
    "most objectives": (33, 61, 64),
}
MODES = {
    "batch": {},
    "batch, propagate": {"nan": "propagate"},
    "batch, without Noon": {"noon": False},
    "sequence": {"level": "sequence"},
    "token": {"level": "token"},
    "token, without Noon": {"level": "token", "noon": False},
    "fixed": {"solver": "fixed"},
}
GROUPS = {
    "by batch": lambda rows: Normalize(by="batch"),
    "groups of a size": lambda rows: Normalize(by="group", group_size=next(k for k in (8, 3, 1) if rows % k == 0)),
    "groups by offsets": lambda rows: Normalize(by="group", group_offsets=torch.tensor([0, 1, rows // 2, rows])),
    "groups by ids": lambda rows: Normalize(by="group", group_ids=torch.arange(rows) * 7919 % 11),
    "scores of rows": lambda rows: Normalize(by="batch", over="row_sums"),
    "scores of rows, in groups": lambda rows: Normalize(by="group", over="row_sums", group_ids=torch.arange(rows) % 5),
    "the combination": lambda rows: Normalize(combined="batch"),
    "all of it": lambda rows: Normalize(by="group", group_ids=torch.arange(rows) % 5, combined="group"),
}


def unequal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, **options) -> Problem:
    """Objectives whose scalars lie apart, so that rounding does not decide which is the smallest."""
    problem = make(shape, draw=normal, **options)
    return problem.but((problem.values * torch.linspace(1, 2, shape[-1])).to(dtype))


def with_holes(problem: Problem) -> Problem:
    """Some entries that are not finite, in a few of the parts."""
    values = problem.values.clone()
    flat = values.view(-1, values.shape[-1])
    flat[1000:1010, 0], flat[-3, -1] = torch.inf, torch.nan
    return problem.but(values)


def assert_right(problem: Problem) -> None:
    """The specification on two threads, and the same bits on one."""
    advantages, options = problem.call()
    two = on_threads(2, lambda: combine(advantages, **options))
    assert_matches(two, problem, weights=not nearly_tied(problem))
    assert_same_result(on_threads(1, lambda: combine(advantages, **options)), two)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(shape, mode):
    assert_right(unequal(SHAPES[shape], **MODES[mode]))


@pytest.mark.parametrize("mode", [name for name in MODES if "propagate" not in name])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_every_dtype(dtype, mode):
    assert_right(unequal((120, 211, 3), dtype, **MODES[mode]))


@pytest.mark.parametrize("mode", ["batch", "sequence", "token", "fixed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout, mode):
    """They differ in how a part is loaded, not in a bit of what comes out."""
    problem = with_holes(unequal((120, 211, 3), **MODES[mode]))
    advantages, options = problem.but(layout=layout).call()
    assert_same_result(combine(advantages, **options), combine(problem.values, **problem.options))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["last", "first", "slice", "list"])
def test_in_place(layout, mode):
    problem = with_holes(unequal((120, 211, 3), **MODES[mode])).but(layout=layout)
    advantages, options = problem.call()
    result = on_threads(2, lambda: combine_(advantages, **options))
    assert_matches(result, problem, in_place=True)
    again, _ = lay_out(problem.values, layout)
    on_threads(1, lambda: combine_(again, **options))
    assert_same_bits(stacked(again, options["dim"]), stacked(advantages, options["dim"]))


def assert_normalised_right(problem: Problem) -> None:
    """In float64, to a hundred thousand roundings, as what cancels in a mean is amplified; bits in float32 as well."""
    exact = problem.but(problem.values.double())
    expected = reference.combine(exact.values, **exact.options)
    result = on_threads(2, lambda: combine(exact.values, **exact.options))
    for name, ours, theirs in zip(expected.stats._fields, result.stats, expected.stats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.advantages, expected.advantages, rtol=1e-6, atol=1e-6)
    one, two = (on_threads(count, lambda: combine(problem.values, **problem.options)) for count in (1, 2))
    assert_same_result(one, two)


@pytest.mark.parametrize("mode", ["batch", "sequence", "token"])
@pytest.mark.parametrize("shape", ["rows of tokens", "short rows"])
@pytest.mark.parametrize("how", GROUPS)
def test_every_normalisation(how, shape, mode):
    rows = SHAPES[shape][0]
    assert_normalised_right(unequal(SHAPES[shape], normalize=GROUPS[how](rows), **MODES[mode]))


@pytest.mark.parametrize("how", ["groups of a size", "groups by offsets", "groups by ids"])
def test_a_solve_for_each_group(how):
    shape = SHAPES["rows of tokens"]
    assert_normalised_right(unequal(shape, level="group", normalize=GROUPS[how](shape[0])))


@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_gram_matrices_meet(shape, noon):
    """The weights are those of the whole Gram matrix: of no other is the norm as small."""
    problem = unequal(SHAPES[shape], solver="min_norm", noon=noon, mask=None, log_ratio=None)
    two = on_threads(2, lambda: combine(problem.values, **problem.options))
    assert_same_result(on_threads(1, lambda: combine(problem.values, **problem.options)), two)
    x = problem.values.double().flatten(0, -2)
    x = x.clamp(min=0) if noon else x
    weights = two.weights.double()
    gram = x.T @ x / len(x)
    norm = (weights @ gram @ weights).sqrt()
    torch.testing.assert_close(two.value.double(), norm, rtol=1e-5, atol=0)
    # Optimal: no vertex of the simplex leads downhill.
    assert ((gram @ weights) >= norm**2 * (1 - 1e-5)).all()
    torch.testing.assert_close(two.advantages.double().flatten(), x @ weights, rtol=1e-4, atol=1e-5)


@settings(max_examples=60)
@given(st.data())
def test_wherever_the_cuts_fall(data):
    """Shapes around the sizes at which there are two parts, four, six: no token is left out, none counted twice."""
    n = data.draw(st.sampled_from([1, 2, 3, 5, 16, 33]), label="N")
    parts = data.draw(st.sampled_from([1, 2, 4, 6]), label="parts")
    tokens = max(1, parts * 16 * 1024 // n + data.draw(st.integers(-20, 20), label="beyond"))
    cols = data.draw(st.sampled_from([1, 2, 7, 100, tokens]), label="T")
    shape = (-(-tokens // cols), cols, n)
    problem = unequal(
        shape, mask=None, log_ratio=None, **MODES[data.draw(st.sampled_from(sorted(MODES)), label="mode")]
    )
    one, two = (on_threads(count, lambda: combine(problem.values, **problem.options)) for count in (1, 2))
    assert_same_result(one, two)
    assert two.stats.count.tolist() == [shape[0] * shape[1]] * n
    torch.testing.assert_close(two.stats.mean, problem.values.double().mean((0, 1)).float(), rtol=1e-4, atol=1e-6)
    assert torch.equal(two.stats.max, problem.values.amax((0, 1)))
    poisoned = torch.full(shape[:-1], torch.nan)
    assert_same_bits(combine(problem.values, out=poisoned, **problem.options).advantages, two.advantages)
    assert not poisoned.isnan().any()


@pytest.mark.parametrize("mode", [{}, {"level": "token"}, {"level": "sequence"}, {"solver": "min_norm"}], ids=str)
@pytest.mark.parametrize("rows", [2, 3, 5, 7, 31, 33])
def test_any_number_of_parts_and_threads(rows, mode):
    """At level sequence a part for each row, elsewhere up to 64: neighbours without a partner, too.

    More threads than cores end in every order. Each row has values of its own, and float64 shows every bit of what is
    merged, so that a part that is lost, counted twice or merged in another order does not pass.
    """
    cols = 2 * 16 * 1024 // 3 + 1
    values = torch.randn(rows, cols, 3, dtype=torch.float64) + torch.arange(rows).view(-1, 1, 1)
    mask = torch.rand(rows, cols) < torch.linspace(0.1, 1, rows).unsqueeze(-1)
    first = on_threads(1, lambda: combine(values, mask=mask, **mode))
    assert first.stats.count.tolist() == [int(mask.sum())] * 3
    valid = values[mask]
    torch.testing.assert_close(first.stats.mean, valid.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.stats.std, valid.std(0), rtol=1e-12, atol=1e-12)
    for threads in (2, 3, 8) * 5:
        assert_same_result(on_threads(threads, lambda: combine(values, mask=mask, **mode)), first)


def test_parts_that_know_nothing_of_each_other():
    """A guess that only some of the parts make, or that all make wrong, leaves nothing behind."""
    values = torch.rand(64, 16 * 1024, 2) + 1
    values[:32, :, 0] -= 1  # the first half would give all weight to one objective, the second half to the other
    values[32:, :, 1] -= 1.01
    first = on_threads(1, lambda: combine(values))
    assert first.weights.tolist() == [0, 1]
    assert torch.equal(first.advantages, values[..., 1].clamp(min=0))
    for threads in (2, 3, 8) * 5:
        assert_same_result(on_threads(threads, lambda: combine(values)), first)
