"""Each preset of ``Normalize`` gives what the trainer it is named after gives, over many random batches."""

from __future__ import annotations

import math

import pytest
import released
import torch
from torch import Tensor

from pama_ext import Combined, Normalize, combine

pytestmark = released.installed("trl", "verl")
SEEDS = range(12)


def batch(seed: int, rows: int, n: int, group_size: int) -> Tensor:
    """Rewards ``[B, N]``: normal, binary or around a thousand; one group constant in one objective."""
    g = torch.Generator().manual_seed(seed)
    kind = seed % 3
    rewards = torch.randn(rows, n, generator=g) if kind else (torch.rand(rows, n, generator=g) < 0.4).float()
    rewards = rewards * 0.1 + 1000 if kind == 2 and seed % 2 else rewards
    rewards[:group_size, seed % n] = 0.75  # whose mean float32 gives exactly; see the test of constant groups
    return rewards


def missing(rewards: Tensor, seed: int, group_size: int) -> Tensor:
    """NaN at a fifth of the entries, a group with one usable sample, one row without any."""
    g = torch.Generator().manual_seed(100 + seed)
    rewards = torch.where(torch.rand(rewards.shape, generator=g) < 0.2, torch.nan, rewards)
    rewards[group_size : 2 * group_size - 1, 0] = torch.nan
    rewards[-1] = torch.nan
    return rewards


def fixed(rewards: Tensor | list[Tensor], normalize: Normalize, weights: Tensor | list[float], **options) -> Combined:
    return combine(rewards, normalize=normalize, solver="fixed", reward_weights=weights, noon=False, **options)


def check(ours: Tensor, theirs: Tensor, size: float = 1.0, spread: float = 1.0) -> None:
    """Their float32: a reward of this size, over a standard deviation of that, keeps so many digits."""
    tolerance = 64 * torch.finfo(torch.float32).eps * max(1.0, size / spread)
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def least_spread(rewards: Tensor, group_size: int) -> float:
    """The smallest standard deviation of a group that has one."""
    groups = rewards.double().unflatten(0, (-1, group_size))
    spreads = [float(x[~x.isnan()].std()) for x in groups.permute(0, 2, 1).flatten(0, 1) if (~x.isnan()).sum() > 1]
    return min([s for s in spreads if s > 1e-5], default=1.0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_trl(scale, nan, seed):
    rewards = batch(seed, 48, 3, 8)
    rewards = missing(rewards, seed, 8) if nan else rewards
    weights = torch.tensor([1.0, 0.5, 0.25])
    theirs = released.trl(rewards, weights, 8, "sum_then_normalize", scale)
    ours = fixed(rewards, Normalize.trl(8, scale=scale == "group"), weights).advantages
    total = (rewards * weights).nansum(1, keepdim=True)
    check(ours, theirs, float(total.abs().max()), least_spread(total, 8) if scale == "group" else 1.0)
    assert not nan or ours[-1] == theirs[-1] == 0


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nan", [False, True])
def test_trl_gdpo(nan, seed):
    rewards = batch(seed, 48, 3, 8)
    rewards = missing(rewards, seed, 8) if nan else rewards
    weights = torch.tensor([1.0, 0.5, 0.25])
    theirs = released.trl(rewards, weights, 8, "normalize_then_sum")
    ours = fixed(rewards, Normalize.trl_gdpo(8), weights).advantages
    check(ours, theirs, float(rewards.nan_to_num().abs().max()), least_spread(rewards, 8))


def test_trl_with_one_usable_sample_in_a_group_gives_zero():
    rewards = torch.tensor([[1.0], [torch.nan], [2.0], [3.0]])
    ours = fixed(rewards, Normalize.trl(2), [1.0]).advantages
    check(ours, released.trl(rewards, torch.ones(1), 2, "sum_then_normalize"))
    assert ours[:2].tolist() == [0, 0]


def responses(seed: int, rows: int, tokens: int = 9) -> Tensor:
    """A response mask ``[B, T]``, padded on the right, no response empty."""
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=torch.Generator().manual_seed(200 + seed))
    return (torch.arange(tokens) < lengths).float()


def placed(scores: Tensor, mask: Tensor) -> Tensor:
    """Scores ``[B]`` as token-level rewards ``[B, T]``, at the last token of each response."""
    rewards = torch.zeros_like(mask)
    rewards[torch.arange(len(mask)), mask.sum(1).long() - 1] = scores
    return rewards


def prompts(seed: int, rows: int, kind: str) -> Tensor:
    if kind == "equal":
        return torch.arange(rows) // 8
    g = torch.Generator().manual_seed(300 + seed)
    ids = torch.randint(0, rows // 4, (rows,), generator=g)  # of every size, single ones among them
    return ids.sort().values if kind == "sorted" else ids


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["equal", "sorted", "mixed"])
@pytest.mark.parametrize("vectorized", [False, True], ids=["loop", "vectorized"])
@pytest.mark.parametrize("scale", [True, False])
def test_verl(scale, vectorized, kind, seed):
    scores, mask, ids = batch(seed, 48, 3, 8), responses(seed, 48), prompts(seed, 48, kind)
    rewards = [placed(column, mask) for column in scores.unbind(1)]
    spread = min([float(scores[ids == i, k].std()) for i in ids.unique() for k in range(3)
                  if float(scores[ids == i, k].std()) > 1e-5], default=1.0)  # fmt: skip
    for k in range(3):
        theirs = released.verl_grpo(rewards[k], mask, ids, vectorized=vectorized, scale=scale)
        ours = fixed(rewards, Normalize.verl(ids, scale=scale), torch.eye(3)[k], mask=mask).advantages
        check(ours, theirs, float(scores.abs().max()), spread if scale else 1.0)


def test_a_constant_group_is_zero_where_verls_rounding_is_not():
    """Eight times 0.7: its float32 mean is off by half a unit in the last place, which the division blows up."""
    rewards, mask, ids = torch.full((8, 1), 0.7), torch.ones(8, 1), torch.zeros(8, dtype=torch.int64)
    assert 0.01 < released.verl_grpo(rewards, mask, ids).abs().max() < 0.1
    assert (fixed([rewards], Normalize.verl(ids), [1.0], mask=mask).advantages == 0).all()


@pytest.mark.parametrize("seed", SEEDS)
def test_verl_whiten(seed):
    g = torch.Generator().manual_seed(seed)
    values, mask = torch.randn(12, 30, generator=g) * 3 + (1000 if seed % 2 else 1), responses(seed, 12, 30)
    ours = fixed([values], Normalize.verl_whiten(), [1.0], mask=mask).advantages
    check(ours, released.verl_whiten(values, mask) * mask, float(values.abs().max()), 3.0)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["equal", "sorted", "mixed"])
@pytest.mark.parametrize("weights", [None, [1.0, 0.5, 2.0]])
def test_verl_gdpo(weights, kind, seed):
    scores, mask, ids = batch(seed, 48, 3, 8), responses(seed, 48), prompts(seed, 48, kind)
    theirs = released.verl_gdpo(scores.t().tolist(), mask, ids, weights)
    rewards = [placed(column, mask) for column in scores.unbind(1)]
    ours = fixed(rewards, Normalize.verl_gdpo(ids), weights or [1.0] * 3, mask=mask).advantages
    spread = min([float(scores[ids == i, k].std()) for i in ids.unique() for k in range(3)
                  if float(scores[ids == i, k].std()) > 1e-5], default=1.0)  # fmt: skip
    check(ours, theirs, float(scores.abs().max()), spread)


def test_one_missing_reward_makes_all_of_verls_gdpo_nan_and_none_of_ours():
    scores, mask, ids = (
        torch.randn(16, 2, generator=torch.Generator().manual_seed(0)),
        responses(0, 16),
        prompts(0, 16, "equal"),
    )
    some: list[list[float | None]] = scores.t().tolist()
    some[1][5] = None
    assert torch.isnan(released.verl_gdpo(some, mask, ids, None)).all()
    scores[5, 1] = torch.nan
    rewards = [placed(column, mask) for column in scores.unbind(1)]
    assert torch.isfinite(fixed(rewards, Normalize.verl_gdpo(ids), [1.0, 1.0], mask=mask).advantages).all()
    # Before the whitening of the whole batch, nothing but the group of that reward is touched, in that objective.
    clean = [placed(column, mask) for column in scores.nan_to_num(3.0).unbind(1)]
    for k in range(2):
        ours, other = (fixed(r, Normalize.verl(ids), torch.eye(2)[k], mask=mask).advantages for r in (rewards, clean))
        same = (ids != ids[5]) if k == 1 else torch.ones(16, dtype=torch.bool)
        assert torch.equal(ours[same], other[same])


@pytest.mark.parametrize("seed", SEEDS)
def test_openrlhf(seed):
    """The rule of the released source: the package cannot be installed here."""
    rewards = batch(seed, 48, 3, 8)
    for k in range(3):
        ours = fixed(rewards, Normalize.openrlhf(8), torch.eye(3)[k]).advantages
        check(ours, released.openrlhf(rewards[:, k], 8))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["equal", "sorted", "mixed"])
def test_nemo(kind, seed):
    """The rule of the released source: the package cannot be installed here."""
    rewards, ids = batch(seed, 48, 3, 8), prompts(seed, 48, kind)
    for k in range(3):
        ours = fixed(rewards, Normalize.nemo(ids), torch.eye(3)[k]).advantages
        check(ours, released.nemo(rewards[:, k], ids), 1.0, 0.01)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("gdpo", [False, True])
def test_swift(gdpo, nan, seed):
    """The rule of the released source: the package cannot be installed here. A row without any reward is ours alone."""
    rewards, weights = batch(seed, 48, 3, 8), torch.tensor([1.0, 0.5, 0.25])
    if nan:
        some = missing(rewards, seed, 8)
        rewards = torch.where(some.isnan().all(1, keepdim=True), rewards, some)
    theirs = released.swift(rewards, weights, 8, "gdpo" if gdpo else "group")
    total = (rewards * weights).nansum(1, keepdim=True)
    spread = 1.0 if gdpo else least_spread(total, 8)
    check(fixed(rewards, Normalize.swift(8, gdpo=gdpo), weights).advantages, theirs,
          1.0 if gdpo else float(total.abs().max()), spread)  # fmt: skip


def test_the_tolerance_would_notice_another_eps():
    rewards = batch(1, 48, 1, 8)
    ours = fixed(rewards, Normalize.openrlhf(8), [1.0]).advantages
    with pytest.raises(AssertionError):
        check(fixed(rewards, Normalize(by="group", group_size=8, eps=1e-3), [1.0]).advantages, ours)
    with pytest.raises(AssertionError):
        check(fixed(rewards, Normalize(by="group", group_size=8, correction=0), [1.0]).advantages, ours)
    assert math.isfinite(least_spread(rewards, 8))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_trl_whatever_is_missing(aggregation, seed):
    """Any pattern of NaN, from one entry to nearly all of them, and groups of any size, single ones among them."""
    g = torch.Generator().manual_seed(seed)
    size = (1, 2, 3, 4, 8)[seed % 5]
    rewards = torch.randn(6 * size, 1 + seed % 4, generator=g)
    rewards[torch.rand(rewards.shape, generator=g) < (0.05, 0.3, 0.6, 0.95)[seed % 4]] = torch.nan
    weights = torch.rand(rewards.shape[1], generator=g) + 0.1
    preset = Normalize.trl(size) if aggregation == "sum_then_normalize" else Normalize.trl_gdpo(size)
    theirs = released.trl(rewards, weights, size, aggregation)
    total = (rewards * weights).nansum(1, keepdim=True)
    spread = min(least_spread(total, size), least_spread(rewards, size))
    check(fixed(rewards, preset, weights).advantages, theirs, 4.0, spread)


@pytest.mark.parametrize("preset", [
    lambda ids: Normalize.trl(8), lambda ids: Normalize.trl_gdpo(8), Normalize.verl, Normalize.verl_gdpo,
    lambda ids: Normalize.verl_whiten(), lambda ids: Normalize.openrlhf(8), Normalize.nemo,
    lambda ids: Normalize.swift(8), lambda ids: Normalize.swift(8, gdpo=True),
])  # fmt: skip
def test_presets_balance_as_well_as_they_reproduce(preset):
    """With the closed form instead of fixed weights each is a PAMA step: weights on the simplex, nothing infinite."""
    rewards = batch(1, 48, 3, 8)
    result = combine(rewards, normalize=preset(torch.arange(48) // 8))
    assert result.weights.sum().item() == pytest.approx(1) and (result.weights >= 0).all()
    assert torch.isfinite(result.advantages).all() and result.stats.count.tolist() == [48] * 3
