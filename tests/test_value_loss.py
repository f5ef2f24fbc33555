"""``value_loss`` against the specification in float64 and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, surrounded
from compare import assert_same_bits
from doors import on_threads
from loss_cases import AGGREGATES, SHAPES, VALUE, assert_computes, make_values

from pama_ext import _C, gae, value_loss

each_door = pytest.mark.parametrize("door", VALUE.doors().values(), ids=VALUE.doors())
HEADS = [1, 2, 3, 4, 5, 8, 64]


def test_by_hand():
    """Two heads, three tokens of which one is masked: free, and the clipped value further away."""
    values = torch.tensor([[[1.0, 2.0], [math.nan, 0.0], [0.5, 0.0]]], requires_grad=True)
    old = torch.tensor([[[1.0, 1.0], [0.0, 0.0], [0.5, 0.0]]])
    returns = torch.tensor([[[3.0, 3.0], [0.0, 0.0], [0.0, 2.0]]])
    loss, metrics = value_loss(values, old, returns, mask=torch.tensor([[1, 0, 1]]), clip=0.5)
    loss.backward()
    # head 0: 2, 1/8; head 1: the value 2 is held at 1.5, which is 1.5 from 3, half its square 9/8; then 2.
    assert metrics.losses.tolist() == [pytest.approx(17 / 16), pytest.approx(25 / 16)]
    assert loss.item() == pytest.approx(42 / 16)
    assert values.grad.tolist() == [[[-1.0, 0.0], [0.0, 0.0], [0.25, -1.0]]]
    assert metrics.clip_fraction.tolist() == [0.0, 0.5]
    assert metrics.value_mean.tolist() == [0.75, 1.0]


@each_door
@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, aggregate, clip, door):
    for heads in ((), (3,)):
        assert_computes(
            VALUE, door, make_values((*shape, *heads), aggregate=aggregate, clip=clip, normalizer=clip and 9)
        )


@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("n", HEADS)
def test_every_instruction_set(n, instructions):
    before = _C.cpu_instructions()
    if not _C.use_cpu_instructions(instructions):
        pytest.skip(f"this machine has no {instructions}")
    try:
        for dtype in DTYPES:
            assert_computes(VALUE, value_loss, make_values((5, 131, n), dtype))
    finally:
        _C.use_cpu_instructions(before)


@each_door
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_dtypes(dtype, other, door):
    arguments = make_values((3, 50, 3), dtype)
    for name in ("old_values", "returns"):
        arguments[name] = arguments[name].to(other)
    assert_computes(VALUE, door, arguments)


@each_door
@pytest.mark.parametrize("n", HEADS)
@pytest.mark.parametrize("form", ["tensor", "slice", "first", "list", "tuple", "dict"])
def test_forms(form, n, door):
    """Objectives anywhere in memory, and each argument in a form of its own."""
    for aggregate in AGGREGATES:
        arguments = make_values((4, 70, n), aggregate=aggregate)
        plain = dict(arguments)
        for name in ("values", "old_values", "returns"):
            x = arguments[name]
            columns = [column.clone() for column in x.unbind(-1)]
            forms = {"slice": surrounded(x), "first": x.movedim(-1, 0).contiguous().movedim(0, -1), "list": columns,
                     "tuple": tuple(columns), "dict": {f"r{i}": c for i, c in enumerate(columns)}}  # fmt: skip
            arguments[name] = forms.get(form, x)
        assert_computes(VALUE, door, arguments)
        assert_computes(VALUE, door, {**arguments, "returns": plain["returns"]})
        assert_computes(VALUE, door, {**plain, "returns": arguments["returns"]})


def test_keys_in_another_order():
    values = {"a": torch.randn(3, 8), "b": torch.randn(3, 8)}
    returns = {"b": torch.randn(3, 8), "a": torch.randn(3, 8)}
    loss, metrics = value_loss(values, None, returns)
    expected, other = value_loss([values["a"], values["b"]], None, [returns["a"], returns["b"]])
    assert_same_bits(loss, expected)
    assert_same_bits(metrics.losses, other.losses)


@each_door
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_nothing_valid(aggregate, door):
    arguments = make_values((4, 30, 2), mask=torch.zeros(4, 30), aggregate=aggregate)
    for name in ("values", "old_values", "returns"):
        arguments[name].fill_(math.nan)
    loss, metrics, (gradient,) = VALUE.run(door, arguments)
    assert_same_bits(loss.abs(), torch.zeros(()))
    assert_same_bits(gradient.abs(), torch.zeros(4, 30, 2))
    assert all((x == 0).all() for x in metrics)


@each_door
def test_a_head_gets_what_it_would_get_alone(door):
    arguments = make_values((4, 50, 3))
    _, metrics, (gradient,) = VALUE.run(door, arguments)
    for i in range(3):
        alone = {k: arguments[k][..., i] for k in ("values", "old_values", "returns")}
        loss, _, (own,) = VALUE.run(door, {**arguments, **alone})
        torch.testing.assert_close(loss, metrics.losses[i])
        assert_same_bits(own, gradient[..., i])


@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
def test_it_takes_the_returns_of_gae_as_they_are(form):
    torch.manual_seed(0)
    heads = torch.randn(4, 30, 3)
    columns = {f"r{i}": c.clone().requires_grad_() for i, c in enumerate(heads.unbind(-1))}
    values = {"tensor": heads.requires_grad_(), "list": list(columns.values()), "dict": columns}[form]
    scores = torch.randn(4, 3)
    named = dict(zip(columns, scores.unbind(-1), strict=True))
    rewards = {"tensor": scores, "list": list(named.values()), "dict": named}[form]
    _, returns = gae(rewards, values, lam=0.9)
    loss, _ = value_loss(values, None, returns)
    loss.backward()
    total = sum(x.grad.abs().sum() for x in (columns.values() if form != "tensor" else [values]))
    assert total > 0


@pytest.mark.parametrize("shape", [(64, 700, 3), (3, 40000, 2)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape):
    arguments, results = make_values(shape), []
    for count in (1, 2, 1, 2):
        loss, metrics, (gradient,) = on_threads(count, lambda: VALUE.run(value_loss, arguments))
        results.append([loss, gradient, *metrics])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("broken", ["clip", "returns", "mask"])
def test_the_judge_sees_a_wrong_loss(broken):
    def wrong(**given):
        if broken == "clip":
            given["clip"] = 0.2001
        elif broken == "returns":
            given["returns"] = given["returns"] + 1e-4
        else:
            given["mask"] = given["mask"].clone()
            given["mask"][2, 30] ^= True
        return value_loss(**given)

    with pytest.raises(AssertionError):
        assert_computes(VALUE, wrong, make_values((4, 60, 2)))
