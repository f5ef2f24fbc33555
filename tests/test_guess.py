"""At level "batch" the CPU kernel guesses the weights and combines while it observes; only wrong guesses are repaired.

What comes out may not depend on any guess. In place nothing is guessed, so `combine_` says what the bits have to be.
"""

from __future__ import annotations

import pytest
import torch
from compare import assert_same_bits
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pama_ext import Normalize, combine, combine_, reference

TILE = 1040
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
    assert_same_bits(out, 0.0 + shares[..., 0] + shares[..., 1] + shares[..., 2])


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_is_guessed(instructions, threads, options, scales):
    x, given_tokens = tokens(1)
    assert_guesses_do_not_show(x * torch.tensor(SCALES[scales]), **given_tokens, **options)


@pytest.mark.parametrize("turn", [1_000, 5_000, TOKENS // 2, TOKENS - 1_000])
def test_what_comes_late_may_decide(threads, turn):
    """Objective 0 looks smallest until `turn`; what follows is so large that objective 1 is."""
    x, given_tokens = tokens(2)
    x[:, 1] *= 2
    x[turn:, 0] += 1e5
    x[turn:, 2] += 1e6
    assert combine(x, **given_tokens).weights.tolist() == [0.0, 1.0, 0.0]
    assert_guesses_do_not_show(x, **given_tokens)


def test_a_guess_is_given_up():
    """The second and last tile mixes the signs, which leaves no objective alone: no guess stands any more."""
    x, given_tokens = tokens(6, 2 * TILE)
    x = x.abs()
    x[TILE:, 1] -= 50
    assert sorted(combine(x, noon=False, **given_tokens).weights.tolist())[1] > 0
    assert_guesses_do_not_show(x, noon=False, **given_tokens)


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("nan", ["ignore", "propagate"])
def test_what_is_not_finite_comes_late(nan, garbage):
    x, given_tokens = tokens(3)
    x[-5, 1] = garbage
    given_tokens["mask"][-5] = True
    assert_guesses_do_not_show(x, nan=nan, **given_tokens)


def test_where_nothing_is_left_for_a_second_pass():
    """Marks of samples without data survive a right guess: they are not among what `combined` is normalised by."""
    x, given_tokens = tokens(4)
    x *= torch.tensor([3.0, 1.0, 2.0])
    for options in ({}, {"solver": "fixed", "reward_weights": [0.5, 0.0, 1.0]}):
        options = {**given_tokens, **options, "normalize": Normalize(combined="batch")}
        expected = reference.combine(x.double(), **options)
        torch.testing.assert_close(combine(x, **options).advantages, expected.advantages.float())


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_order_of_events(threads, data):
    """Runs of tokens over which the objectives have any scale, so that guesses come, change and go."""
    x, given_tokens = tokens(5)
    cuts = sorted(data.draw(st.lists(st.integers(0, TOKENS), max_size=6)))
    scale = st.sampled_from([0.0, 0.5, 1.0, 1.001, 100.0, -1.0])
    for start, end in zip([0, *cuts], [*cuts, TOKENS], strict=True):
        x[start:end] *= torch.tensor(data.draw(st.lists(scale, min_size=3, max_size=3)))
    noon = data.draw(st.booleans())
    assert_guesses_do_not_show(x, noon=noon, **given_tokens)
