"""Level token on CPU, and what of it there is no need to tolerate: what shares of s* add up to is s* to the bit.

The kernels go a fast way where all of a tile is finite, and have it once for each number of objectives up to 16; the
careful way serves the rest. An entry that is NaN for all objectives is a token behind the mask, so the two can be
compared.
"""

from __future__ import annotations

import pytest
import torch
from cases import TILE
from compare import assert_close, assert_same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plain_tiles import UNTIL_SHARED, generator

from pama_ext import combine, combine_, reference

COUNTS = (1, 2, 3, 4, 5, 7, 10, 15, 16, 17, 24, 64)  # up to 16 known to the compiler
LENGTHS = (1, 17, TILE + 5)


def tokens(n: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advantages in which some tie, who is there, and a log_ratio that closes the gate for a third of the tokens."""
    g = generator(n * length)
    x = torch.randn(length, n, generator=g) + 0.5
    x = torch.where(torch.rand(length, n, generator=g) < 0.3, x[:, :1], x).to(dtype)
    return x, torch.rand(length, generator=g) < 0.8, 0.4 * torch.randn(length, generator=g)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", COUNTS)
def test_an_active_token_is_combined_to_its_smallest_advantage(instructions, n, dtype):
    """Not to the sum of shares of it, each of which is rounded."""
    for length in LENGTHS:
        x, mask, log_ratio = tokens(n, length, dtype)
        smallest = x.clamp(min=0).amin(-1)
        active = mask & (log_ratio <= 0.15)  # log(1.2) is 0.18
        options = {"mask": mask, "log_ratio": log_ratio, "level": "token"}
        assert_same_bits(combine(x, **options).advantages[active], smallest[active])
        spoilt = torch.cat([x, torch.full((1, n), torch.nan, dtype=dtype)])  # and its tile goes the careful way
        careful = combine(spoilt, level="token").advantages
        assert_same_bits(careful[:-1], smallest)
        assert careful[-1] == 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("n", COUNTS)
def test_a_token_without_data_is_a_token_behind_the_mask(instructions, n, in_place, weighted):
    """The fast way and the careful one, and both beside the reference."""
    for length in LENGTHS:
        x, mask, log_ratio = tokens(n, length)
        options = {"log_ratio": log_ratio, "level": "token"}
        if weighted:
            options["reward_weights"] = torch.linspace(0.5, 2.0, n)
        holes = torch.where(mask[:, None], x, torch.nan)
        exact = x.double()
        call, specification = (combine_, reference.combine_) if in_place else (combine, reference.combine)
        one, other = call(x, mask=mask, **options), call(holes, **options)
        expected = specification(exact, mask=mask, **options)
        if in_place:
            assert_same_bits(x, holes)
            assert_close(x, exact, what="contributions")
        else:
            assert_same_bits(one.advantages, other.advantages)
            assert_close(one.advantages, expected.advantages, what="advantages")
        assert_same_bits(one.value, other.value)
        for result in (one, other):
            assert_close(result.weights, expected.weights, what="weights")
            assert_close(result.value, expected.value, what="value")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_those_that_tie_share_evenly(instructions, dtype):
    for n in COUNTS:
        for ties in range(1, n + 1):
            x = torch.full((64, n), 2.0, dtype=dtype)
            x[:, :ties] = 1.0
            expected = torch.zeros(n, dtype=dtype)
            expected[:ties] = 1 / ties
            torch.testing.assert_close(combine(x, level="token").weights, expected, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("solver", ["closed_form", "min_norm"])
@pytest.mark.parametrize("n", COUNTS)
def test_a_token_is_combined_to_what_is_nearest_to_0(instructions, n, solver):
    """Between the smallest and the largest advantage; so the opposite advantages give the opposite."""
    for length in LENGTHS:
        x, _, _ = tokens(n, length)
        options = {"level": "token", "noon": False, "solver": solver}
        low, high = x.amin(-1), x.amax(-1)
        nearest = torch.where(low > 0, low, torch.where(high < 0, high, 0.0))
        assert_same_bits(combine(x, **options).advantages, nearest)
        assert_same_bits(combine(-x, **options).advantages + 0.0, -nearest + 0.0)
        infinite = x.clone()
        infinite[::3] *= torch.inf
        result = combine(infinite, **options, nan="propagate").advantages
        expected = reference.combine(infinite.double(), **options, nan="propagate").advantages
        assert_close(result[::3], expected[::3], what="with infinities")


@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("n", COUNTS)
def test_fixed_weights_are_the_same_at_every_level(instructions, n, noon):
    for length in LENGTHS:
        x, mask, log_ratio = tokens(n, length)
        weights = torch.linspace(-1.0, 2.0, n)
        options = {"mask": mask, "log_ratio": log_ratio, "solver": "fixed", "noon": noon, "reward_weights": weights}
        token, batch = combine(x, level="token", **options), combine(x, level="batch", **options)
        assert_same_bits(token.advantages + 0.0, batch.advantages + 0.0)


@settings(max_examples=40, **UNTIL_SHARED)
@given(
    n=st.integers(1, 20),
    length=st.integers(1, 70),
    noon=st.booleans(),
    in_place=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_what_another_token_lacks_changes_no_bit(instructions, n, length, noon, in_place, seed):
    """One NaN sends a tile the careful way: the tokens beside it must not notice."""
    g = generator(seed)
    x, log_ratio = torch.randn(length, n, generator=g), 0.4 * torch.randn(length, generator=g)
    x[torch.rand(length, n, generator=g) < 0.1] = -0.0
    at, spoilt = int(torch.randint(length, (), generator=g)), x.clone()
    spoilt[at, int(torch.randint(n, (), generator=g))] = torch.nan
    call = combine_ if in_place else combine
    one, other = (call(v, log_ratio=log_ratio, level="token", noon=noon) for v in (x, spoilt))
    rest = torch.arange(length) != at
    if in_place:
        assert_same_bits(spoilt[rest], x[rest])
    else:
        assert_same_bits(other.advantages[rest], one.advantages[rest])


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("level", ["batch", "sequence", "token"])
@pytest.mark.parametrize("spoilt", [torch.nan, torch.inf], ids=str)
def test_what_is_not_finite_does_not_matter_under_a_fixed_weight_of_0(spoilt, level):
    x = torch.randn(3, 40, 3, generator=generator(5), dtype=torch.float64).abs()
    x[..., 1] = spoilt
    options = {"solver": "fixed", "reward_weights": [0.25, 0.0, 0.75], "nan": "propagate", "level": level}
    result, expected = combine(x, **options), reference.combine(x, **options)
    torch.testing.assert_close(result.value, expected.value)
    torch.testing.assert_close(result.advantages, expected.advantages)
    assert result.value.isfinite().all() and result.advantages.isfinite().all()
