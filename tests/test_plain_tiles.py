"""The CPU kernels have a fast way for tiles in which all is finite. It and the careful way have to agree, to the bit.

An entry that is NaN counts like a masked one, for its objective; it sends the tile the careful way, a mask does not. So
the two can be compared without a reference, in every instruction set.
"""

from __future__ import annotations

import pytest
import torch
from cases import TILE
from compare import assert_same_bits, assert_same_result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pama_ext import Normalize, combine, combine_, reference

LENGTHS = (1, 15, 16, 17, 64, TILE - 1, TILE, TILE + 1, 2 * TILE + 5)
MODES = ({"level": "batch"}, {"level": "token"}, {"solver": "min_norm"}, {"level": "batch", "skip_inactive": True})
FIELDS = ("count", "mean", "std", "min", "max", "positive", "clipped", "active_mean")
UNTIL_SHARED = {"suppress_health_check": [HealthCheck.function_scoped_fixture]}  # the instruction set does not change


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same_statistics(one, other, *, objective: int = 0) -> None:
    for field in FIELDS:
        ours, theirs = getattr(one.stats, field)[objective], getattr(other.stats, field)[0]
        assert torch.equal(ours, theirs), f"{field}: {ours.item()!r} and {theirs.item()!r}"


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"reward_weights": [0.75]}, {"normalize": Normalize(by="batch")}], ids=str)
def test_nan_is_a_mask_for_its_objective(instructions, options, dtype, mode):
    for length in LENGTHS:
        g = generator(length)
        x = torch.randn(length, 1, generator=g).to(dtype)
        log_ratio = 0.3 * torch.randn(length, generator=g)
        gone = torch.rand(length, generator=g) < 0.2
        holes = torch.where(gone[:, None], torch.nan, x)
        careful = combine(holes, log_ratio=log_ratio, **mode, **options)
        plain = combine(x, mask=~gone, log_ratio=log_ratio, **mode, **options)
        assert_same_statistics(careful, plain)
        assert_same_bits(careful.advantages, plain.advantages)
        assert_same_bits(careful.weights, plain.weights)
        assert_same_bits(careful.value, plain.value)
        assert careful.stats.nonfinite.item() == gone.sum()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_is_normalised_is_weighted_once(instructions, mode, in_place):
    """And the same on both ways: an entry that is NaN for all objectives is a token behind the mask."""
    g = generator(11)
    x = torch.randn(2 * TILE + 9, 3, generator=g, dtype=torch.float64)
    gone = torch.rand(len(x), generator=g) < 0.2
    options = {
        **mode,
        "log_ratio": 0.3 * torch.randn(len(x), generator=g, dtype=torch.float64),
        "normalize": Normalize(by="batch"),
        "reward_weights": [0.5, 2.0, 3.0],
    }
    call, specification = (combine_, reference.combine_) if in_place else (combine, reference.combine)
    plain, careful, exact = x.clone(), torch.where(gone[:, None], torch.nan, x), x.clone()
    one, other = call(plain, mask=~gone, **options), call(careful, **options)
    expected = specification(exact, mask=~gone, **options)
    # The maps of the two rest on means that are the same up to their last bits.
    for result in (one, other):
        torch.testing.assert_close(result.weights, expected.weights, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.value, expected.value, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(result.advantages, expected.advantages, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", MODES, ids=str)
def test_what_one_objective_lacks_is_nothing_to_another(instructions, mode):
    """Tiles in which some objectives go one way and some the other."""
    g = generator(3)
    x = torch.randn(2 * TILE + 9, 3, generator=g)
    log_ratio = 0.3 * torch.randn(len(x), generator=g)
    spoilt = x.clone()
    spoilt[::7, 1] = torch.inf
    whole, mixed = (combine(v, log_ratio=log_ratio, **mode) for v in (x, spoilt))
    for i in (0, 2):
        alone = combine(x[:, i : i + 1], log_ratio=log_ratio, **mode)
        assert_same_statistics(mixed, alone, objective=i)
        assert_same_statistics(whole, alone, objective=i)


@settings(max_examples=30, **UNTIL_SHARED)
@given(
    n=st.integers(1, 64),
    tokens=st.integers(1, 90),
    level=st.sampled_from(("batch", "token")),
    dtype=st.sampled_from((torch.float32, torch.float64, torch.float16)),
    holes=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_where_objectives_stand_changes_no_bit(instructions, n, tokens, level, dtype, holes, seed):
    """Last, first, a list, a slice of something larger: each is loaded in its own way, then it is one arithmetic."""
    g = generator(seed)
    x = torch.randn(tokens, n, generator=g).to(dtype)
    if holes:
        x[torch.rand(tokens, n, generator=g) < 0.1] = torch.nan
    mask = torch.rand(tokens, generator=g) < 0.8
    expected = combine(x, mask=mask, level=level)
    wider = torch.full((tokens, n + 3), torch.nan, dtype=dtype)
    wider[:, 2 : 2 + n] = x
    spread = torch.full((2 * tokens, n), torch.nan, dtype=dtype)
    spread[::2] = x
    for view, dim in ((x.T.contiguous(), 0), (wider[:, 2 : 2 + n], -1), (spread[::2], -1)):
        assert_same_result(combine(view, dim=dim, mask=mask, level=level), expected)
    assert_same_result(combine([c.clone() for c in x.unbind(-1)], mask=mask, level=level), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_number_of_objectives_is_parted(instructions, dtype):
    for n in range(1, 65):
        x = torch.randn(83, n, generator=generator(n)).to(dtype)
        assert_same_result(combine(x), combine([column.clone() for column in x.unbind(-1)]))


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weight", [1e-3, 0.5, 0.7, 1.0, 3.3], ids=str)
def test_numbers_of_any_size(instructions, weight, dtype, mode):
    """Down to where A_i is 0 though the advantage is not, on both ways; a masked token in one is NaN in the other."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    for length in (17, TILE + 1, 3 * TILE):
        g = generator(length)
        x = torch.randn(length, 2, generator=g).to(dtype)
        sizes = torch.tensor([1.0, 1e-20, 3 * tiny, tiny], dtype=dtype)[torch.randint(4, (length, 2), generator=g)]
        x = torch.where(sizes > 1e-30, x * sizes, x.sign() * sizes)
        log_ratio, gone = 0.3 * torch.randn(length, generator=g), torch.rand(length, generator=g) < 0.2
        holes = torch.where(gone[:, None], torch.nan, x)
        options = {"log_ratio": log_ratio, "reward_weights": [weight, 1.0], **mode}
        careful, plain = combine(holes, **options), combine(x, mask=~gone, **options)
        for i in (0, 1):
            for field in FIELDS:
                assert torch.equal(getattr(careful.stats, field)[i], getattr(plain.stats, field)[i]), field
        assert_same_bits(careful.advantages, plain.advantages)
        assert_same_bits(careful.weights, plain.weights)
        expected = reference.combine(x, mask=~gone, **options).stats
        assert torch.equal(plain.stats.clipped * (~gone).sum(), expected.clipped * (~gone).sum())


@pytest.mark.parametrize("options", [{}, {"skip_inactive": True}], ids=str)
def test_an_advantage_that_vanishes_counts_as_none(instructions, options):
    for length in (16, 2 * TILE + 32):
        x = torch.full((length, 2), 1e-30)
        x[:, 1] = 2e-30
        result = combine(x, reward_weights=[1e-20, 1.0], **options)  # the first A_i is 0
        expected = reference.combine(x, reward_weights=[1e-20, 1.0], **options)
        assert torch.equal(result.stats.clipped, expected.stats.clipped)
        assert torch.equal(result.weights, expected.weights)


def test_what_is_equal_after_it_is_weighted_ties(instructions):
    """Products are rounded before they are added: as A_i are equal to the bit, so are their sums."""
    x = torch.rand(2 * TILE, generator=generator(0)) + 0.5
    weight = torch.tensor(0.1)
    result = combine(torch.stack([x, x * weight], -1), reward_weights=torch.stack([weight, torch.tensor(1.0)]))
    assert result.weights.tolist() == [0.5, 0.5]


def test_an_advantage_that_overflows_shows(instructions):
    x = torch.full((17, 1), -1.0)
    x[0], x[16] = -2e38, 2.5e38
    assert combine(x, noon=False, reward_weights=[1.5]).stats.active_mean.isinf()


NONZERO = {
    torch.bool: [True],
    torch.uint8: [1, 2, 128, 255],
    torch.int8: [1, -1, -128],
    torch.int16: [1, 256, -32768],
    torch.int32: [1, 65536, -(2**31)],
    torch.int64: [1, 2**32, -(2**63)],
    torch.float16: [1.0, -1.0, 6e-8, torch.inf, torch.nan],
    torch.bfloat16: [1.0, 9.2e-41, torch.nan],
    torch.float32: [1.0, 1e-45, -torch.inf, torch.nan],
    torch.float64: [1.0, 5e-324, torch.nan],
}


@pytest.mark.parametrize("step", [1, 3])
@pytest.mark.parametrize("dtype", NONZERO, ids=str)
def test_whatever_is_not_zero_is_valid(instructions, dtype, step):
    """Values whose low bytes are 0, the smallest there are, NaN; and -0, which is 0."""
    for length in (5, 16, 33, TILE + 3):
        g = generator(length)
        x = torch.randn(length, 2, generator=g)
        valid = torch.rand(length, generator=g) < 0.6
        some = torch.tensor(NONZERO[dtype], dtype=dtype)
        mask = torch.zeros(length * step, dtype=dtype)[::step]
        mask[valid] = some[torch.arange(int(valid.sum())) % len(some)]
        if dtype.is_floating_point:
            mask[~valid] = -0.0
        for level in ("batch", "token"):
            assert_same_result(combine(x, mask=mask, level=level), combine(x, mask=valid, level=level))


def ill_tempered():
    """Tiles that look harmless: all entries finite, or the raw ones only, or all but what becomes of them."""
    g = torch.Generator().manual_seed(5)
    spoilt = torch.randn(3000, 2, generator=g) + 5
    spoilt[0, 0] = torch.nan
    apart, ends = torch.zeros(TILE + 1, 2), torch.zeros(TILE + 1, dtype=torch.bool)
    apart[0], apart[TILE], ends[0], ends[TILE] = 3e38, -3e38, True, True
    weights = torch.tensor([1.0, torch.inf])
    return {
        "the normalised are NaN": (spoilt, {"normalize": Normalize(by="batch"), "nan": "propagate"}),
        "in a group": (spoilt, {"normalize": Normalize(by="group", group_size=1500), "nan": "propagate"}),
        "far from the tile before": (apart, {"mask": ends}),
        "A overflows": (torch.tensor([[1, 1e38], [2, 1e38]]), {"reward_weights": [1.0, 10.0]}),
        "an infinite weight": (torch.randn(100, 2, generator=g).abs() + 1, {"reward_weights": weights}),
        "an infinite weight of nothing": (-torch.rand(100, 2, generator=g), {"reward_weights": weights}),
        "an infinite weight of zeros": (torch.randn(100, 2, generator=g), {"reward_weights": weights}),
    }


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("mode", [{"level": "batch"}, {"level": "token"}, {"solver": "min_norm"}], ids=str)
@pytest.mark.parametrize("name", ill_tempered())
def test_tiles_that_only_look_finite(instructions, name, mode, in_place):
    advantages, options = ill_tempered()[name]
    ours, theirs = advantages.clone(), advantages.clone()
    if in_place:
        result, expected = combine_(ours, **mode, **options), reference.combine_(theirs, **mode, **options)
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    else:
        result, expected = combine(ours, **mode, **options), reference.combine(theirs, **mode, **options)
        torch.testing.assert_close(result.advantages, expected.advantages, equal_nan=True)
    for field in ("count", "nonfinite", "mean", "min", "max", "positive", "clipped"):
        got, want = getattr(result.stats, field), getattr(expected.stats, field)
        torch.testing.assert_close(got, want, equal_nan=True, msg=lambda text, f=field: f"{f}: {text}")
    torch.testing.assert_close(result.weights, expected.weights, equal_nan=True)


@pytest.mark.parametrize("mode", [{"level": "batch"}, {"level": "token"}, {"solver": "min_norm"}], ids=str)
def test_statistics_are_raw_where_the_normalised_overflow(instructions, mode):
    """1 / std of numbers that small is infinite; what is counted are the numbers themselves."""
    tiny = torch.rand(3000, 2, generator=torch.Generator().manual_seed(5)) * 1e-42
    stats = combine(tiny, normalize=Normalize(by="batch", eps=0.0), **mode).stats
    assert stats.count.tolist() == [3000, 3000] and stats.nonfinite.tolist() == [0, 0]
    assert torch.equal(stats.min, tiny.amin(0)) and torch.equal(stats.max, tiny.amax(0))
