"""Few objectives, side by side or each by itself, are observed and combined in one walk over memory; others by way of
scratch.

Tokens with gaps between them go by way of scratch. The arithmetic is one, so all agree to the bit. AVX-512 walks over
up to four objectives, AVX2 over six; without them, the same is asked of what there is.
"""

from __future__ import annotations

import pytest
import torch
from cases import TILE
from compare import assert_same_bits, assert_same_result
from hypothesis import given, settings
from hypothesis import strategies as st
from test_plain_tiles import UNTIL_SHARED, generator

from pama_ext import Combined, Normalize, combine

COUNTS = (2, 3, 4, 5, 6, 7)
LEVELS = ("batch", "token")
LENGTHS = (TILE, TILE + 16, 3 * TILE, 4 * TILE + 5)  # the first tile is half as long if there are several
OTHERS = ({"skip_inactive": True}, {"noon": False}, {"nan": "propagate"}, {"solver": "min_norm"}, {"clip_high": 0.0})
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def tokens(n: int, length: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Advantages in which some tie, of which the last objective is the smallest, and mask and log_ratio."""
    g = generator(n * length)
    x = (torch.randn(length, n, generator=g) + 0.3) * torch.linspace(2, 1, n)
    x = torch.where(torch.rand(length, n, generator=g) < 0.2, x[:, :1], x).to(dtype)
    mask = torch.rand(length, generator=g) < 0.8
    return x, {"mask": mask, "log_ratio": (0.4 * torch.randn(length, generator=g)).to(dtype)}


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, in every other place of memory; what is between is no number."""
    return torch.stack([x, torch.full_like(x, -1 if x.dtype == torch.bool else torch.nan)], -1)[..., 0]


def by_way_of_scratch(x: torch.Tensor, **options) -> Combined:
    return combine([spread(column) for column in x.unbind(-1)], **options)


def assert_the_way_does_not_show(x: torch.Tensor, **options) -> None:
    expected = by_way_of_scratch(x, **options)
    columns = [column.clone() for column in x.unbind(-1)]
    assert_same_result(combine(x, **options), expected)
    assert_same_result(combine(columns, **options), expected)
    assert_same_result(combine([*columns[:-1], spread(columns[-1])], **options), expected)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", COUNTS)
def test_side_by_side_or_each_by_itself(n, dtype, level):
    for length in LENGTHS:
        x, given_tokens = tokens(n, length, dtype)
        weights = torch.linspace(0.3, 1.7, n)
        for options in ({}, {"reward_weights": weights}, {"solver": "fixed", "reward_weights": weights - 1}, *OTHERS):
            assert_the_way_does_not_show(x, level=level, **options, **given_tokens)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("log_ratio", [None, torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "mask", [None, torch.bool, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float64], ids=str
)
def test_what_stands_beside_them(mask, log_ratio, level):
    x, given_tokens = tokens(3, 4 * TILE)
    options = {}
    if mask is not None:
        options["mask"] = given_tokens["mask"].to(mask) * (-128 if mask == torch.int8 else 1)
    if log_ratio is not None:
        options["log_ratio"] = given_tokens["log_ratio"].to(log_ratio)
    assert_the_way_does_not_show(x, level=level, **options)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("level", LEVELS)
def test_wherever_they_start(level):
    """Nothing has to be aligned, and what stands with gaps goes by way of scratch."""
    length = 4 * TILE
    x, given_tokens = tokens(3, length + 4)
    for first in range(4):
        rows = slice(first, first + length)
        beside = {name: tensor[rows] for name, tensor in given_tokens.items()}
        expected = by_way_of_scratch(x[rows], level=level, **beside)
        columns = [torch.cat([column[:first], column])[first:] for column in x[rows].unbind(-1)]
        assert_same_result(combine(x[rows], level=level, **beside), expected)
        assert_same_result(combine(columns, level=level, **beside), expected)
        for step in (1, 2):
            out = torch.full((length * step + 5,), 7.0)
            place = out[first : first + length * step : step]
            for advantages in (x[rows], columns):
                combine(advantages, level=level, out=place, **beside)
                assert_same_bits(place.clone(), expected.advantages)
                place.fill_(7.0)
                assert (out == 7).all()
    expected = combine(x, level=level, **given_tokens)
    for name, tensor in given_tokens.items():
        with_gaps = {**given_tokens, name: torch.stack([tensor, tensor.flip(0)], -1)[:, 0]}
        assert_same_result(combine(x, level=level, **with_gaps), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("gap", [0, 1, 16])
def test_rows_with_gaps(gap, level):
    rows, cols = 2, 3 * TILE
    x, given_tokens = tokens(3, rows * cols)
    expected = combine(x.view(rows, cols, 3), level=level, **{k: v.view(rows, cols) for k, v in given_tokens.items()})
    wide = torch.full((rows, cols + gap, 3), torch.nan)
    wide[:, :cols] = x.view(rows, cols, 3)
    beside = {}
    for name, tensor in given_tokens.items():
        beside[name] = torch.zeros(rows, cols + gap, dtype=tensor.dtype)[:, :cols]
        beside[name][:] = tensor.view(rows, cols)
    assert_same_result(combine(wide[:, :cols], level=level, **beside), expected)
    columns = [column.clone()[:, :cols] for column in wide.unbind(-1)]
    assert_same_result(combine(columns, level=level, **beside), expected)
    assert_same_result(combine([columns[0].clone(), *columns[1:]], level=level, **beside), expected)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["mask", "int64 mask", "log_ratio", "out", "objectives", "one of them"])
def test_one_tensor_whose_rows_have_gaps(name, level):
    """As a response's part of the mask of prompt and response has; what has none is walked over where it can be."""
    rows, cols = 5, TILE + 48
    x, given_tokens = tokens(3, rows * cols)
    beside = {key: tensor.view(rows, cols) for key, tensor in given_tokens.items()}
    expected = by_way_of_scratch(x.view(rows, cols, 3), level=level, **beside)

    def with_gaps(tensor: torch.Tensor) -> torch.Tensor:
        wide = torch.ones(rows, cols + 7, *tensor.shape[2:], dtype=tensor.dtype)
        wide[:, 7:] = tensor
        return wide[:, 7:]

    x = x.view(rows, cols, 3)
    columns = [column.clone() for column in x.unbind(-1)]
    if name == "int64 mask":
        beside["mask"] = with_gaps(beside["mask"].long())
    elif name == "out":
        beside["out"] = with_gaps(torch.zeros(rows, cols))
    elif name == "objectives":
        x = with_gaps(x)
    elif name == "one of them":
        columns[1] = with_gaps(columns[1])
    else:
        beside[name] = with_gaps(beside[name])
    for advantages in (x, columns):
        assert_same_result(combine(advantages, level=level, **beside), expected)
    if name == "out":
        assert (beside["out"]._base[:, :7] == 1).all()


@pytest.mark.parametrize("level", ["batch", "token", "group"])
@pytest.mark.parametrize("by", ["none", "batch", "group"])
@pytest.mark.parametrize("over", ["tokens", "row_sums"])
def test_what_is_not_the_advantages_themselves(over, by, level):
    """Scores of rows, groups that stand in any order: one long row, and several."""
    for rows in (1, 3):
        x, given_tokens = tokens(2, rows * 3 * TILE)
        beside = {name: tensor.view(rows, -1) for name, tensor in given_tokens.items()}
        ids = torch.tensor([1, 0, 1])[:rows] if by == "group" or level == "group" else None
        normalize = Normalize(over=over, by=by, group_ids=ids)
        assert_the_way_does_not_show(x.view(rows, -1, 2), level=level, normalize=normalize, **beside)


@pytest.mark.parametrize("level", ["batch", "sequence", "group"])
def test_statistics_alone(level):
    """Where the combination waits for a solve: of a row, or because what ties cannot be guessed."""
    x, given_tokens = tokens(3, 6 * TILE)
    x[:, 1] = x[:, 2]
    for rows in (1, 2):
        beside = {name: tensor.view(rows, -1) for name, tensor in given_tokens.items()}
        normalize = Normalize(group_ids=torch.tensor([7, 5])[:rows]) if level == "group" else None
        assert_the_way_does_not_show(x.view(rows, -1, 3), level=level, normalize=normalize, **beside)


@pytest.mark.parametrize("level", LEVELS)
def test_many_parts(threads, level):
    """And more than a cache of the core holds."""
    x, given_tokens = tokens(3, 100_000)
    assert_the_way_does_not_show(x, level=level, **given_tokens)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 3e38], ids=str)
def test_what_is_not_finite_is_left_to_others(garbage, level):
    """In a tile that has been walked over in part; and behind the mask it is nothing."""
    x, given_tokens = tokens(3, 4 * TILE)
    for at in (5, TILE, 2 * TILE + 7, 4 * TILE - 1):
        for valid in (True, False):
            spoilt = x.clone()
            spoilt[at, 1] = garbage
            given_tokens["mask"][at] = valid
            assert_the_way_does_not_show(spoilt, level=level, **given_tokens)
            if not valid:
                assert_same_result(
                    combine(spoilt, level=level, **given_tokens), combine(x, level=level, **given_tokens)
                )


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", range(2, 18))
def test_what_the_last_token_decides(n, dtype):
    """All that came before it was combined under another guess, and is combined again: whichever of them it is."""
    scaled = {"reward_weights": torch.linspace(1, 1.01, n)}
    for of, length in ((n - 1, 5 * TILE), (n // 2, 4 * TILE + 5), (0, 3 * TILE)):
        x, given_tokens = tokens(n, length, dtype)
        smallest = x.abs().roll(of, 1)
        smallest[:, of - 1] *= 0.1
        given_tokens["mask"][-1], given_tokens["log_ratio"][-1] = True, 0.0
        assert combine(smallest, **given_tokens).weights[of - 1] == 1
        smallest[-1] = 6e4
        smallest[-1, of] = 0
        assert combine(smallest, **given_tokens).weights[of] == 1
        assert_the_way_does_not_show(smallest, **given_tokens)
        assert_the_way_does_not_show(smallest, **scaled, **given_tokens)
        smallest[7, of] = torch.nan
        assert_the_way_does_not_show(smallest, **scaled, **given_tokens)


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("nan", ["ignore", "propagate"])
@pytest.mark.parametrize("noon", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 15, 16, 17])
def test_one_of_them_alone(n, noon, nan):
    """Which is all that is read where the others have no weight: whatever its weight is, and whatever is not valid."""
    x, given_tokens = tokens(n, 2 * TILE + 48)
    x[::3] = -0.0
    x[~given_tokens["mask"]] = torch.nan
    rows = {name: tensor.view(2, -1) for name, tensor in given_tokens.items()}
    for of in {0, n // 2, n - 1}:
        for weight in (1.0, -1.5, torch.inf, torch.nan):
            fixed = {"solver": "fixed", "reward_weights": torch.zeros(n), "level": "sequence"}
            fixed["reward_weights"][of] = weight
            assert_the_way_does_not_show(x.view(2, -1, n), noon=noon, nan=nan, **fixed, **rows)
            rows["mask"] = rows["mask"].long()


@settings(max_examples=300, **UNTIL_SHARED)
@given(
    n=st.sampled_from(COUNTS),
    length=st.sampled_from(LENGTHS[1:]),
    level=st.sampled_from(LEVELS),
    dtype=st.sampled_from(DTYPES),
    options=st.fixed_dictionaries({"nan": st.sampled_from(("ignore", "propagate")), "noon": st.booleans()}),
    skip_inactive=st.booleans(),
    weights=st.lists(st.sampled_from((-1.0, 0.0, 1e-20, 0.5, 1.0, 3.0)), min_size=COUNTS[-1], max_size=COUNTS[-1]),
    fixed=st.booleans(),
    holes=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_any_call(n, length, level, dtype, options, skip_inactive, weights, fixed, holes, seed):
    g = generator(seed)
    x = (torch.randn(length, n, generator=g) * torch.rand(n, generator=g) * 3).to(dtype)
    x[torch.randint(length, (holes,), generator=g)] = torch.nan
    x[torch.rand(length, n, generator=g) < 0.1] = -0.0
    options["mask"] = torch.rand(length, generator=g) < torch.rand((), generator=g)
    options["log_ratio"] = (0.4 * torch.randn(length, generator=g)).to(dtype)
    if fixed:
        options |= {"solver": "fixed", "reward_weights": weights[:n]}
    else:
        options |= {"skip_inactive": skip_inactive, "reward_weights": [abs(weight) for weight in weights[:n]]}
    assert_the_way_does_not_show(x, level=level, **options)
