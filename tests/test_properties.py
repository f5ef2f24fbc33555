"""Invariances of the formula, on problems that hypothesis builds: what must hold whatever the input.

Most values are from a grid on which sums are exact (see ``cases.grid``): scalars then tie exactly or not at all, and
weights can be compared without excuses. Values in general position are compared where no scalars are nearly tied.
"""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LEVELS, SHAPES, Problem, grid, make, normal, problems
from compare import ROUNDINGS, assert_close, assert_same_bits, assert_same_result
from doors import DOORS, assert_matches, dispatcher, nearly_tied, on_threads, stacked
from hypothesis import assume, given
from hypothesis import strategies as st

from pama_ext import combine, combine_


def run(problem: Problem, function=combine):
    advantages, keywords = problem.call()
    return function(advantages, **keywords)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@given(problem=problems())
def test_doors_match_the_reference(door, device, problem):
    assert_matches(run(problem.to(device), door), problem)


@pytest.mark.parametrize("door", DOORS.values(), ids=DOORS)
@given(problem=problems())
def test_doors_match_the_reference_in_place(door, device, problem):
    advantages, keywords = problem.to(device).call()
    result = door(advantages, in_place=True, **keywords)
    assert result.advantages is advantages
    assert_matches(result, problem, in_place=True)


@given(problem=problems(values=normal, nan=["ignore"]))
def test_values_in_general_position_match_the_reference(device, problem):
    untied = problem.options["solver"] == "fixed" or not nearly_tied(problem)
    assert_matches(run(problem.to(device)), problem, weights=untied)


@pytest.mark.skipif(len(DOORS) < 2, reason="this torch has no DLPack exchange table")
@given(problem=problems(values=normal))
def test_doors_agree_bit_for_bit(device, problem):
    problem = problem.to(device)
    assert_same_result(*(run(problem, door) for door in DOORS.values()))
    ours, theirs = problem.call(), problem.call()
    results = [door(a, in_place=True, **k) for door, (a, k) in zip(DOORS.values(), (ours, theirs), strict=True)]
    assert_same_result(*results)
    for result in results:
        result_tensor = stacked(result.advantages, ours[1]["dim"])
        assert_same_bits(result_tensor, stacked(ours[0], ours[1]["dim"]))


@given(problem=problems(values=normal))
def test_same_input_same_bits(device, problem):
    problem = problem.to(device)
    first = run(problem)
    for _ in range(3):
        assert_same_result(run(problem), first)


def test_other_bits_of_the_input_are_other_bits_of_the_result(device):
    """The negative control of every comparison of bits: results are not constant."""
    problem = make((64, 3), draw=normal, mask=None, log_ratio=None, noon=False).to(device)
    changed = problem.values.clone()
    changed.view(torch.int32).bitwise_xor_(1)
    first, second = run(problem), run(problem.but(changed))
    for a, b in ((first.advantages, second.advantages), (first.stats.max, second.stats.max)):
        with pytest.raises(AssertionError, match="differ in bits"):
            assert_same_bits(a, b)


@given(problem=problems(values=normal, solvers=["closed_form"]), data=st.data())
def test_permuting_objectives_permutes_bits(device, problem, data):
    n = problem.values.shape[-1]
    order = torch.tensor(data.draw(st.permutations(range(n))))
    rewards = problem.options.get("reward_weights")
    rewards = None if rewards is None else torch.as_tensor(rewards)[order]
    permuted = problem.but(problem.values[..., order], reward_weights=rewards).to(device)
    result, other = run(problem.to(device)), run(permuted)
    order = order.to(device)
    assert_same_bits(other.weights, result.weights[..., order], "weights")
    assert_same_bits(other.value, result.value, "value")
    for name, a, b in zip(result.stats._fields, other.stats, result.stats, strict=True):
        assert_same_bits(a, b[order], name)


@given(problem=problems(solvers=["closed_form"], nan=["ignore"]), power=st.sampled_from([-2, -1, 1, 3]))
def test_scaling_by_a_power_of_two_scales_exactly(device, problem, power):
    result, scaled = run(problem.to(device)), run(problem.but(problem.values * 2.0**power).to(device))
    assert_same_bits(scaled.weights, result.weights, "weights")
    for name in ("mean", "std", "min", "max", "active_mean"):
        assert_same_bits(getattr(scaled.stats, name), getattr(result.stats, name) * 2.0**power, name)
    assert_same_bits(scaled.value, result.value * 2.0**power, "value")
    if problem.values.dtype != torch.float16:  # what cancels to almost 0 is subnormal there
        assert_same_bits(scaled.advantages, result.advantages * 2.0**power, "advantages")


@pytest.mark.parametrize("values", [grid, normal])
@given(data=st.data())
def test_duplicated_objectives_tie_exactly(device, values, data):
    problem = data.draw(problems(values=values, solvers=["closed_form"], nan=["ignore"]))
    n = problem.values.shape[-1]
    rewards = problem.options.get("reward_weights")
    rewards = None if rewards is None else torch.as_tensor(rewards).repeat(2)
    twice = problem.but(problem.values.repeat(*[1] * (problem.values.dim() - 1), 2), reward_weights=rewards)
    once, result = run(problem.to(device)), run(twice.to(device))
    assert_same_bits(result.weights[..., :n], result.weights[..., n:])
    if values is grid:  # exact sums; others depend on the size of a tile, and that on the number of objectives
        assert_same_bits(result.value, once.value)
        if problem.options["level"] != "token":  # there, halves of a sum are rounded sums of halves
            assert_same_bits(result.weights[..., :n], once.weights / 2)


@given(problem=problems(garbage=False))
def test_masking_is_removal(device, problem):
    assume(problem.options["level"] != "sequence")
    kept = problem.mask
    gates = problem.options.get("log_ratio")
    removed = problem.but(problem.values[kept], mask=None, log_ratio=None if gates is None else gates[kept])
    result = run(problem.to(device))
    inner = result._replace(advantages=result.advantages[kept.to(device)])
    assert_matches(inner, removed)
    assert not result.advantages[~kept.to(device)].any()


@given(problem=problems(nan=["ignore"], solvers=["closed_form"]), data=st.data())
def test_order_of_the_batch_does_not_matter(device, problem, data):
    order = torch.tensor(data.draw(st.permutations(range(problem.values.shape[0]))), dtype=torch.long)
    tensors = {k: problem.options[k][order] for k in ("mask", "log_ratio") if k in problem.options}
    other = problem.but(problem.values[order], **tensors)
    first, second = run(problem.to(device)), run(other.to(device))
    assert_matches(second, other)
    if problem.options["level"] == "batch":  # exact sums: not even rounding differs
        assert_same_bits(second.weights, first.weights)
        assert_same_bits(second.advantages, first.advantages[order.to(device)])


@given(problem=problems(values=normal, solvers=["closed_form"], nan=["ignore"], levels=["batch", "sequence"]))
def test_weights_are_on_the_simplex_and_attain_the_value(device, problem):
    result = run(problem.to(device))
    weights, value = result.weights.cpu().double(), result.value.cpu()
    assert (weights >= 0).all()
    assert_close(weights.sum(-1).to(value.dtype), torch.ones(value.shape, dtype=torch.float64))
    if problem.options["level"] == "batch":
        scalars = result.stats.active_mean.cpu()
        kept = result.stats.count.cpu() > 0
        if problem.options["skip_inactive"]:
            active = result.stats.clipped.cpu() < 1
            active &= torch.where(kept, scalars != 0, False)
            kept = active if active.any() else kept
        kept = kept if kept.any() else torch.ones_like(kept)
        low, high = scalars[kept].min(), scalars[kept].max()
        assert_same_bits(value, low if low > 0 else high if high < 0 else torch.zeros_like(low), "Theorem 1")
        assert not weights[~kept].any()
        attained = (weights * scalars.double()).sum()
        assert_close(value, attained, magnitude=(weights * scalars.double().abs()).sum(), what="sum of c_i a_i")


@given(problem=problems(values=normal), data=st.data())
def test_what_stands_behind_the_mask_has_no_influence(device, problem, data):
    assume("mask" in problem.options)
    hidden = ~problem.mask
    junk = data.draw(st.sampled_from([math.nan, math.inf, -math.inf, 1e4, 0.0]))
    values = torch.where(hidden.unsqueeze(-1), torch.tensor(junk, dtype=problem.values.dtype), problem.values)
    options = {}
    if "log_ratio" in problem.options:
        ratio = problem.options["log_ratio"]
        options["log_ratio"] = torch.where(hidden, torch.tensor(junk, dtype=ratio.dtype), ratio)
    result, other = run(problem.to(device)), run(problem.but(values, **options).to(device))
    assert_same_result(other, result)
    assert not other.advantages[hidden.to(device)].any()


@given(problem=problems(nan=["ignore"]))
def test_shares_sum_to_the_combination(device, problem):
    combined = run(problem.to(device)).advantages
    shares = stacked(run(problem.to(device), combine_).advantages, problem.call()[1]["dim"]).double()
    # Each share was rounded when it was stored: so many roundings of the dtype, of which assert_close grants a part.
    roundings = 1 + shares.shape[-1] / ROUNDINGS * torch.finfo(combined.dtype).eps / torch.finfo(torch.float32).eps
    assert_close(combined, shares.sum(-1).cpu(), magnitude=roundings * shares.abs().sum(-1), what="sum of the shares")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["two parts", "six parts, uneven", "tile + 1"])
def test_number_of_threads_changes_no_bit(shape, dtype, level):
    problem = make(SHAPES[shape], dtype, draw=normal, level=level)
    results = [on_threads(count, lambda: (run(problem), run(problem, combine_))) for count in (1, 2, 3)]
    for combined, shares in results[1:]:
        assert_same_result(combined, results[0][0])
        assert_same_result(shares, results[0][1])
        assert_same_bits(shares.advantages, results[0][1].advantages)


@given(seed=st.integers(0, 2**16), layout=st.sampled_from(["list", "dict", "first", "middle", "slice"]))
def test_layout_changes_no_bit(device, seed, layout):
    problem = make((4, 33, 3), seed=seed, draw=normal).to(device)
    assert_same_result(run(problem.but(layout=layout)), run(problem))
    assert_same_result(run(problem.but(layout=layout), dispatcher), run(problem))


def test_grid_sums_are_exact():
    """What the exact problems rest on."""
    values = grid((4096,), torch.Generator().manual_seed(0))
    assert values.sum().item() == math.fsum(values.tolist())
    for dtype in DTYPES:
        assert torch.equal(values.to(dtype).double(), values.double())
