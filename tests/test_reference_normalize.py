"""The specification of ``Normalize`` itself: by hand, and against loops over Python floats."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from torch import Tensor

from pama_ext import Normalize, reference

NAN, INF = math.nan, math.inf


def pool_by_loops(samples: list[float], how: Normalize) -> tuple[list[float], bool]:
    """One pool, whose samples are all usable: its normalised samples, and whether it gives only 0."""
    if not samples or not (how.center or how.scale):
        return samples, False
    if not all(map(math.isfinite, samples)):
        return [NAN] * len(samples), False
    if len(samples) == 1 and how.singleton == "raw":
        mean, variance = 0.0, 1.0
    elif len(set(samples)) == 1:
        return [0.0] * len(samples), True
    else:
        mean = statistics.fmean(samples)
        variance = statistics.variance(samples) if how.correction else statistics.pvariance(samples)
    divisor = math.sqrt(variance) + how.eps if how.eps_in == "std" else math.sqrt(variance + how.eps)
    return [(x - (mean if how.center else 0.0)) / (divisor if how.scale else 1.0) for x in samples], False


def by_loops(rewards: list[list[float]], valid: list[list[bool]], groups: list[int], how: Normalize, propagate: bool):
    """``[B][T]`` entries of one objective: the normalised ones, None where unusable, and the dead pools."""
    rows = range(len(rewards))
    entries = {
        (b, t): rewards[b][t]
        for b in rows
        for t in range(len(rewards[b]))
        if valid[b][t] and (propagate or how.over == "row_sums" or math.isfinite(rewards[b][t]))
    }
    place = {at: at for at in entries}  # of an entry's sample
    if how.over == "row_sums":
        place = {(b, t): (b, -1) for b, t in entries}
        sums = {(b, -1): sum(x for (row, _), x in entries.items() if row == b) for b, _ in entries}
        entries = {at: x for at, x in sums.items() if propagate or math.isfinite(x)}
    pools: dict[int, list[tuple[int, int]]] = {}
    for at in entries:
        pools.setdefault(groups[at[0]] if how.by == "group" else 0, []).append(at)
    results, dead = {}, 0
    for members in pools.values():
        normal, is_dead = pool_by_loops([entries[at] for at in members], how)
        dead += is_dead
        results.update(zip(members, normal, strict=True))
    cells = [[results.get(place.get((b, t))) for t in range(len(rewards[b]))] for b in rows]  # type: ignore[arg-type]
    return cells, dead


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("over", ["tokens", "row_sums"])
@pytest.mark.parametrize("by", ["batch", "group"])
def test_loops(by, over, seed):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(7, 4, 2, generator=g, dtype=torch.float64)
    if seed % 3 == 0:
        rewards = (rewards > 0).double()
    if seed % 2:
        rewards[torch.rand(7, 4, 2, generator=g) < 0.1] = (NAN, INF, -INF)[seed % 3]
    mask = torch.rand(7, 4, generator=g) < (0.7 if seed % 5 else 0.3)
    ids = torch.randint(0, 3, (7,), generator=g)
    how = Normalize(
        by=by, over=over, group_ids=ids, center=seed % 7 != 0, scale=seed % 11 != 0, correction=seed % 2,
        eps=0.01, eps_in=("std", "var")[seed % 2], singleton=("zero", "raw")[seed // 2 % 2],
    )  # fmt: skip
    propagate = seed % 4 == 1
    options = {"noon": False, "solver": "fixed", "nan": "propagate" if propagate else "ignore"}
    for i in range(2):
        result = reference.combine(
            rewards, normalize=how, mask=mask, reward_weights=torch.eye(2, dtype=torch.float64)[i], **options
        )
        cells, dead = by_loops(rewards[..., i].tolist(), mask.tolist(), ids.tolist(), how, propagate)
        expected = torch.tensor([[0.0 if x is None else x for x in row] for row in cells], dtype=torch.float64)
        torch.testing.assert_close(result.advantages, expected, equal_nan=True)
        assert result.stats.dead_groups[i] == dead


def test_a_group_by_hand():
    """1, 2, 3: mean 2, variance 1; the other group has one sample."""
    rewards = torch.tensor([[1.0], [10.0], [2.0], [3.0]])
    options = {"noon": False, "solver": "fixed"}
    ids = torch.tensor([7, -2, 7, 7])
    plain = reference.combine(rewards, normalize=Normalize(by="group", group_ids=ids, eps=0.0), **options)
    assert plain.advantages.tolist() == [-1, 0, 0, 1] and plain.stats.dead_groups.tolist() == [1]
    raw = Normalize(by="group", group_ids=ids, eps=1.0, singleton="raw")
    assert reference.combine(rewards, normalize=raw, **options).advantages.tolist() == [-0.5, 5, 0, 0.5]
    centred = Normalize(by="group", group_ids=ids, scale=False)
    assert reference.combine(rewards, normalize=centred, **options).advantages.tolist() == [-1, 0, 0, 1]
    scaled = Normalize(by="group", group_ids=ids, center=False, eps=3.0, eps_in="var")
    assert reference.combine(rewards, normalize=scaled, **options).advantages.tolist() == [0.5, 0, 1, 1.5]


def test_noon_comes_after_the_normalisation():
    rewards = torch.tensor([[1.0], [2.0], [3.0]])
    result = reference.combine(rewards, normalize=Normalize(by="batch", eps=0.0))
    assert result.advantages.tolist() == [0, 0, 1]
    assert result.stats.mean.tolist() == [2] and result.stats.positive.tolist() == pytest.approx([1 / 3])
    assert result.stats.active_mean.tolist() == pytest.approx([1 / 3])


def test_the_combination_is_normalised_over_tokens_with_data():
    rewards = torch.tensor([[1.0, 1.0], [3.0, NAN], [NAN, NAN]])
    how = Normalize(combined="batch", eps=0.0, correction=0)
    result = reference.combine(rewards, normalize=how, noon=False, solver="fixed", reward_weights=[1.0, 0.0])
    assert result.advantages.tolist() == [-1, 1, 0]


def test_nested_settings_are_the_combinations_own():
    rewards = torch.tensor([[0.0], [2.0], [0.0], [4.0]])
    last = Normalize(by="batch", eps=0.0, correction=0)
    how = Normalize(by="group", group_size=2, scale=False, combined=last)
    result = reference.combine(rewards, normalize=how, noon=False)
    assert result.advantages.tolist() == pytest.approx([x / math.sqrt(2.5) for x in (-1, 1, -2, 2)])
    same = Normalize(by="group", group_size=2, scale=False, combined="batch")
    assert reference.combine(rewards, normalize=same, noon=False).advantages.tolist() == [-1, 1, -2, 2]


def test_a_row_sum_stands_at_each_of_its_tokens():
    rewards = torch.tensor([[[0.0], [3.0], [9.0]], [[1.0], [0.0], [0.0]]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    how = Normalize(by="batch", over="row_sums", eps=0.0, correction=0)
    result = reference.combine(rewards, normalize=how, mask=mask, noon=False)
    assert result.advantages.tolist() == [[1, 1, 0], [-1, -1, -1]]
    assert result.stats.mean.tolist() == pytest.approx([(3 * 2 + 1 * 3) / 5])  # of the tokens' row sums


@pytest.mark.parametrize("described", [
    {"group_size": 2}, {"group_ids": torch.tensor([4, 4, 1, 1])}, {"group_offsets": torch.tensor([0, 2, 4])},
], ids=lambda d: next(iter(d)))  # fmt: skip
def test_level_group_by_hand(described):
    rewards = torch.tensor([[1.0, 4.0], [1.0, 4.0], [6.0, 2.0], [6.0, 2.0]])
    result = reference.combine(rewards, level="group", normalize=Normalize(**described))
    weights: Tensor = result.weights
    if "group_ids" in described:
        assert weights.shape == (4, 2)
        weights = weights[::2]
        assert result.value.tolist() == [1, 1, 2, 2]
    else:
        assert result.value.tolist() == [1, 2]
    assert weights.tolist() == [[1, 0], [0, 1]] and result.advantages.tolist() == [1, 1, 2, 2]


def test_an_empty_group_is_uniform_and_worth_nothing():
    how = Normalize(by="group", group_offsets=torch.tensor([0, 0, 2]))
    result = reference.combine(torch.tensor([[1.0, 2.0], [3.0, 5.0]]), level="group", normalize=how)
    assert result.weights[0].tolist() == [0.5, 0.5] and result.value[0] == 0
    assert result.stats.dead_groups.tolist() == [0, 0]


def test_min_norm_by_hand():
    assert reference.min_norm(torch.tensor([[4.0, 0.0], [0.0, 1.0]])).tolist() == pytest.approx([0.2, 0.8])
    assert reference.min_norm(torch.tensor([[4.0, 2.0], [2.0, 1.0]])).tolist() == pytest.approx([0.0, 1.0], abs=1e-12)
    assert reference.min_norm(torch.tensor([[0.0, 0.0], [0.0, 1.0]])).tolist() == [1, 0]
    assert reference.min_norm(torch.full((2, 2), NAN)).isnan().all()
    assert reference.min_norm(torch.ones(0, 3, 3)).shape == (0, 3)
