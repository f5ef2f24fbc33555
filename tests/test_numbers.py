"""Numbers where naive arithmetic fails: large offsets, extreme magnitudes, every half, the edge of the clip, counts."""

from __future__ import annotations

import math

import pytest
import torch
from cases import DTYPES, LEVELS, Problem
from compare import assert_close, assert_same_bits, compute_dtype
from doors import assert_matches

from pama_ext import combine, combine_, reference

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("shape", [(64, 2), (8, 700, 2), (64, 600, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_spread_on_a_large_offset(device, dtype, shape):
    values = torch.full(shape, 1000.0, dtype=dtype)
    values[::2] += 0.01
    stats = combine(values.to(device)).stats
    truth = reference.combine(values.double()).stats
    low, high = values.double().amin(), values.double().amax()
    count = math.prod(shape[:-1])
    by_hand = (high - low) / 2 * math.sqrt(count / (count - 1))
    # float64 has no wider type to merge partial means in: they are rounded relative to the offset, not to the spread.
    magnitude = high if dtype == torch.float64 else by_hand
    for std in stats.std:
        assert_close(std, by_hand, magnitude=magnitude, what="std")
    assert_close(stats.mean, truth.mean, what="mean")
    for name in ("min", "max", "count"):
        assert_same_bits(getattr(stats, name).cpu(), getattr(truth, name).to(dtype), name)


def test_naive_variance_would_not_pass():
    """The negative control of the test above: E[x^2] - E[x]^2 in float32 is wrong by far more than allowed."""
    values = torch.full((64,), 1000.0)
    values[::2] += 0.01
    naive = ((values.square().mean() - values.mean().square()) * 64 / 63).clamp(min=0).sqrt()
    with pytest.raises(AssertionError, match="times as much"):
        assert_close(naive, values.double().std())


@pytest.mark.parametrize("value", [1000.1, -0.3, 1e-40, 65504.0])
@pytest.mark.parametrize("level", LEVELS)
def test_constant_input_has_no_spread(device, value, level):
    values = torch.full((37, 41, 2), value)
    stats = combine(values.to(device), level=level).stats
    assert_close(stats.mean, values[0, 0].double(), what="mean")
    # Deviations from a mean that is rounded: at most its rounding each.
    assert_close(stats.std, torch.zeros(2, dtype=torch.float64), magnitude=values[0, 0].abs(), what="std")


@pytest.mark.parametrize(
    ("dtype", "unit"), [(torch.float32, 2.0**100), (torch.float64, 2.0**996), (torch.bfloat16, 2.0**100)]
)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1.0, -1.0, 0.0], ids=["positive", "negative", "mixed"])
def test_extreme_magnitudes(device, dtype, unit, level, sign):
    g = torch.Generator().manual_seed(1)
    values = (torch.rand((6, 33, 3), generator=g, dtype=torch.float64) + 0.1) * unit
    values = (values * (sign or torch.tensor([-1.0, 1.0, 1.0], dtype=torch.float64))).to(dtype)
    result = combine(values.to(device), noon=False, level=level)
    want = reference.combine(values.double() / unit, noon=False, level=level)
    assert_close(result.advantages.cpu() / unit, want.advantages, magnitude=values.double().abs().amax() / unit)
    assert_close(result.weights, want.weights, what="weights")
    assert_close(result.value.cpu() / unit, want.value, magnitude=want.stats.active_mean.abs().amax(), what="value")
    for name in ("mean", "min", "max", "active_mean"):
        assert_close(getattr(result.stats, name).cpu() / unit, getattr(want.stats, name), what=name)


@pytest.mark.parametrize(("dtype", "unit"), [(torch.float32, 1e30), (torch.float64, 1e300)])
@pytest.mark.parametrize("tokens", [7, 5000])
def test_spread_beyond_the_dtype_is_infinite(device, dtype, unit, tokens):
    """Its square overflows: inf, as in PyTorch, or the right number, but never NaN."""
    values = torch.linspace(-1, 3, tokens, dtype=torch.float64)[:, None]
    spread = combine((values * unit).to(device, dtype)).stats.std.cpu()
    if not (spread == math.inf).all():
        assert_close(spread / unit, values.std(0), what="std")


@pytest.mark.parametrize("value", [1e-30, 1e-42])
def test_tiny_magnitudes_are_not_flushed(device, value):
    values = torch.tensor([[value, -value], [2 * value, -3 * value]])
    result = combine(values.to(device), noon=False)
    truth = reference.combine(values.double(), noon=False)
    step = torch.finfo(torch.float32).smallest_normal
    assert_close(result.weights, truth.weights, magnitude=torch.tensor(max(1.0, step / value)), what="weights")
    assert_close(result.stats.mean, truth.stats.mean, what="mean")
    assert_same_bits(result.stats.min.cpu(), values.amin(0))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_half_survives_load_and_store(device, dtype):
    """All 65536 bit patterns through N = 1, weight 1: loaded, multiplied by 1 and stored, with the same bits."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    result = combine(patterns[:, None].to(device), solver="fixed", reward_weights=[1.0], noon=False, nan="propagate")
    assert_same_bits(result.advantages.cpu() + 0.0, patterns + 0.0)  # + 0.0: the sign of 0 is not kept by a sum
    stats = combine(patterns[:, None].to(device), noon=False).stats
    finite = patterns[patterns.isfinite()].double()
    assert stats.count == len(finite) and stats.nonfinite == 2**16 - len(finite)
    assert stats.min == finite.min() and stats.max == finite.max()


@pytest.mark.parametrize("dtype", HALVES)
def test_stores_round_to_nearest_even(device, dtype):
    """Every value halfway between two neighbours, and its float32 neighbours, as torch rounds them."""
    positive = torch.arange(0, 0x7C00 if dtype == torch.float16 else 0x7F80, dtype=torch.int16).view(dtype).float()
    middle = (positive[:-1].double() + positive[1:].double()) / 2
    largest = torch.finfo(dtype).max
    middle = torch.cat([middle.float(), torch.tensor([largest * (1 + torch.finfo(dtype).eps / 4)])])
    some = torch.cat([middle, middle.nextafter(torch.tensor(0.0)), middle.nextafter(torch.tensor(math.inf))])
    some = some[some.isfinite()]
    some = torch.cat([some, -some])
    # x = 1 * x_high + 1 * x_low with both parts in the dtype: what is rounded on storing is their exact float32 sum.
    high = some.to(dtype)
    high = torch.where(high.isinf(), torch.full_like(high, largest).copysign(high), high)
    low = (some - high.float()).to(dtype)
    kept = high.float() + low.float() == some  # where the rest does not fit the dtype there is nothing to test
    assert kept.sum() > len(some) / 4
    pair = torch.stack([high, low], -1)[kept].to(device)
    result = combine(pair, solver="fixed", reward_weights=[1.0, 1.0], noon=False)
    assert_same_bits(result.advantages.cpu() + 0.0, some[kept].to(dtype) + 0.0)


def around(x: float, dtype: torch.dtype, steps: int = 3) -> list[float]:
    """The representable numbers next to x."""
    here = torch.tensor([x], dtype=torch.float64).to(dtype)
    found = [here]
    for direction in (math.inf, -math.inf):
        at = here
        for _ in range(steps):
            if dtype in HALVES:
                bits = at.view(torch.int16) + (1 if (at > 0) == (direction > 0) else -1)
                at = bits.view(dtype)
            else:
                at = torch.nextafter(at, torch.tensor([direction], dtype=dtype))
            found.append(at)
    return torch.cat(found).tolist()


@pytest.mark.parametrize("ratio_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip", [0.2, 0.1, 0.28, 1e-3, 1.0])
def test_indicator_next_to_the_clip(device, clip, dtype, ratio_dtype):
    """I(A) is decided on the stored log_ratio against log(1 +- clip) in float64: not one neighbour goes astray."""
    low = math.log1p(-clip) if clip < 1 else -math.inf
    ratios = around(math.log1p(clip), ratio_dtype) + (around(low, ratio_dtype) if clip < 1 else [-30.0])
    ratios += [0.0, 19.9, 20.0, 25.0, -19.9, -20.0, -25.0, math.inf, -math.inf, math.nan]
    log_ratio = torch.tensor(ratios, dtype=ratio_dtype)
    values = torch.tensor([[1.0, -1.0]], dtype=dtype).expand(len(ratios), 2)
    options = {"log_ratio": log_ratio[:, None].to(device), "noon": False, "clip_low": clip, "clip_high": clip}
    result = combine(values[:, None].to(device), level="sequence", solver="fixed", reward_weights=[1.0, 0.0], **options)
    above = torch.tensor([1.0 if r <= math.log1p(clip) else 0.0 for r in log_ratio.double().tolist()], dtype=dtype)
    assert_same_bits(result.value.cpu(), above, "A > 0")
    result = combine(values[:, None].to(device), level="sequence", solver="fixed", reward_weights=[0.0, 1.0], **options)
    below = torch.tensor([-1.0 if r >= low else 0.0 for r in log_ratio.double().tolist()], dtype=dtype)
    assert_same_bits(result.value.cpu(), below, "A < 0")


def test_log_ratio_is_clamped(device):
    """With clip_high beyond exp(20), no finite or infinite log_ratio is above the clip: it counts as 20."""
    log_ratio = torch.tensor([19.0, 20.0, 21.0, 1e30, math.inf, -math.inf, math.nan])
    values = torch.ones(7, 1)
    for clip, active in ((math.exp(20.0), 6), (math.exp(19.5), 2), (math.inf, 6)):
        result = combine(values.to(device), log_ratio=log_ratio.to(device), clip_high=clip)
        truth = reference.combine(values.double(), log_ratio=log_ratio, clip_high=clip)
        assert truth.stats.active_mean == active / 7
        assert_close(result.stats.active_mean, truth.stats.active_mean, what=f"clip_high={clip}")


@pytest.mark.parametrize("level", LEVELS)
def test_counts_are_exact(device, level):
    """Beyond 2^24, where a float32 counter stops, counting goes on in integers."""
    tokens = 2**24 + 3
    values = torch.ones(1, dtype=torch.float16).expand(1, tokens)  # one element seen many times: no memory
    mask = torch.ones((1, tokens), dtype=torch.bool)
    mask[0, 5] = False
    result = combine([values.to(device)], mask=mask.to(device), level=level)
    assert result.stats.count == tokens - 1 and result.stats.nonfinite == 0
    assert result.stats.mean == 1 and result.stats.std == 0 and result.value == 1 and result.weights == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_offsets_beyond_32_bits(device, dtype):
    """Strides that reach past 2^31 elements; only a few pages of the huge tensor are ever touched."""
    if dtype == torch.float64 and device.type == "cpu":
        pytest.skip("17 GB of address space: the 16-bit case shows the same arithmetic")
    huge = torch.empty(2**31 + 64, dtype=dtype, device=device)
    view = huge.as_strided((3, 2, 2), (2**30, 2, 1))
    values = torch.arange(12, dtype=dtype).view(3, 2, 2)
    view.copy_(values)
    assert_matches(combine(view, noon=False), Problem(values, options={"noon": False}))
    combine_(view, solver="fixed", reward_weights=[1.0, 2.0], noon=False)
    assert torch.equal(view.cpu(), values * torch.tensor([1, 2], dtype=dtype))


def test_arithmetic_of_half_is_float32(device):
    """Gating and means in float32: in bfloat16 the mean of many ones plus a little would stay 1."""
    values = torch.ones(4096, 1, dtype=torch.bfloat16)
    values[::2] = 1 + 2**-7
    result = combine(values.to(device))
    assert result.value.dtype == compute_dtype(values.dtype) and result.value == 1 + 2**-8


def test_spread_after_a_nearly_empty_tile():
    """One valid entry far from all that follow: it may not be the centre that the others cancel against."""
    for offset in (1e4, 1e6):
        values = offset + torch.rand(1024, 1)
        both = torch.cat([torch.zeros(1024, 1), values])
        mask = torch.ones(2048)
        mask[1:1024] = 0
        exact, eager = (reference.combine(v, mask=mask).stats.std for v in (both.double(), both))
        assert_close(combine(both, mask=mask).stats.std, exact, eager)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_mean_that_overflows_is_infinite(sign):
    values = sign * torch.rand(4096, 2) * torch.finfo(torch.float32).max
    stats = combine(values).stats
    assert not any(field.isnan().any() for field in stats)
    assert (stats.mean.isinf() == reference.combine(values).stats.mean.isinf()).all()


def assert_moments_are_as_good_as_those_of_pytorch(x, mask=None, level="batch"):
    stats = combine(x, mask=mask, level=level).stats
    exact = reference.combine(x.double(), mask=mask, level=level).stats
    theirs = reference.combine(x, mask=mask, level=level).stats
    for field in ("mean", "std", "active_mean"):
        magnitude = None if field == "active_mean" else exact.max.abs()
        assert_close(
            getattr(stats, field), getattr(exact, field), getattr(theirs, field), magnitude=magnitude, what=field
        )


@pytest.mark.parametrize("level", ["batch", "token"])
@pytest.mark.parametrize("first", [1, 20, 64, 128, 129, 500])
@pytest.mark.parametrize("mask", [1.0, 0.7, 0.1])
def test_first_entries_that_lie_far_from_the_rest(instructions, first, mask, level):
    """The centre around which moments are taken must not come from these alone."""
    g = torch.Generator().manual_seed(first)
    x = torch.randn(1000, 3, generator=g)
    x[:first] += 1e4
    assert_moments_are_as_good_as_those_of_pytorch(x, torch.rand(1000, generator=g) < mask, level)


@pytest.mark.parametrize("period", [32, 64, 128])
def test_a_few_entries_of_every_row_differ_from_the_rest(instructions, period):
    """Nor from every eighth vector: rewards depend on where a token stands."""
    for seed in range(20):
        x = torch.zeros(1024 // period, period, 1)
        x[:, : period // 8] = torch.rand(x[:, : period // 8].shape, generator=torch.Generator().manual_seed(seed)) + 0.5
        assert_moments_are_as_good_as_those_of_pytorch(x)


@pytest.mark.parametrize("n", [1, 3, 10])
@pytest.mark.parametrize("first", [300, 5000, 100_000])
def test_a_long_sequence_that_begins_elsewhere(instructions, first, n):
    """The centre of hundreds of tiles may not be that of the first of them. One row: one part sees all of it."""
    x = torch.randn(1, 400_000, n, generator=torch.Generator().manual_seed(first))
    x[:, :first] += 1e4 * first**-0.5
    stats = combine(x, level="sequence").stats
    torch.testing.assert_close(stats.std.double(), x[0].double().std(0), rtol=3e-7, atol=0)
    torch.testing.assert_close(stats.mean.double(), x[0].double().mean(0), rtol=0, atol=1e-6 * float(x.max()))
