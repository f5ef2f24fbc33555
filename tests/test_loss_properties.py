"""What holds for every call of the losses: the specification through both doors, and invariances of the formulas."""

from __future__ import annotations

import math

import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import AGGREGATES, POLICY, VALUE, assert_computes, make, make_values, policy_calls, value_calls

from pama_ext import policy_loss

seeds = st.integers(0, 2**20)
aggregates = st.sampled_from(AGGREGATES)
variants = st.sampled_from([{}, {"dual_clip": 3.0}, {"max_weight": 2.0}, {"ref": True, "kl_coef": 0.25}])


@given(policy_calls())
def test_policy_loss_computes_the_specification(arguments):
    for door in POLICY.doors().values():
        assert_computes(POLICY, door, arguments)
    assert_same_doors(POLICY, arguments)


@given(value_calls())
def test_value_loss_computes_the_specification(arguments):
    for door in VALUE.doors().values():
        assert_computes(VALUE, door, arguments)
    assert_same_doors(VALUE, arguments)


def assert_same_doors(loss, arguments) -> None:
    """The same bits, of gradients before they are scaled by anything but 1."""
    (a, metrics, _), (b, others, _) = (loss.run(door, arguments) for door in (*loss.doors().values(), loss.public)[:2])
    assert_same_bits(a, b)
    for x, y in zip(metrics, others, strict=True):
        if x is not None:
            assert_same_bits(x, y)


def close(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@given(seeds, aggregates, variants, st.integers(1, 5), st.integers(1, 30))
def test_masked_tokens_change_nothing(seed, aggregate, variant, rows, more):
    """However many stand behind a row, and whole rows of them."""
    arguments = make((rows, 20), seed=seed, aggregate=aggregate, **variant)
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    padded = dict(arguments)
    for name, x in arguments.items():
        if isinstance(x, torch.Tensor):
            fill = 0 if name == "mask" else math.nan
            padded[name] = torch.nn.functional.pad(x.float(), (0, more, 0, 2), value=fill)
    other, others, (padded_gradient,) = POLICY.run(policy_loss, padded)
    close([loss, gradient], [other, padded_gradient[:rows, :20]])
    assert (padded_gradient[:, 20:] == 0).all() and (padded_gradient[rows:] == 0).all()
    close([x for x in metrics if x is not None], [x for x in others if x is not None])


@given(seeds, aggregates, st.sampled_from([0.5, -3.0, 64.0]), st.integers(1, 5), st.integers(1, 40))
def test_a_shift_of_all_log_probs_changes_nothing(seed, aggregate, shift, rows, length):
    """Exactly, since shifting eighths rounds nothing; but the value under ``max_weight``, which has log_probs in it."""
    arguments = make((rows, length), seed=seed, aggregate=aggregate, ref=True, kl_coef=0.5)
    moved = {k: arguments[k] + shift for k in ("log_probs", "old_log_probs", "ref_log_probs")}
    expected, got = (POLICY.run(policy_loss, a) for a in (arguments, {**arguments, **moved}))
    for a, b in zip([got[0], *got[1][:7], *got[2]], [expected[0], *expected[1][:7], *expected[2]], strict=True):
        assert_same_bits(a, b)
    expected, got = (POLICY.run(policy_loss, {**a, "max_weight": 2.0}) for a in (arguments, {**arguments, **moved}))
    assert_same_bits(got[2][0], expected[2][0])


@given(seeds, aggregates, variants, st.booleans(), st.integers(1, 5), st.integers(1, 40))
def test_zero_advantages_give_zero(seed, aggregate, variant, by_row, rows, length):
    arguments = make((rows, length), seed=seed, aggregate=aggregate, by_row=by_row, **{**variant, "kl_coef": 0.0})
    arguments["advantages"] = torch.zeros_like(arguments["advantages"])
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    assert loss == 0
    assert (gradient == 0).all()
    assert "max_weight" in arguments or metrics.clip_fraction == 0


@given(seeds, aggregates, variants, st.sampled_from([0.5, 4.0, 2.0**-20]), st.integers(1, 5), st.integers(1, 40))
def test_it_is_homogeneous_in_the_advantages(seed, aggregate, variant, factor, rows, length):
    """To the bit, for powers of two: which is why an importance weight may be multiplied into them."""
    arguments = make((rows, length), seed=seed, aggregate=aggregate, **{**variant, "kl_coef": 0.0})
    loss, _, (gradient,) = POLICY.run(policy_loss, arguments)
    scaled, _, (scaled_gradient,) = POLICY.run(
        policy_loss, {**arguments, "advantages": factor * arguments["advantages"]}
    )
    assert_same_bits(scaled, factor * loss)
    assert_same_bits(scaled_gradient, factor * gradient)


@given(seeds, aggregates, st.integers(2, 6), st.integers(1, 40))
def test_the_order_of_rows_does_not_matter(seed, aggregate, rows, length):
    arguments = make((rows, length), seed=seed, aggregate=aggregate, dual_clip=2.0)
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    flipped = {k: x.flip(0) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()}
    other, others, (flipped_gradient,) = POLICY.run(policy_loss, flipped)
    close([loss, gradient, *metrics[:6]], [other, flipped_gradient.flip(0), *others[:6]])


@given(seeds, aggregates, st.permutations(range(4)), st.integers(1, 5), st.integers(1, 40))
def test_permuting_objectives_permutes_their_metrics(seed, aggregate, order, rows, length):
    weights = [0.5, 0.0, 1.0, 2.0]
    arguments = make((rows, length), seed=seed, aggregate=aggregate, objectives=4, weights=weights)
    permuted = {
        **arguments,
        "objective_advantages": arguments["objective_advantages"][..., list(order)],
        "weights": [weights[i] for i in order],
    }
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    other, others, (permuted_gradient,) = POLICY.run(policy_loss, permuted)
    close([loss, gradient], [other, permuted_gradient])
    close([x[list(order)] for x in metrics[7:]], others[7:])


@given(seeds, aggregates, st.integers(1, 5), st.integers(1, 40))
def test_shares_and_fractions_are_those_of_the_objectives_alone(seed, aggregate, rows, length):
    """Shares add up to 1; where signs agree, they are the shares of the gradient's own magnitude."""
    arguments = make((rows, length), seed=seed, aggregate=aggregate, objectives=3)
    arguments["objective_advantages"] = arguments["objective_advantages"].abs()
    _, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    shares = metrics.objective_gradient_share
    assert abs(shares.sum() - 1) < 1e-5 or (gradient == 0).all()
    for i in range(3):
        alone = {**arguments, "advantages": arguments["objective_advantages"][..., i]}
        del alone["objective_advantages"]
        _, own, (part,) = POLICY.run(policy_loss, alone)
        assert_same_bits(metrics.objective_clip_fraction[i], own.clip_fraction)
        if (gradient != 0).any():
            torch.testing.assert_close(shares[i], part.abs().sum() / gradient.abs().sum(), rtol=1e-4, atol=1e-5)


@given(seeds, aggregates, st.integers(1, 5), st.integers(1, 40))
def test_a_value_without_error_costs_nothing(seed, aggregate, rows, length):
    arguments = make_values((rows, length, 2), seed=seed, aggregate=aggregate)
    arguments["returns"] = arguments["values"].clone()
    loss, metrics, (gradient,) = VALUE.run(VALUE.public, {**arguments, "clip": None})
    assert loss == 0
    assert (gradient == 0).all() and (metrics.losses == 0).all()


@given(seeds, aggregates, st.integers(1, 5), st.integers(1, 40))
def test_a_wide_clip_is_none(seed, aggregate, rows, length):
    arguments = make_values((rows, length, 2), seed=seed, aggregate=aggregate, clip=100.0)
    with_clip, without = (VALUE.run(VALUE.public, {**arguments, "clip": clip}) for clip in (100.0, None))
    assert_same_bits(with_clip[0], without[0])
    assert_same_bits(with_clip[2][0], without[2][0])
    assert (with_clip[1].clip_fraction == 0).all()
