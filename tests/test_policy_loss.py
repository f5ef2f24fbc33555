"""``policy_loss`` against the specification in float64 and by hand: shapes, dtypes, layouts, extreme ratios."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, surrounded
from compare import assert_same_bits
from doors import on_threads
from loss_cases import AGGREGATES, POLICY, SHAPES, VARIANTS, assert_computes, listed, make

from pama_ext import _C, combine, combine_, policy_loss, reference

each_door = pytest.mark.parametrize("door", POLICY.doors().values(), ids=POLICY.doors())


def test_by_hand():
    """Four tokens of which one is masked: free, clipped above, clipped below."""
    ratio = torch.tensor([[1.0, 2.0, 0.5, 7.0]])
    log_probs = ratio.log().requires_grad_()
    advantages = torch.tensor([[3.0, 1.0, -2.0, math.nan]])
    loss, metrics = policy_loss(log_probs, torch.zeros(1, 4), advantages, mask=torch.tensor([[1, 1, 1, 0]]))
    loss.backward()
    # -3, -1.2, 1.6
    assert loss.item() == pytest.approx(-2.6 / 3)
    assert log_probs.grad.tolist() == [[pytest.approx(-1.0), 0.0, 0.0, 0.0]]
    assert metrics.clip_fraction.item() == pytest.approx(2 / 3)
    assert metrics.clip_fraction_low.item() == pytest.approx(1 / 3)
    assert metrics.clip_fraction_dual.item() == 0
    assert metrics.ratio_mean.item() == pytest.approx(3.5 / 3)
    assert metrics.ratio_max.item() == pytest.approx(2.0)
    assert metrics.approx_kl.item() == pytest.approx(0.0, abs=1e-7)  # log 1, log 2 and log 1/2
    assert metrics[6:] == (None, None, None)


def test_aggregates_by_hand():
    """Rows of one and of three valid tokens and one without any; every token's loss is -1."""
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    zeros, ones = torch.zeros(3, 3), torch.ones(3, 3)
    advantages = ones * torch.tensor([[1.0], [2.0], [5.0]])
    expected = {"token-mean": 7 / 4, "token-sum": 7.0, "seq-mean-token-sum": 7 / 2, "seq-mean-token-mean": 3 / 2}
    for aggregate, value in expected.items():
        x = zeros.clone().requires_grad_()
        loss, _ = policy_loss(x, zeros, advantages, mask=mask, aggregate=aggregate)
        assert loss.item() == pytest.approx(-value)
        loss.backward()
        assert x.grad.sum().item() == pytest.approx(-value)
        divided, _ = policy_loss(x, zeros, advantages, mask=mask, aggregate=aggregate, normalizer=10)
        total = 3.0 if aggregate == "seq-mean-token-mean" else 7.0
        assert divided.item() == pytest.approx(-total / 10)


@each_door
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_shapes(shape, aggregate, variant, door):
    assert_computes(POLICY, door, make(shape, aggregate=aggregate, **variant))


@pytest.mark.parametrize("instructions", ["generic", "avx2", "avx512"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_instruction_set(shape, instructions):
    before = _C.cpu_instructions()
    if not _C.use_cpu_instructions(instructions):
        pytest.skip(f"this machine has no {instructions}")
    try:
        for dtype in (torch.float32, torch.float64):
            for variant in VARIANTS.values():
                assert_computes(POLICY, policy_loss, make(shape, dtype, **variant))
            assert_computes(POLICY, policy_loss, make(shape, dtype, objectives=3, weights=[0.5, 2.0, 0.25]))
    finally:
        _C.use_cpu_instructions(before)


@each_door
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_dtypes(dtype, other, door):
    for variant in (*VARIANTS.values(), {"objectives": 3}, {"objectives": 16}):
        arguments = make((3, 50), dtype, **variant)
        for name in ("old_log_probs", "advantages", "objective_advantages", "ref_log_probs"):
            if name in arguments:
                arguments[name] = arguments[name].to(other)
        assert_computes(POLICY, door, arguments)


@each_door
@pytest.mark.parametrize("form", ["dense", "slice", "transposed", "unaligned", "expanded"])
def test_layouts(form, door):
    def laid(x):
        if form == "slice":
            return surrounded(x)
        if form == "transposed":
            return x.t().contiguous().t() if x.dim() == 2 else x
        if form == "unaligned":
            return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
        return x[:1].expand_as(x) if form == "expanded" else x

    for aggregate in AGGREGATES:
        arguments = make((5, 70), aggregate=aggregate, ref=True, kl_coef=0.1)
        names = ("log_probs", "old_log_probs", "advantages", "ref_log_probs", "mask")
        assert_computes(POLICY, door, {**arguments, **{name: laid(arguments[name]) for name in names}})


@each_door
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_an_advantage_for_each_row(shape, aggregate, door):
    arguments = make(shape, by_row=True, aggregate=aggregate)
    assert_computes(POLICY, door, arguments)
    spread = {**arguments, "advantages": arguments["advantages"].unsqueeze(1).expand(shape)}
    assert_same_bits(door(**arguments)[0].detach(), door(**spread)[0].detach())


@each_door
@pytest.mark.parametrize("form", ["tensor", "slice", "list", "tuple", "dict"])
@pytest.mark.parametrize("by_row", [False, True], ids=["tokens", "rows"])
@pytest.mark.parametrize("n", [1, 3, 64])
def test_objectives(n, by_row, form, door):
    for aggregate in AGGREGATES:
        arguments = make((4, 130), objectives=n, by_row=by_row, aggregate=aggregate)
        columns = arguments["objective_advantages"].unbind(-1)
        forms = {"slice": surrounded(arguments["objective_advantages"]), "list": list(columns), "tuple": tuple(columns),
                 "dict": {f"r{i}": c for i, c in enumerate(columns)}}  # fmt: skip
        arguments["objective_advantages"] = forms.get(form, arguments["objective_advantages"])
        arguments["weights"] = [0.5 ** (i % 3) for i in range(n)]
        assert_computes(POLICY, door, arguments)
        assert_computes(POLICY, door, {**arguments, "weights": torch.tensor(arguments["weights"]).repeat(2)[n:]})
        del arguments["weights"]
        assert_computes(POLICY, door, {**arguments, "dual_clip": 2.0})
        assert_computes(POLICY, door, {**arguments, "max_weight": 2.0, "kl_coef": 0.1,
                                       "ref_log_probs": arguments["log_probs"] / 2})  # fmt: skip


def test_combination_and_its_parts_give_the_same_loss():
    """What ``combine`` returns, its weights on the clamped advantages, and what ``combine_`` leaves."""
    arguments = make((6, 40))
    advantages = torch.randn(6, 40, 3)
    balanced = combine(advantages, mask=arguments["mask"])
    common = {k: arguments[k] for k in ("log_probs", "old_log_probs", "mask")}
    expected, _ = policy_loss(advantages=balanced.advantages, **common)
    by_weights, one = policy_loss(objective_advantages=advantages.clamp(min=0), weights=balanced.weights, **common)
    shares = advantages.clone()
    combine_(shares, mask=arguments["mask"])
    in_place, two = policy_loss(objective_advantages=shares, **common)
    for loss in (by_weights, in_place):
        torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(one.objective_gradient_share, two.objective_gradient_share)
    assert one.objective_gradient_share.sum().item() == pytest.approx(1.0)


def test_an_objective_of_weight_0_is_not_looked_at():
    arguments = make((3, 20), objectives=2, weights=[1.0, 0.0])
    expected = POLICY.run(policy_loss, arguments)
    arguments["objective_advantages"][..., 1] = math.nan
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    assert_same_bits(loss, expected[0])
    assert_same_bits(gradient, expected[2][0])
    assert metrics.objective_gradient_share.tolist() == [1.0, 0.0]


@each_door
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("apart", [math.inf, -math.inf, 1e4, -1e4, 20.0, -20.0, 20.5, -20.5, 87.0, 89.0])
def test_extreme_ratios(apart, variant, door):
    """The difference is held within +-20: finite losses, and gradient 0 beyond (but for a truncated weight)."""
    arguments = make((2, 40), mask=None, **variant)
    arguments["old_log_probs"][:, ::3] = arguments["log_probs"][:, ::3] - apart
    assert_computes(POLICY, door, arguments)
    loss, _, (gradient,) = POLICY.run(door, arguments)
    assert loss.isfinite() and gradient.isfinite().all()


@each_door
def test_an_infinite_reference(door):
    for value in (math.inf, -math.inf):
        arguments = make((2, 40), ref=True, kl_coef=0.5)
        arguments["ref_log_probs"][:, ::3] = value
        assert_computes(POLICY, door, arguments)


@each_door
@pytest.mark.parametrize("name", ["log_probs", "old_log_probs", "advantages"])
def test_a_valid_nan_is_not_hidden(name, door):
    """Nor does it reach the gradient of another token."""
    arguments = make((2, 40), mask=None)
    _, _, (expected,) = POLICY.run(door, arguments)
    arguments[name][1, 7] = math.nan
    loss, metrics, (gradient,) = POLICY.run(door, arguments)
    assert loss.isnan()
    assert name == "advantages" or metrics.ratio_mean.isnan()
    gradient[1, 7] = expected[1, 7] = 0
    assert_same_bits(gradient, expected)


@each_door
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_nothing_valid(aggregate, variant, door):
    """Loss, gradient and metrics are 0, whatever stands there."""
    mask = torch.zeros(4, 30, dtype=torch.bool)
    for normalizer in (None, 5, 0):
        arguments = make((4, 30), mask=mask, aggregate=aggregate, normalizer=normalizer, objectives=2, **variant)
        for name in ("log_probs", "old_log_probs", "objective_advantages", "ref_log_probs"):
            if name in arguments:
                arguments[name].fill_(math.nan)
        loss, metrics, (gradient,) = POLICY.run(door, arguments)
        assert_same_bits(loss.abs(), torch.zeros(()))
        assert_same_bits(gradient.abs(), torch.zeros(4, 30))
        assert all((x == 0).all() for x in metrics if x is not None)


@each_door
@pytest.mark.parametrize("kind", [*DTYPES, torch.int32, torch.int64, torch.uint32], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
def test_a_normalizer_on_the_device(shape, kind, door):
    for aggregate in AGGREGATES:
        arguments = make((3, 20), aggregate=aggregate)
        expected = POLICY.run(door, {**arguments, "normalizer": 48})
        got = POLICY.run(door, {**arguments, "normalizer": torch.full(shape, 48).to(kind)})
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[2][0], expected[2][0])


def test_micro_batches_add_up_to_the_batch():
    """With the token count of the whole batch as normalizer, however it is cut."""
    arguments = make((8, 60))
    whole, _, (expected,) = POLICY.run(policy_loss, arguments)
    count = arguments["mask"].sum()
    leaf = arguments["log_probs"].clone().requires_grad_()
    total = 0.0
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part = {k: arguments[k][rows] for k in ("old_log_probs", "advantages", "mask")}
        loss, _ = policy_loss(leaf[rows], **part, normalizer=count)
        loss.backward()
        total += loss.item()
    assert total == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(leaf.grad, expected)


def test_the_gradient_of_halves_does_not_vanish():
    """A mean over a million tokens has derivatives below float16's smallest number; what is kept is that of the sum."""
    x = torch.zeros(1024, 1024, dtype=torch.float16, requires_grad=True)
    loss, _ = policy_loss(x, torch.zeros_like(x), torch.full((1024,), 1 / 32, dtype=torch.float16))
    (loss * 65536).backward()  # as a gradient scaler does
    torch.testing.assert_close(x.grad, torch.full_like(x, -1 / 512))


@each_door
def test_the_gradient_of_halves_stays_finite(door):
    """u A beyond what float16 holds is held at its largest number, in what is kept."""
    arguments = make((1, 8), torch.float16, mask=None)
    arguments["old_log_probs"] = torch.zeros(1, 8, dtype=torch.float16)
    arguments["log_probs"] = torch.full((1, 8), 12.0, dtype=torch.float16)
    for sign in (1.0, -1.0):
        arguments["advantages"] = torch.full((1, 8), -sign, dtype=torch.float16)
        _, _, (gradient,) = POLICY.run(door, {**arguments, "clip_high": 1e9})
        assert (gradient == sign * 65504 / 8).all()
    arguments["advantages"][0, 3] = math.nan
    assert POLICY.run(door, arguments)[2][0][0, 3].isnan()


@each_door
@pytest.mark.parametrize("bound", [1e-10, 1e-8, 1e8, 1e10])
def test_a_weight_bounded_beyond_the_limit_of_ratios(bound, door):
    """exp(-20) is 2e-9, and exp(20) 5e8."""
    arguments = make((2, 40), mask=None, max_weight=bound)
    for apart in (30.0, -30.0, math.inf, -math.inf, 19.5, -19.5):
        arguments["old_log_probs"] = arguments["log_probs"] - apart
        assert_computes(POLICY, door, arguments)


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("shape", [(64, 1024), (3, 40000)], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, aggregate):
    arguments, results = make(shape, aggregate=aggregate, objectives=2, ref=True), []
    for count in (1, 2, 1, 2):
        loss, metrics, (gradient,) = on_threads(count, lambda: POLICY.run(policy_loss, arguments))
        results.append([loss, gradient, *(x for x in metrics if x is not None)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_same_bits(a, b)


def test_exp_is_accurate():
    """ratio_mean of single tokens against exp in float64, over the whole range, in each instruction set."""
    before = _C.cpu_instructions()
    x = torch.linspace(-20, 20, 20001, dtype=torch.float64)
    x = torch.cat([x, torch.tensor([math.log(2) / 2 * k for k in range(-57, 58)], dtype=torch.float64)])
    try:
        for name in ("generic", "avx2", "avx512"):
            if not _C.use_cpu_instructions(name):
                continue
            for dtype in (torch.float32, torch.float64):
                log_probs = x.to(dtype).unsqueeze(1).requires_grad_()
                options = {"clip_low": 1.0, "clip_high": 1e9, "aggregate": "token-sum"}
                loss, _ = policy_loss(
                    log_probs, torch.zeros_like(log_probs), torch.ones(len(x), dtype=dtype), **options
                )
                loss.backward()
                u, truth = -log_probs.grad[:, 0].double(), log_probs.detach()[:, 0].double().exp()
                assert ((u - truth).abs() / truth).max() < 1.5 * torch.finfo(dtype).eps
    finally:
        _C.use_cpu_instructions(before)


def test_small_divergences_keep_their_digits():
    """k3 of nearly equal log-probabilities is d^2 / 2, far below the rounding of exp(d)."""
    log_probs = torch.zeros(4, 50)
    for d in (1e-3, 1e-5):
        _, metrics = policy_loss(log_probs, log_probs, torch.ones(4), ref_log_probs=torch.full((4, 50), d))
        exact = math.expm1(d) - d
        assert metrics.ref_kl.item() == pytest.approx(exact, rel=1e-2 if d < 1e-4 else 1e-5)
        assert metrics.ref_kl.item() > 0


@pytest.mark.parametrize("broken", ["sign", "clip", "mask", "weight"])
def test_the_judge_sees_a_wrong_loss(broken):
    arguments = make((4, 60))

    def wrong(**given):
        if broken == "sign":
            given["advantages"] = given["advantages"] * (1 + 1e-4)
        elif broken == "clip":
            given["clip_high"] = 0.2001
        elif broken == "mask":
            given["mask"] = given["mask"].clone()
            given["mask"][2, 30] ^= True
        else:
            given["normalizer"] = float(given["mask"].sum()) + 0.01
        return policy_loss(**given)

    with pytest.raises(AssertionError):
        assert_computes(POLICY, wrong, arguments)


def test_the_specification_takes_what_the_function_takes():
    arguments = make((2, 5), objectives=2)
    assert listed(arguments["objective_advantages"])
    loss, metrics = reference.policy_loss(**arguments)
    assert loss.shape == () and metrics.objective_clip_fraction.shape == (2,)
