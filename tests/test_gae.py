"""``gae`` against the sequential recursion in float64, against verl's released code, and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES
from compare import assert_same_bits
from doors import on_threads
from gae_cases import DOORS, SHAPES, assert_computes, call, lay_out, listed, make, wide
from released import installed, verl_gae

from pama_ext import _C, combine, gae, reference

each_door = pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)


def test_by_hand():
    """Two value heads, four tokens of which one is skipped."""
    rewards = torch.tensor([[[1.0, 0.0], [9.0, 9.0], [2.0, 0.0], [0.0, 4.0]]])
    values = torch.tensor([[[0.5, 1.0], [7.0, 7.0], [1.0, 1.0], [2.0, 0.0]]])
    advantages, returns = gae(rewards, values, mask=torch.tensor([[1, 0, 1, 1]]), gamma=0.5, lam=[1.0, 0.0])
    # head 0: -2; 2 + 0.5 * 2 - 1 + 0.5 * -2 = 1; 1 + 0.5 * 1 - 0.5 + 0.5 * 1 = 1.5
    # head 1: 4; 0 + 0 - 1 = -1; 0 + 0.5 * 1 - 1 = -0.5
    assert advantages.tolist() == [[[1.5, -0.5], [0.0, 0.0], [1.0, -1.0], [-2.0, 4.0]]]
    assert returns.tolist() == [[[2.0, 0.5], [0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]]


@each_door
def test_it_is_the_discounted_sum_of_temporal_differences(door):
    """A(t) = sum over l of (gamma lam)^l delta(t + l), over rows of several lengths, in float64."""
    gamma, lam = 0.9, 0.8
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 7, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([7, 1, 4, 6])
    mask = torch.arange(7) < lengths[:, None]
    advantages, returns = door(rewards, values, mask=mask, gamma=gamma, lam=lam)
    expected = torch.zeros_like(advantages)
    for b, length in enumerate(lengths.tolist()):
        for t in range(length):
            for later in range(t, length):
                following = values[b, later + 1] if later + 1 < length else 0.0
                delta = rewards[b, later] + gamma * following - values[b, later]
                expected[b, t] += (gamma * lam) ** (later - t) * delta
    torch.testing.assert_close(advantages, expected)
    torch.testing.assert_close(returns, expected + values * mask[..., None])


@each_door
@pytest.mark.parametrize("outcome", [False, True], ids=["token rewards", "scores"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, outcome, door):
    arguments = make(shape, outcome=outcome)
    assert_computes(call(door, arguments), arguments)
    plain = {"rewards": arguments["rewards"], "values": arguments["values"]}
    assert_computes(call(door, plain), plain)


@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(shape, instructions):
    before = _C.cpu_instructions()
    if not _C.use_cpu_instructions(instructions):
        pytest.skip(f"this machine has no {instructions}")
    try:
        for dtype in (torch.float32, torch.float64):
            for options in ({}, {"mask": None, "kl_penalty": None}):
                arguments = make(shape, dtype, **options)
                assert_computes(call(gae, arguments), arguments)
    finally:
        _C.use_cpu_instructions(before)


@each_door
@pytest.mark.parametrize("value_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reward_dtype", DTYPES, ids=str)
def test_dtypes_promote(reward_dtype, value_dtype, door):
    arguments = make((3, 50, 3), reward_dtype)
    arguments["values"] = arguments["values"].to(value_dtype)
    if {reward_dtype, value_dtype} == {torch.float16, torch.bfloat16}:
        door = gae  # neither has the dtype of the result, which the eager door leaves to the other
    result = call(door, arguments)
    assert result[0].dtype == result[1].dtype == torch.promote_types(reward_dtype, value_dtype)
    assert_computes(result, arguments)


@each_door
@pytest.mark.parametrize("outcome", [False, True], ids=["token rewards", "scores"])
@pytest.mark.parametrize("form", ["tensor", "slice", "list", "tuple", "dict"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_layouts(dim, form, outcome, door):
    arguments = make((4, 70, 3), outcome=outcome)
    expected = call(reference.gae, wide(arguments))
    laid = {**arguments, "dim": dim}
    for name in ("rewards", "values", "bootstrap"):
        laid[name] = lay_out(arguments[name], form, dim, 2)
    result = call(door, laid)
    assert_computes(result, laid)
    for ours, truth in zip(result, expected, strict=True):
        columns = ours.unbind(dim) if form in ("tensor", "slice") else listed(ours)
        assert torch.stack(list(columns), -1).sub(truth).abs().max() < 1e-5
        assert all(c.is_contiguous() for c in listed(ours))


@each_door
@pytest.mark.parametrize("packed", [[], [0], [1], [0, 1, 0, 0, 5, 1, 600, 0], [300] * 9, [70000]], ids=str)
@pytest.mark.parametrize("outcome", [False, True], ids=["token rewards", "scores"])
@pytest.mark.parametrize("kind", [torch.int32, torch.int64], ids=str)
def test_packed(kind, outcome, packed, door):
    arguments = make((sum(packed), 3), packed=packed, outcome=outcome)
    arguments["offsets"] = arguments["offsets"].to(kind)
    assert_computes(call(door, arguments), arguments)


def test_packed_rows_of_the_shape_of_values_are_token_rewards():
    """Two sequences of two tokens in all: per-token rewards and scores look the same."""
    rewards, values = torch.tensor([[1.0], [2.0]]), torch.zeros(2, 1)
    advantages, _ = gae(rewards, values, offsets=torch.tensor([0, 0, 2]), lam=1.0)
    assert advantages.tolist() == [[3.0], [2.0]]


@each_door
def test_offsets_of_any_stride(door):
    arguments = make((50, 2), packed=[20, 30])
    spread = torch.stack([arguments["offsets"], torch.full((3,), -7)], 1)[:, 0]
    expected = call(door, arguments)
    for a, b in zip(call(door, {**arguments, "offsets": spread}), expected, strict=True):
        assert_same_bits(a, b)


@each_door
def test_all_masked(door):
    arguments = make((4, 30, 3), mask=torch.zeros(4, 30, dtype=torch.bool))
    for name in ("rewards", "values", "kl_penalty"):
        arguments[name].fill_(torch.nan)
    for result in call(door, arguments):
        assert_same_bits(result, torch.zeros(4, 30, 3))


@each_door
@pytest.mark.parametrize(
    "pattern", ["prefix", "suffix", "alternating", "one row", "last token", "first token", "turns"]
)
def test_masks(pattern, door):
    mask = torch.zeros(5, 700)
    if pattern == "prefix":
        mask[torch.arange(700).expand(5, 700) < torch.tensor([[0], [1], [15], [512], [700]])] = 1
    elif pattern == "suffix":
        mask[torch.arange(700).expand(5, 700) >= torch.tensor([[0], [1], [15], [512], [699]])] = 1
    elif pattern == "alternating":
        mask[:, ::2] = 1
    elif pattern == "one row":
        mask[3] = 1
    elif pattern == "turns":
        mask[:, 10:90] = mask[:, 300:333] = mask[:, 650:] = 1
    else:
        mask[:, -1 if pattern == "last token" else 0] = 1
    for outcome in (False, True):
        arguments = make((5, 700, 3), outcome=outcome, mask=mask)
        for name in ("values", "kl_penalty") if outcome else ("rewards", "values", "kl_penalty"):
            arguments[name][mask == 0] = torch.nan
        assert_computes(call(door, arguments), arguments)


@each_door
@pytest.mark.parametrize("lam", [0.0, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 70, 1), (3, 70, 3), (2, 40, 9)], ids=str)
def test_extreme_discounts(shape, gamma, lam, door):
    arguments = make(shape, gamma=gamma, lam=lam)
    assert_computes(call(door, arguments), arguments)


def test_discounts_as_numbers_or_as_a_tensor():
    arguments = make((3, 40, 3), gamma=[0.9, 0.5, 1.0], lam=[0.25, 0.75, 1.0])
    expected = call(gae, arguments)
    for kind in (torch.float64, torch.float32):
        spread = {
            k: torch.tensor([x for v in arguments[k] for x in (v, -1)], dtype=kind)[::2] for k in ("gamma", "lam")
        }
        for a, b in zip(call(gae, arguments | spread), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    same = (
        call(gae, make((3, 40, 3), gamma=0.5, lam=0.25)),
        call(gae, make((3, 40, 3), gamma=[0.5] * 3, lam=(0.25,) * 3)),
    )
    for a, b in zip(*same, strict=True):
        assert_same_bits(a, b)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_error_does_not_grow_with_length(n, offset):
    """At most four times as wrong as the sequential float32 loop over 32768 tokens, values far from 0 included."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 32768, n, generator=g), torch.randn(2, 32768, n, generator=g) + offset
    for gamma, lam in ((1.0, 0.95), (0.999, 1.0), (1.0, 1.0)):
        exact = reference.gae(rewards.double(), values.double(), gamma=gamma, lam=lam)
        loop, ours = (f(rewards, values, gamma=gamma, lam=lam) for f in (reference.gae, gae))
        for a, b, truth in zip(ours, loop, exact, strict=True):
            assert (a - truth).abs().max() <= 4 * (b - truth).abs().max()
            assert (a - truth).square().mean() <= 16 * (b - truth).square().mean()


@pytest.mark.parametrize("lengths", ["one", "ragged", "turns"])
@installed("verl")
def test_verl(lengths):
    """verl 0.9.1 before its whitening, at valid tokens; at the others it repeats what comes after."""
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(6, 90, 3, generator=g), torch.randn(6, 90, 3, generator=g)
    mask = torch.ones(6, 90)
    if lengths == "ragged":
        mask = (torch.arange(90) < torch.tensor([[1], [2], [40], [89], [90], [64]])).float()
    if lengths == "turns":
        mask = (torch.rand(6, 90, generator=g) < 0.6).float()
    ours = gae(rewards, values, mask=mask, gamma=0.99, lam=0.9)
    for i in range(3):
        exact = verl_gae(rewards[..., i].double(), values[..., i].double(), mask.double(), 0.99, 0.9)
        theirs = verl_gae(rewards[..., i], values[..., i], mask, 0.99, 0.9)
        for a, b, truth in zip(ours, theirs, exact, strict=True):
            error, loop = ((x - truth)[mask > 0].abs().max() for x in (a[..., i], b))
            assert error <= 4 * loop


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shape", [(64, 700, 3), (3, 40000, 2)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, count):
    arguments = make(shape)
    expected = call(gae, arguments)
    for _ in range(3):
        for a, b in zip(on_threads(count, lambda: call(gae, arguments)), expected, strict=True):
            assert_same_bits(a, b)


@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
def test_combine_takes_the_advantages_as_they_are(form):
    arguments = make((8, 60, 3), mask=None)
    for name in ("rewards", "values", "bootstrap"):
        arguments[name] = lay_out(arguments[name], form, 2, 2)
    advantages, _ = call(gae, arguments)
    result = combine(advantages)
    truth = reference.combine(call(reference.gae, wide(arguments))[0])
    torch.testing.assert_close(result.advantages.double(), truth.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.weights.double(), truth.weights, rtol=1e-4, atol=1e-5)
    assert result.names == (("r0", "r1", "r2") if form == "dict" else None)


def test_a_value_that_is_not_finite_spreads_backwards_only():
    """To the tokens before it, of its own sequence and objective."""
    places = [((4, 60, 3), (2, 33, 1)), ((4, 60, 9), (1, 5, 8)), ((3, 1500, 1), (1, 700, 0))]
    # Next to the end of the sequence before, in the same vector and in the next one.
    places += [((5, 9, n), (row, token, n - 1)) for n in (1, 2, 3, 8) for row in (1, 3) for token in (0, 1, 8)]
    for shape, at in places:
        arguments = make(shape, mask=None, kl_penalty=None, gamma=0.9, lam=0.9)
        expected = call(gae, arguments)
        for bad in (math.nan, math.inf):
            for name in ("rewards", "values"):
                broken = {**arguments, name: arguments[name].clone()}
                broken[name][at] = bad
                row, token, objective = at
                for a, b in zip(call(gae, broken), expected, strict=True):
                    assert not a[row, : token + 1, objective].isfinite().any()
                    hidden = torch.zeros(shape, dtype=torch.bool)
                    hidden[row, : token + 1, objective] = True
                    assert_same_bits(a.masked_fill(hidden, 0), b.masked_fill(hidden, 0))


@each_door
@pytest.mark.parametrize("packed", [None, [30, 0, 40]], ids=["dense", "packed"])
@pytest.mark.parametrize("form", ["tensor", "list", "dict"])
@pytest.mark.parametrize("others", ["tensor", "list"])
def test_each_argument_has_a_form_of_its_own(others, form, packed, door):
    """Rewards and bootstrap values as a tensor beside value heads in a list, and the other way round."""
    time = 1 if packed else 2
    for outcome in (False, True):
        arguments = make((70, 3) if packed else (4, 70, 3), packed=packed, outcome=outcome)
        expected = call(reference.gae, wide(arguments))
        arguments["values"] = lay_out(arguments["values"], form, time, time)
        arguments["rewards"] = lay_out(arguments["rewards"], others, time, time)
        arguments["bootstrap"] = lay_out(arguments["bootstrap"], others, time, time)
        result = call(door, arguments)
        assert_computes(result, arguments)
        for ours, truth in zip(result, expected, strict=True):
            columns = ours.unbind(-1) if form == "tensor" else listed(ours)
            torch.testing.assert_close(torch.stack(list(columns), -1).double(), truth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", [1, True, torch.tensor(1.0), "1", None], ids=repr)
def test_what_a_discount_may_be(number):
    """An int is a number; a bool, a tensor of no dimension, a text and nothing are none."""
    rewards = torch.randn(3, 8, 2)
    if number == 1 and type(number) is int:
        for a, b in zip(gae(rewards, rewards, gamma=1, lam=1), gae(rewards, rewards, gamma=1.0, lam=1.0), strict=True):
            assert_same_bits(a, b)
        return
    for name in ("gamma", "lam"):
        with pytest.raises((TypeError, ValueError), match=name):
            gae(rewards, rewards, **{name: number})
