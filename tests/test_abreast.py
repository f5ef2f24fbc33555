"""Many objectives side by side are observed with a lane for each; stored in any other way, they go by way of scratch.

The arithmetic is one, so both agree to the bit. Lanes are 2 to 16; with AVX2 what is left over takes 1, 2 or 4.
"""

from __future__ import annotations

import pytest
import torch
from cases import SHORT_TILE, TILE
from compare import assert_close, assert_same_bits, assert_same_result
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plain_tiles import UNTIL_SHARED, generator

from pama_ext import Combined, combine, reference

COUNTS = (4, 7, 8, 9, 10, 11, 12, 13, 15, 16, 17, 20, 24, 31, 32, 33, 63, 64)
# Odd numbers of vectors; two tiles that are one part, of however many objectives; parts.
LENGTHS = (SHORT_TILE - 24, SHORT_TILE - 32, SHORT_TILE + 112, 2 * TILE + 8, 5 * TILE + 5)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def by_way_of_scratch(x: torch.Tensor, **options) -> Combined:
    return combine([column.clone() for column in x.unbind(-1)], **options)


def tokens(n: int, length: int, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """Advantages of which the last objective is the smallest, and mask and log_ratio."""
    g = generator(seed + n * length)
    x = ((torch.randn(length, n, generator=g) + 0.3) * torch.linspace(2, 1, n)).to(dtype)
    mask = torch.rand(length, generator=g) < 0.8
    return x, {"mask": mask, "log_ratio": (0.4 * torch.randn(length, generator=g)).to(dtype)}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COUNTS)
def test_a_lane_for_each(n, dtype):
    for length in LENGTHS:
        x, given_tokens = tokens(n, length, dtype)
        for options in ({}, {"reward_weights": torch.linspace(0.3, 1.7, n)}, {"clip_high": 0.0}):
            for which in (given_tokens, {**given_tokens, "mask": None}, {**given_tokens, "log_ratio": None}):
                assert_same_result(combine(x, **options, **which), by_way_of_scratch(x, **options, **which))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [8, 10, 12, 16])
@pytest.mark.parametrize("other", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_a_tile_that_is_not_plain(n, other):
    """In the first tile, a later one, the last; for the first objective, one left over, all; masked it is nothing."""
    length = 6 * TILE
    for at in (3, TILE + 400, length - 1):
        for objective in (0, n - 1, slice(None)):
            x, given_tokens = tokens(n, length)
            x[at, objective] = other
            for valid in (True, False):
                given_tokens["mask"][at] = valid
                for options in ({}, {"reward_weights": torch.linspace(0.5, 2, n)}):
                    result = combine(x, **options, **given_tokens)
                    assert_same_result(result, by_way_of_scratch(x, **options, **given_tokens))
                    assert result.stats.nonfinite.any() == (valid and other != 3e38)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [8, 10, 16, 32])
def test_a_sequence_that_begins_behind_the_mask(n):
    """So that centres are wanted late, or of few tokens; or begins elsewhere, far from where it goes on."""
    length = 5 * TILE
    for hidden in (SHORT_TILE // 2, TILE, 2 * TILE - 1, length):
        x, given_tokens = tokens(n, length)
        given_tokens["mask"][:hidden] = False
        assert_same_result(combine(x, **given_tokens), by_way_of_scratch(x, **given_tokens))
        x[:hidden] += 1e4
        given_tokens["mask"][: hidden // 2] = True
        assert_same_result(combine(x, **given_tokens), by_way_of_scratch(x, **given_tokens))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [8, 10, 24])
def test_zeros_of_either_sign(n):
    """The smallest and the largest of them have one sign, whoever looks first."""
    x, given_tokens = tokens(n, 3 * TILE)
    x = torch.where(x < 0, -0.0, torch.where(x < 0.5, 0.0, x))
    for rows in (x, -x):
        result, expected = combine(rows, **given_tokens), by_way_of_scratch(rows, **given_tokens)
        for field in ("min", "max"):
            assert_same_bits(getattr(result.stats, field), getattr(expected.stats, field))
            zeros = getattr(result.stats, field) == 0
            assert zeros.all() == (field == ("min" if rows is x else "max"))
            assert not getattr(result.stats, field)[zeros].signbit().any()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [8, 10, 16])
def test_what_overflows_once_it_is_weighted(n):
    """Is a number as it was given, and none as A_i."""
    x, given_tokens = tokens(n, 3 * TILE)
    x[TILE + 5] = 3e38
    given_tokens["mask"][TILE + 5] = True
    weights = torch.linspace(4, 5, n)
    result = combine(x, reward_weights=weights, **given_tokens)
    assert_same_result(result, by_way_of_scratch(x, reward_weights=weights, **given_tokens))
    assert not result.stats.nonfinite.any() and result.advantages[TILE + 5].isinf()


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [8, 10, 16, 33, 64])
def test_statistics_are_those_of_the_specification(n):
    x, given_tokens = tokens(n, SHORT_TILE + 112 if n > 16 else 7 * TILE)
    x += torch.linspace(-3, 3, n)
    result, eager = combine(x, **given_tokens), reference.combine(x, **given_tokens)
    exact = {key: value if key == "mask" else value.double() for key, value in given_tokens.items()}
    expected = reference.combine(x.double(), **exact)
    for field in ("count", "nonfinite", "positive", "min", "max", "clipped"):
        assert_close(getattr(result.stats, field), getattr(expected.stats, field).double(), what=field)
    for field in ("mean", "std", "active_mean"):
        ours, theirs, baseline = (getattr(of.stats, field) for of in (result, expected, eager))
        assert_close(ours, theirs, baseline, what=field)
    assert_close(result.weights, expected.weights, eager.weights)
    assert_close(result.advantages, expected.advantages, eager.advantages)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("n", [8, 10, 16])
@pytest.mark.parametrize("wanted", [1, 2, 3], ids=str)
def test_what_is_combined_meanwhile(n, wanted):
    """One objective, from where it stands; several, by way of scratch; at each level that has statistics of its own."""
    x, given_tokens = tokens(n, 4 * TILE)
    rows = {key: value.view(2, -1) for key, value in given_tokens.items()}
    weights = torch.zeros(n)
    weights[-wanted:] = torch.linspace(0.5, 1, wanted)
    for options in ({"solver": "fixed", "reward_weights": weights}, {"reward_weights": 3 - weights}):
        assert_same_result(combine(x, **options, **given_tokens), by_way_of_scratch(x, **options, **given_tokens))
        by_rows = {"level": "sequence", **options, **rows}
        assert_same_result(combine(x.view(2, -1, n), **by_rows), by_way_of_scratch(x.view(2, -1, n), **by_rows))


@pytest.mark.parametrize("n", [8, 10, 16, 64])
def test_threads_change_no_bit(threads, n):
    """Nor do parts: a first tile of which nothing counts, one with a number that is not finite."""
    x, given_tokens = tokens(n, 1 << 15)
    x[12345, 1] = torch.nan
    given_tokens["mask"][: 1 << 12] = False
    result = combine(x, **given_tokens)
    torch.set_num_threads(1)
    assert_same_result(result, by_way_of_scratch(x, **given_tokens))
    assert_same_result(result, combine(x, **given_tokens))


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_of_many_is_combined_alone(dtype):
    """Wherever it stands among them, and of however many: up to the last token, behind which nothing might be."""
    for n in (*range(2, 20), 31, 32, 33, 64):
        for length in (1, 8, 16, 17, 48, SHORT_TILE + 8):
            x, given_tokens = tokens(n, length, dtype)
            mask = given_tokens["mask"]
            for alone in (0, n // 2, n - 1):
                weights = torch.zeros(n, dtype=dtype)
                weights[alone] = 0.5
                result = combine(x, mask=mask, solver="fixed", reward_weights=weights)
                expected = torch.where(mask, 0.5 * x[:, alone].clamp(min=0), 0)
                assert_same_bits(result.advantages, expected)


@settings(max_examples=60, **UNTIL_SHARED)
@given(
    n=st.integers(4, 64),
    vectors=st.integers(1, 6 * SHORT_TILE // 8),
    more=st.sampled_from([0, 0, 0, 1, 7]),
    dtype=st.sampled_from(DTYPES),
    mask_dtype=st.sampled_from([None, torch.bool, torch.int64, torch.float32]),
    ratio_dtype=st.sampled_from([None, *DTYPES]),
    weighted=st.booleans(),
    spoilt=st.integers(0, 2),
    seed=st.integers(0, 2**31),
)
def test_where_objectives_stand_changes_no_bit(
    instructions, n, vectors, more, dtype, mask_dtype, ratio_dtype, weighted, spoilt, seed
):
    length = 8 * vectors + more
    x, given_tokens = tokens(n, length, dtype, seed=seed)
    g = generator(seed)
    for _ in range(spoilt):
        x[torch.randint(length, (), generator=g), torch.randint(n, (), generator=g)] = torch.nan
    options = {
        "mask": None if mask_dtype is None else given_tokens["mask"].to(mask_dtype),
        "log_ratio": None if ratio_dtype is None else given_tokens["log_ratio"].to(ratio_dtype),
        "reward_weights": (0.2 + torch.rand(n, generator=g)) if weighted else None,
    }
    assert_same_result(combine(x, **options), by_way_of_scratch(x, **options))
