"""At level "batch" the CPU kernel guesses the weights and combines while it observes; only wrong guesses are repaired.

What comes out may not depend on any guess. In place nothing is guessed, so `combine_` says what the bits have to be.
"""

from __future__ import annotations

import pytest
import torch
from cases import TILE
from compare import assert_same_bits, assert_same_result
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pama_ext import Normalize, combine, combine_, reference

TOKENS = 70_000  # several tiles to a part, several parts
SCALES = {
    "clear from the start": (3.0, 1.0, 2.0),
    "nearly equal": (1.0, 1.0, 1.0),
    "nothing to choose": (0.0, 0.0, 0.0),
}
OPTIONS = (
    {},
    {"noon": False},
    {"skip_inactive": True},
    {"reward_weights": [0.5, 2.0, 1.0]},
    {"solver": "fixed", "reward_weights": [0.25, 0.0, -3.0]},
    {"normalize": Normalize(by="batch")},
    {"nan": "propagate"},
)


def tokens(seed: int, count: int = TOKENS) -> tuple[Tensor, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator)
    mask = torch.rand(count, generator=generator) < 0.9
    return x, {"mask": mask, "log_ratio": 0.3 * torch.randn(count, generator=generator)}


def assert_guesses_do_not_show(x: Tensor, **options) -> None:
    out = torch.full(x.shape[:-1], torch.nan, dtype=x.dtype)
    guessed = combine(x, out=out, **options)
    shares = x.clone()
    unguessed = combine_(shares, **options)
    assert_same_bits(guessed.weights, unguessed.weights)
    assert_same_bits(guessed.value, unguessed.value)
    for ours, theirs in zip(guessed.stats, unguessed.stats, strict=True):
        assert_same_bits(ours, theirs)
    assert_same_bits(out, sum(shares.unbind(-1), start=torch.zeros_like(out)))


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_guessed(instructions, threads, options, scales):
    x, given_tokens = tokens(1)
    assert_guesses_do_not_show(x * torch.tensor(SCALES[scales]), **given_tokens, **options)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_other_dtypes(dtype, scales):
    x, given_tokens = tokens(1)
    assert_guesses_do_not_show((x * torch.tensor(SCALES[scales])).to(dtype), **given_tokens)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("by", [{}, {"by": "batch"}, {"by": "group", "group_size": 7}], ids=str)
def test_scores_of_rows(by, scales):
    x, given_tokens = tokens(1)
    rows = (x * torch.tensor(SCALES[scales])).view(700, 100, 3)
    given_tokens = {name: tensor.view(700, 100) for name, tensor in given_tokens.items()}
    assert_guesses_do_not_show(rows, normalize=Normalize(over="row_sums", **by), **given_tokens)


@pytest.mark.parametrize("scales", SCALES)
def test_objectives_by_themselves(threads, scales):
    x, given_tokens = tokens(1)
    x *= torch.tensor(SCALES[scales])
    expected = combine(x, **given_tokens)
    assert_same_result(combine(x.T.contiguous(), dim=0, **given_tokens), expected)
    assert_same_result(combine(list(x.T.contiguous()), **given_tokens), expected)


def test_out_may_stand_among_the_advantages(threads):
    """Column 0 of a tensor whose other columns are the objectives: what is written first is not what is read again."""
    x, given_tokens = tokens(7)
    table = torch.cat([torch.full((TOKENS, 1), torch.nan), x], -1)
    result = combine(table[:, 1:], out=table[:, 0], **given_tokens)
    assert_same_bits(table[:, 1:].contiguous(), x)
    assert_same_result(result, combine(x, **given_tokens))


@pytest.mark.parametrize("turn", [1_000, 2_000, TOKENS // 2, 65_700, TOKENS - 1_000])
def test_what_comes_late_may_decide(threads, turn):
    """Objective 0 is smallest until `turn`; what follows is so large that objective 1 is.

    The turn stands in a part's first tile; between two of its looks; beyond its last.
    """
    x, given_tokens = tokens(2)
    x *= torch.tensor([1.0, 2.0, 4.0])
    x[turn:, 0] += 1e5
    x[turn:, 2] += 1e6
    assert combine(x, **given_tokens).weights.tolist() == [0.0, 1.0, 0.0]
    assert_guesses_do_not_show(x, **given_tokens)


@pytest.mark.parametrize("tiles", [4, 16])
def test_a_guess_is_given_up(tiles):
    """At the second look, after four tiles, signs are mixed and no guess stands; the third leads back to the first."""
    x, _ = tokens(6, tiles * TILE - 600)  # one part
    x = x[:, :2].abs() * torch.tensor([3.0, 1.0])
    x[TILE : 2 * TILE, 1] -= 50
    x[4 * TILE : 5 * TILE, 1] += 50
    weights = combine(x, noon=False).weights
    assert (weights > 0).sum() == 2 if tiles == 4 else weights.tolist() == [0.0, 1.0]
    assert_guesses_do_not_show(x, noon=False)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("nan", ["ignore", "propagate"])
def test_what_is_not_finite_comes_late(nan, garbage):
    x, given_tokens = tokens(3)
    x[-5, 1] = garbage
    given_tokens["mask"][-5] = True
    assert_guesses_do_not_show(x, nan=nan, **given_tokens)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("solver", [{}, {"solver": "fixed", "reward_weights": [0.5, 0.0, 1.0]}], ids=str)
def test_what_has_no_data_stays_marked(scales, solver):
    """It is not among what the combination is normalised by."""
    x, given_tokens = tokens(4)
    x *= torch.tensor(SCALES[scales])
    options = {**given_tokens, **solver, "normalize": Normalize(combined="batch")}
    expected = reference.combine(x.double(), **options)
    torch.testing.assert_close(combine(x, **options).advantages, expected.advantages.float())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_order_of_events(threads, data):
    """Runs of tokens over which the objectives have any scale and offset, so that guesses come, change and go."""
    x, given_tokens = tokens(5)
    cuts = sorted(data.draw(st.lists(st.integers(0, TOKENS), max_size=6)))
    scale = st.lists(st.sampled_from([0.0, 0.5, 1.0, 1.001, 100.0]), min_size=3, max_size=3)
    offset = st.lists(st.sampled_from([0.0, 0.5, -0.5, 20.0]), min_size=3, max_size=3)
    for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        x[start:end] = x[start:end] * torch.tensor(data.draw(scale)) + torch.tensor(data.draw(offset))
    noon = data.draw(st.booleans())
    assert_guesses_do_not_show(x, noon=noon, **given_tokens)
