"""Autograd and its neighbours: advantages are constants, writes are counted, lazy views are read rightly, functorch."""

from __future__ import annotations

import pytest
import torch
from cases import make, normal
from compare import assert_same_bits, assert_same_result

from pama_ext import combine, combine_

PROBLEM = make((6, 9, 3), draw=normal)


def test_grad_is_neither_taken_nor_given(device):
    problem = PROBLEM.to(device)
    leaf = problem.values.clone().requires_grad_()
    parameter = torch.nn.Parameter(problem.values.clone())
    ratio = problem.options["log_ratio"].clone().requires_grad_()
    expected = combine(problem.values, **problem.options)
    for x in (leaf, leaf * 1, parameter):
        result = combine(x, **{**problem.options, "log_ratio": ratio})
        assert_same_result(result, expected)
        assert not any(t.requires_grad for t in (result.advantages, result.weights, result.value, *result.stats))
    scores = torch.ones_like(expected.advantages).requires_grad_()
    (combine(leaf, **problem.options).advantages * scores).sum().backward()
    assert leaf.grad is None
    assert_same_bits(scores.grad, expected.advantages)
    with torch.inference_mode():
        x, out = problem.values.clone(), torch.empty(6, 9, device=device)
        assert_same_result(combine(x, out=out, **problem.options), expected)
        combine_(x, **problem.options)
    with torch.no_grad():
        assert_same_result(combine(parameter, **problem.options), expected)


def test_writes_are_seen_by_autograd(device):
    """As with torch's own in-place operators: a tensor saved for backward may not change unnoticed."""
    x, out = torch.ones(4, 3, device=device), torch.ones(4, device=device)
    w = torch.ones(4, device=device, requires_grad=True)
    loss = (w * out).sum()
    before = (x._version, out._version)
    combine(x, out=out)
    assert x._version == before[0] and out._version > before[1]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    combine_([x[:, 0], x[:, 1]])
    assert x._version > before[0]


NEGATIVE_VIEWS = {
    "imaginary part of a conjugate": lambda x: torch.complex(x, -x).conj().imag,
    "the same with odd strides": lambda x: torch.complex(x, -x).conj().imag.as_strided(x.shape, (3, 1)),
    "_neg_view": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("view", NEGATIVE_VIEWS.values(), ids=NEGATIVE_VIEWS)
def test_negative_bit_views_are_read_with_their_sign(view):
    """Their sign is a bit of the tensor, not of its memory."""
    lazy = view(torch.randn(6, 3))
    assert lazy.is_neg()
    plain = lazy.resolve_neg().clone()
    for noon in (True, False):
        assert_same_result(combine(lazy, noon=noon), combine(plain, noon=noon))
        assert_same_result(combine(list(lazy.unbind(-1)), noon=noon), combine(plain, noon=noon))
        assert_same_result(
            combine(plain, log_ratio=lazy[:, 0], noon=noon), combine(plain, log_ratio=plain[:, 0], noon=noon)
        )


def test_negative_bit_views_are_not_written_with_the_wrong_sign():
    """torch's own fallback for them knows no way to do it, and says so."""
    lazy = torch.randn(6, 3, dtype=torch.complex64).conj().imag
    before = lazy.resolve_neg().clone()
    with pytest.raises(RuntimeError):
        combine_(lazy)
    with pytest.raises(RuntimeError):
        combine(torch.ones(6, 2), out=lazy[:, 0])
    assert_same_bits(lazy.resolve_neg().clone(), before)


def test_functorch():
    """Under vmap a batch of problems works as a loop would or says that it cannot; it never reads wrong memory."""
    x = torch.randn(5, 4, 3)
    expected = torch.stack([combine(row).advantages for row in x])
    try:
        got = torch.func.vmap(lambda row: combine(row).advantages)(x)
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return
    assert_same_bits(got, expected)


def test_func_grad_sees_constants():
    x = torch.randn(4, 3)
    gradient = torch.func.grad(lambda w: (combine(x).advantages * w).sum())(torch.ones(4))
    assert_same_bits(gradient, combine(x).advantages)
