"""What normalisation must do whatever the numbers: invariances, moments, and the same pool told in other ways."""

from __future__ import annotations

import math

import pytest
import torch
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from pama_ext import Normalize, combine, combine_

SIZES = st.sampled_from([1, 2, 3, 4, 5, 8, 16, 33])


def identity(normalize: Normalize, rewards: torch.Tensor, **options) -> torch.Tensor:
    """The normalised rewards of every objective, signed and unweighted: what ``combine_`` leaves with weights of 1."""
    shares = rewards.clone()
    combine_(
        shares, normalize=normalize, noon=False, solver="fixed", reward_weights=[1.0] * rewards.shape[-1], **options
    )
    return shares


@st.composite
def batches(draw, dtype=torch.float32):
    """``(rewards [G * m, N], m)`` in eighths, whose sums are exact; some groups constant."""
    size, groups, n = draw(SIZES), draw(st.integers(1, 40)), draw(st.integers(1, 5))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    rewards = (torch.randint(-24, 25, (groups * size, n), generator=g) / 8).to(dtype)
    constant = torch.rand(groups, generator=g) < 0.2
    rewards[constant.repeat_interleave(size)] = 0.375
    return rewards, size


@given(batches())
def test_groups_have_mean_zero_and_standard_deviation_one(batch):
    rewards, size = batch
    normal = identity(Normalize(by="group", group_size=size, eps=0.0), rewards).unflatten(0, (-1, size))
    raw = rewards.unflatten(0, (-1, size))
    constant = (raw.amax(1) == raw.amin(1)).unsqueeze(1).expand_as(raw)
    assert (normal[constant] == 0).all()
    torch.testing.assert_close(normal.mean(1), torch.zeros_like(normal.mean(1)), rtol=0, atol=1e-6)
    if size > 1:
        spread = normal.std(1)[~constant[:, 0]]
        torch.testing.assert_close(spread, torch.ones_like(spread))


@given(batches(), st.sampled_from([-64.0, 0.5, 1024.0, 4096.0]))
def test_a_constant_added_to_a_group_changes_nothing(batch, shift):
    """Eighths and the shift are exact in float32; what the mean lacks in float32 is carried beside it."""
    rewards, size = batch
    normalize = Normalize(by="group", group_size=size, eps=0.01)
    ours, theirs = identity(normalize, rewards), identity(normalize, rewards + shift)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


@given(batches(), st.sampled_from([2.0**-20, 0.25, 8.0, 2.0**20]), st.sampled_from(["group", "batch"]))
def test_a_power_of_two_changes_no_bit_without_eps(batch, factor, by):
    rewards, size = batch
    normalize = Normalize(by=by, group_size=size, eps=0.0)
    assert_same_bits(identity(normalize, rewards), identity(normalize, rewards * factor))


@given(batches(), st.randoms(use_true_random=False))
def test_order_within_a_group_does_not_matter(batch, random):
    rewards, size = batch
    order = list(range(len(rewards)))
    for start in range(0, len(rewards), size):
        part = order[start : start + size]
        random.shuffle(part)
        order[start : start + size] = part
    normalize = Normalize(by="group", group_size=size)
    torch.testing.assert_close(identity(normalize, rewards)[order], identity(normalize, rewards[order]))


@given(batches())
def test_one_partition_told_in_three_ways_is_one_result(batch):
    rewards, size = batch
    groups = len(rewards) // size
    ids = torch.arange(groups).repeat_interleave(size)
    expected = identity(Normalize(by="group", group_size=size), rewards)
    assert_same_bits(identity(Normalize(by="group", group_ids=ids.neg()), rewards), expected)
    offsets = torch.arange(groups + 1) * size
    assert_same_bits(identity(Normalize(by="group", group_offsets=offsets), rewards), expected)


@given(batches())
def test_one_group_of_all_rows_is_the_batch(batch):
    rewards, _ = batch
    whole = identity(Normalize(by="group", group_size=len(rewards)), rewards)
    torch.testing.assert_close(whole, identity(Normalize(by="batch"), rewards), rtol=2e-6, atol=2e-6)


@given(batches())
def test_objectives_are_normalised_each_on_its_own(batch):
    rewards, size = batch
    normalize = Normalize(by="group", group_size=size)
    together = identity(normalize, rewards)
    for i in range(rewards.shape[1]):
        assert_same_bits(together[:, i : i + 1].contiguous(), identity(normalize, rewards[:, i : i + 1]))


@given(batches(), st.integers(0, 2**20))
def test_masking_a_sample_is_removing_it(batch, seed):
    rewards, size = batch
    keep = torch.rand(len(rewards), generator=torch.Generator().manual_seed(seed)) < 0.6
    ids = torch.arange(len(rewards)) // size
    masked = identity(Normalize(by="group", group_ids=ids), rewards, mask=keep)
    assert (masked[~keep] == 0).all()
    if keep.any():
        removed = identity(Normalize(by="group", group_ids=ids[keep]), rewards[keep])
        torch.testing.assert_close(masked[keep], removed, rtol=2e-6, atol=2e-6)


@given(batches(), st.integers(2, 5))
def test_row_sums_do_not_care_where_a_reward_stands(batch, tokens):
    rewards, size = batch
    normalize = Normalize(by="group", group_size=size, over="row_sums")
    g = torch.Generator().manual_seed(len(rewards))
    place = torch.randint(0, tokens, (len(rewards),), generator=g)
    spread = torch.zeros(len(rewards), tokens, rewards.shape[1])
    spread[torch.arange(len(rewards)), place] = rewards
    expected = identity(Normalize(by="group", group_size=size), rewards)
    result = identity(normalize, spread)
    for t in range(tokens):
        torch.testing.assert_close(result[:, t], expected, rtol=2e-6, atol=2e-6)


@given(batches())
def test_dead_groups_are_those_that_give_only_zeros(batch):
    rewards, size = batch
    normalize = Normalize(by="group", group_size=size)
    dead = (identity(normalize, rewards).unflatten(0, (-1, size)) == 0).all(1).sum(0)
    assert combine(rewards, normalize=normalize).stats.dead_groups.tolist() == dead.tolist()


@given(batches(torch.float64), st.booleans())
def test_eps_moves_from_the_deviation_into_the_variance(batch, inside):
    """The two differ by a known factor, group by group."""
    rewards, size = batch
    eps = 0.25
    plain = identity(Normalize(by="group", group_size=size, eps=0.0), rewards)
    other = identity(Normalize(by="group", group_size=size, eps=eps, eps_in="var" if inside else "std"), rewards)
    if size > 1:
        std = rewards.unflatten(0, (-1, size)).std(1).repeat_interleave(size, 0)
        factor = std / ((std**2 + eps).sqrt() if inside else std + eps)
        torch.testing.assert_close(other, plain * factor)
    else:
        assert (other == 0).all()


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e5])
@pytest.mark.parametrize("size", [2, 7, 8, 500, 3000])
def test_what_is_left_of_a_large_offset_keeps_its_digits(size, offset):
    """Against float64 arithmetic on the same float32 rewards: only the division rounds."""
    g = torch.Generator().manual_seed(size)
    rewards = (offset + torch.randn(size * 3, 2, generator=g)).float()
    groups = rewards.double().unflatten(0, (-1, size))
    expected = (groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True)
    result = identity(Normalize(by="group", group_size=size, eps=0.0), rewards)
    error = (result.double() - expected.flatten(0, 1)).abs().max().item()
    assert error < 32 * torch.finfo(torch.float32).eps * max(1.0, math.log2(size))
