"""The specification against numbers worked out by hand, against brute force, and against loops that share no code."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from cases import LEVELS, SHAPES, SOLVERS, Problem, make
from compare import assert_close
from hypothesis import given
from hypothesis import strategies as st

from pama_ext import reference

NAN, INF = math.nan, math.inf


def solve(*scalars: float) -> tuple[list[float], float]:
    a = torch.tensor(scalars, dtype=torch.float64)
    weights, value = reference.closed_form(a, torch.ones(len(a), dtype=torch.bool))
    return weights.tolist(), value.item()


@pytest.mark.parametrize(
    ("scalars", "weights", "value"),
    [
        ((3.0, 2.0, 5.0), (0, 1, 0), 2.0),  # all positive: the minimum
        ((2.0, 2.0, 5.0), (0.5, 0.5, 0), 2.0),  # ... shared by those tied
        ((-3.0, -2.0, -5.0), (0, 1, 0), -2.0),  # all negative: the maximum
        ((-2.0, -7.0, -2.0), (0.5, 0, 0.5), -2.0),
        ((-1.0, 3.0), (0.75, 0.25), 0.0),  # mixed: max / (max - min) on the minimum
        ((-1.0, 0.5, 3.0, 3.0, -1.0), (0.375, 0, 0.125, 0.125, 0.375), 0.0),
        ((0.0, 4.0), (1, 0), 0.0),  # the end points of the mixed case
        ((-4.0, 0.0), (0, 1), 0.0),
        ((0.0, 0.0, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25), 0.0),  # all zero: uniform
        ((7.0,), (1,), 7.0),
        ((-1e308, 1e308), (0.5, 0.5), 0.0),  # max - min would overflow
        ((-1e-310, 1e-310), (0.5, 0.5), 0.0),
    ],
)
def test_closed_form_by_hand(scalars, weights, value):
    assert solve(*scalars) == (list(weights), value)


def test_closed_form_leaves_out_and_propagates():
    a = torch.tensor([[1.0, 2.0, NAN], [NAN, 2.0, 1.0]], dtype=torch.float64)
    weights, value = reference.closed_form(a, torch.tensor([[True, True, False]]))
    assert weights[0].tolist() == [1, 0, 0] and value[0] == 1
    assert weights[1].isnan().all() and value[1].isnan()


@given(st.lists(st.integers(-8, 8), min_size=1, max_size=4))
def test_closed_form_solves_the_problem(eighths):
    """Theorem 1: (sum of c_i a_i)^2 is least over the simplex, here against every point of a fine lattice on it."""
    scalars = [x / 8 for x in eighths]
    weights, value = solve(*scalars)
    lattice = [c for c in itertools.product(range(13), repeat=len(scalars)) if sum(c) == 12]
    best = min(abs(sum(c * a for c, a in zip(point, scalars, strict=True)) / 12) for point in lattice)
    rounding = torch.finfo(torch.float64).eps * 4
    assert all(w >= 0 for w in weights) and abs(sum(weights) - 1) <= rounding
    assert abs(sum(w * a for w, a in zip(weights, scalars, strict=True)) - value) <= rounding
    assert abs(value) <= best + rounding
    if math.prod((min(scalars), max(scalars))) > 0:  # then a vertex is optimal, and the lattice holds it
        assert abs(value) == best
    for i, j in itertools.combinations(range(len(scalars)), 2):
        assert scalars[i] != scalars[j] or weights[i] == weights[j]


def test_one_batch_by_hand():
    """Two objectives, three tokens, one of them masked, one of them beyond the clip."""
    advantages = torch.tensor([[[2.0, -1.0], [4.0, 3.0], [NAN, INF]]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0]])
    log_ratio = torch.tensor([[math.log(1.3), 0.1, 5.0]])  # u = 1.3 > 1.2: the first token is clipped
    result = reference.combine(advantages, mask=mask, log_ratio=log_ratio)
    # a_1 = (0 + 4) / 2 = 2, a_2 = (0 + 3) / 2 = 1.5: all weight on the second objective.
    assert result.stats.active_mean.tolist() == [2.0, 1.5]
    assert result.weights.tolist() == [0, 1] and result.value == 1.5
    assert result.advantages.tolist() == [[0, 3, 0]]
    stats = result.stats
    assert stats.count.tolist() == [2, 2] and stats.nonfinite.tolist() == [0, 0]
    assert stats.mean.tolist() == [3, 1] and stats.min.tolist() == [2, -1] and stats.max.tolist() == [4, 3]
    assert stats.std.tolist() == pytest.approx([math.sqrt(2), math.sqrt(8)], rel=1e-15)
    assert stats.positive.tolist() == [1, 0.5] and stats.clipped.tolist() == [0.5, 0]

    signed = reference.combine(advantages, mask=mask, log_ratio=log_ratio, noon=False)
    assert signed.stats.active_mean.tolist() == [2.0, 1.0]  # -1 at u = 1.3 is active: the clip of A < 0 is below
    token = reference.combine(advantages, mask=mask, log_ratio=log_ratio, level="token")
    assert token.advantages.tolist() == [[1, 3, 0]]  # scalars (0, 0): the mean; (4, 3): the smaller
    assert token.weights.tolist() == [0.25, 0.75] and token.value == 1.5
    rows = reference.combine(advantages, mask=mask, log_ratio=log_ratio, level="sequence")
    assert rows.weights.tolist() == [[0, 1]] and rows.value.tolist() == [1.5]
    fixed = reference.combine(advantages, mask=mask, solver="fixed", reward_weights=[0.25, 2.0])
    assert fixed.advantages.tolist() == [[0.5, 7, 0]] and fixed.value == 0.25 * 3 + 2 * 1.5


def test_skip_inactive_by_hand():
    advantages = torch.tensor([[-1.0, 2.0], [-2.0, 4.0]])
    assert reference.combine(advantages).weights.tolist() == [1, 0]  # a = (0, 3): learning stops
    skipped = reference.combine(advantages, skip_inactive=True)
    assert skipped.weights.tolist() == [0, 1] and skipped.value == 3
    assert reference.combine(-advantages.abs(), skip_inactive=True).weights.tolist() == [0.5, 0.5]


def by_loops(problem: Problem) -> tuple[list[list[float]], list[float], list[float]]:
    """Combination, weights and values in Python floats, token by token; nan="ignore"."""
    o = {"level": "batch", "solver": "closed_form", "noon": True, "skip_inactive": False, **problem.options}
    values, mask, ratio = problem.values, problem.mask, o["log_ratio"]
    grid = values if values.dim() == 3 else values[:, None]
    rows, cols, n = grid.shape
    rewards = [float(w) for w in (o.get("reward_weights") or [1.0] * n)]
    pools: dict[object, list[tuple[int, int]]] = {}
    for b, t in itertools.product(range(rows), range(cols)):
        pools.setdefault({"batch": 0, "sequence": b, "token": (b, t)}[o["level"]], []).append((b, t))
    combined = [[0.0] * cols for _ in range(rows)]
    all_weights, all_values = [], []
    for pool in pools.values():
        sums, counts, active = [0.0] * n, [0] * n, [0] * n
        entries: dict[tuple[int, int, int], float] = {}
        for (b, t), i in itertools.product(pool, range(n)):
            a = float(grid[b, t, i])
            if not mask.reshape(rows, cols)[b, t] or not math.isfinite(a):
                continue
            a = max(a, 0.0) if o["noon"] else a
            a = a if o["solver"] == "fixed" else a * rewards[i]
            u = math.exp(min(max(float(ratio.reshape(rows, cols)[b, t]), -20.0), 20.0))
            gated = a if (u <= 1.2 if a > 0 else u >= 0.8) else 0.0
            entries[b, t, i] = a
            counts[i], sums[i], active[i] = counts[i] + 1, sums[i] + gated, active[i] + (gated != 0)
        scalars = [s / max(c, 1) for s, c in zip(sums, counts, strict=True)]
        kept = [i for i in range(n) if counts[i]]
        if o["skip_inactive"]:
            kept = [i for i in kept if active[i]] or kept
        kept = kept or list(range(n))
        low, high = min(scalars[i] for i in kept), max(scalars[i] for i in kept)
        share = dict.fromkeys(range(n), 0.0)
        lows, highs = [i for i in kept if scalars[i] == low], [i for i in kept if scalars[i] == high]
        total = 1.0 if low > 0 or low == high else 0.0 if high < 0 else high / (high - low)
        for group, part in ((lows, total), (highs, 1 - total)):
            for i in group:
                share[i] += part / len(group)
        if o["solver"] == "fixed":
            share = dict(enumerate(rewards if o.get("reward_weights") else [1 / n] * n))
        for (b, t, i), a in entries.items():
            combined[b][t] += share[i] * a
        all_weights.append([share[i] for i in range(n)])
        all_values.append(sum(share[i] * scalars[i] for i in range(n)))
    return combined, all_weights, all_values


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("shape", ["five objectives", "one row", "above a vector"])
@pytest.mark.parametrize(
    "more", [{}, {"skip_inactive": True}, {"reward_weights": True}], ids=["plain", "skip", "rewards"]
)
def test_loops(shape, noon, solver, level, more):
    n = SHAPES[shape][-1]
    more = {"reward_weights": [0.5, 2.0, 1.0, -1.0, 0.25][:n]} if "reward_weights" in more else more
    problem = make(SHAPES[shape], torch.float64, level=level, solver=solver, noon=noon, **more)
    problem.values[0, ..., 0] = NAN
    result = reference.combine(problem.values, **problem.options)
    combined, weights, values = (torch.tensor(x, dtype=torch.float64) for x in by_loops(problem))
    size = problem.values.nan_to_num().abs().amax()
    assert_close(result.advantages.reshape(combined.shape), combined, magnitude=size, what="combined")
    if level == "token":
        used = problem.mask.flatten()[:, None]
        weights = (weights * used).sum(0) / used.sum() if solver == "closed_form" else weights[0]
        values = (values * used.flatten()).sum() / used.sum()
    one = torch.tensor(1.0)
    assert_close(result.weights, weights.reshape(result.weights.shape), magnitude=one, what="weights")
    assert_close(result.value, values.reshape(result.value.shape), magnitude=size, what="value")


def test_inputs_are_not_written_and_in_place_is():
    problem = make((3, 5, 2))
    before = problem.values.clone()
    reference.combine(problem.values, **problem.options)
    assert torch.equal(problem.values, before)
    result = reference.combine_(problem.values, **problem.options)
    assert result.advantages is problem.values and not torch.equal(problem.values, before)
