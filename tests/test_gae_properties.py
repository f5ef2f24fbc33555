"""What holds for every call of ``gae``: the specification through both doors, and invariances of the recursion."""

from __future__ import annotations

import itertools

import pytest
import torch
from compare import assert_close, assert_same_bits
from gae_cases import DOORS, assert_computes, call, calls, listed, make
from hypothesis import given
from hypothesis import strategies as st

from pama_ext import gae

seeds = st.integers(0, 2**20)


def assert_close_results(actual, expected) -> None:
    """Up to rounding: the same sums in another order."""
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b.double(), magnitude=b.abs().max() if b.numel() else None)


def problem(seed: int, rows: int, length: int, n: int = 3) -> dict:
    torch.manual_seed(seed)
    arguments = make((rows, length, n))
    for name in ("rewards", "values", "kl_penalty", "bootstrap"):
        arguments[name] = torch.randn_like(arguments[name])
    arguments["mask"] = torch.rand(rows, length) < 0.7
    return arguments


@given(calls())
def test_doors_compute_the_specification(arguments):
    results = [call(door, arguments) for door in DOORS.values()]
    for result in results:
        assert_computes(result, arguments)
    for a, b in zip(listed(results[0][0]), listed(results[-1][0]), strict=True):
        assert_same_bits(a, b)
    for a, b in zip(listed(results[0][1]), listed(results[-1][1]), strict=True):
        assert_same_bits(a, b)


@given(seeds, st.integers(0, 6), st.integers(0, 60))
def test_masking_is_removal(seed, rows, length):
    """Packed without the masked tokens, the valid ones get what they had."""
    arguments = problem(seed, rows, length)
    mask = arguments.pop("mask")
    kept = {name: arguments[name][mask] for name in ("rewards", "values", "kl_penalty")}
    offsets = torch.tensor([0, *itertools.accumulate(mask.sum(1).tolist())])
    packed = call(gae, {**arguments, **kept, "offsets": offsets})
    masked = call(gae, {**arguments, "mask": mask})
    assert_close_results([x[mask] for x in masked], packed)
    assert all((x[~mask] == 0).all() for x in masked)


@given(seeds, st.permutations(range(3)), st.integers(1, 5), st.integers(1, 50))
def test_permuting_objectives_permutes_them(seed, order, rows, length):
    arguments = problem(seed, rows, length)
    permuted = dict(arguments)
    for name in ("rewards", "values", "bootstrap"):
        permuted[name] = arguments[name][..., list(order)]
    for name in ("gamma", "lam"):
        permuted[name] = [arguments[name][i] for i in order]
    for a, b in zip(call(gae, permuted), call(gae, arguments), strict=True):
        assert_close_results([a], [b[..., list(order)]])


@given(seeds, st.integers(1, 6), st.integers(1, 60))
def test_rows_do_not_meet(seed, rows, length):
    """Neither their order nor what stands in the others matters."""
    arguments = problem(seed, rows, length)
    whole = call(gae, arguments)
    turned = {k: v.flip(0) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert_close_results([x.flip(0) for x in call(gae, turned)], whole)
    last = {k: v[-1:] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    assert_close_results(call(gae, last), [x[-1:] for x in whole])


@given(seeds, st.sampled_from([0.5, 4.0, 2.0**-20]), st.integers(1, 6), st.integers(1, 60))
def test_it_is_linear(seed, factor, rows, length):
    arguments = problem(seed, rows, length)
    names = ("rewards", "values", "kl_penalty", "bootstrap")
    scaled = {**arguments, **{name: factor * arguments[name] for name in names}}
    for a, b in zip(call(gae, scaled), call(gae, arguments), strict=True):
        assert_same_bits(a, factor * b)


@given(seeds, st.integers(1, 6), st.integers(1, 60))
def test_without_discount_returns_are_rewards_to_go(seed, rows, length):
    arguments = problem(seed, rows, length) | {"gamma": 1.0, "lam": 1.0}
    _, returns = call(gae, arguments)
    mask = arguments["mask"].unsqueeze(-1)
    paid = torch.where(mask, arguments["rewards"] - arguments["kl_penalty"].unsqueeze(-1), 0.0).double()
    to_go = paid.flip(1).cumsum(1).flip(1) + arguments["bootstrap"].unsqueeze(1).double()
    largest = arguments["values"].abs().max() + paid.abs().sum(1).max()
    assert_close(returns, torch.where(mask, to_go, 0.0), magnitude=4 * largest)


@given(seeds, st.integers(1, 6), st.integers(1, 60))
def test_a_score_is_a_reward_at_the_last_valid_token(seed, rows, length):
    arguments = problem(seed, rows, length)
    scores = torch.randn(rows, 3)
    placed = torch.zeros(rows, length, 3)
    for b, row in enumerate(arguments["mask"]):
        if row.any():
            placed[b, row.nonzero().max()] = scores[b]
    assert_close_results(call(gae, {**arguments, "rewards": scores}), call(gae, {**arguments, "rewards": placed}))


@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_a_sequence_goes_on_from_its_bootstrap(seed, first, second):
    """With lam 0 and with lam 1 the value after a cut is all that the first part must know of the second."""
    arguments = problem(seed, 1, first + second) | {"lam": 0.0, "mask": None, "bootstrap": None}
    arguments = {k: v for k, v in arguments.items() if v is not None}
    whole = call(gae, arguments)
    head = {k: v[:, :first] if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    one_step = call(gae, {**head, "bootstrap": arguments["values"][:, first]})
    assert_close_results([x[:, :first] for x in whole], one_step)
    returns = call(gae, {**arguments, "lam": 1.0})
    to_the_end = call(gae, {**head, "lam": 1.0, "bootstrap": returns[1][:, first]})
    assert_close_results([x[:, :first] for x in returns], to_the_end)


@given(seeds, st.integers(1, 6), st.integers(1, 60))
def test_an_objective_alone_gets_the_same(seed, rows, length):
    arguments = problem(seed, rows, length)
    whole = call(gae, arguments)
    for i in range(3):
        alone = {k: arguments[k][..., i : i + 1] for k in ("rewards", "values", "bootstrap")}
        alone |= {k: arguments[k][i] for k in ("gamma", "lam")}
        assert_close_results(call(gae, {**arguments, **alone}), [x[..., i : i + 1] for x in whole])


@pytest.mark.parametrize("broken", ["delta", "decay", "mask"])
def test_the_judge_sees_a_wrong_recursion(broken):
    arguments = make((4, 60, 3))
    changed = dict(arguments)
    if broken == "delta":
        changed["rewards"] = arguments["rewards"] + 1e-4
    elif broken == "decay":
        changed["lam"] = [x * 0.9999 for x in arguments["lam"]]
    else:
        changed["mask"] = arguments["mask"].clone()
        changed["mask"][2, 30] ^= True
    with pytest.raises(AssertionError):
        assert_computes(call(gae, changed), arguments)
