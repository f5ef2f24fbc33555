"""``min_norm`` and ``solver="min_norm"``: optimal by the KKT conditions and by brute force, whatever the matrix."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import DTYPES, LEVELS, TILE, make
from compare import assert_same_bits
from hypothesis import given
from hypothesis import strategies as st

from pama_ext import Normalize, combine, min_norm, reference


@st.composite
def vectors(draw, most: int = 64) -> torch.Tensor:
    """Rows of every awkward kind: few dimensions, duplicates, opposites, near neighbours, lengths far apart."""
    n, d = draw(st.integers(1, most)), draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["plain", "positive", "duplicates", "opposite", "near", "scales", "zero"]))
    if kind == "positive":
        x = x.abs()
    elif kind == "duplicates":
        x[n // 2 :] = x[: n - n // 2].clone()
    elif kind == "opposite" and n > 1:
        x[1] = -0.7 * x[0]
    elif kind == "near":
        x = x[:1] + 1e-5 * x
    elif kind == "scales":
        x = x * 10 ** (16 * torch.rand(n, 1, generator=generator, dtype=torch.float64) - 8)
    elif kind == "zero":
        x[0] = 0.0
    return x


def residual(gramian: torch.Tensor, weights: torch.Tensor) -> float:
    """How far (G c)_j may lie below c'Gc, which at the optimum it does nowhere; in units of |x_j| sum c_k |x_k|."""
    lengths = gramian.diagonal().clamp(min=0).sqrt()
    slopes, scale = gramian @ weights, lengths * (weights * lengths).sum()
    return float(((weights @ slopes - slopes) / scale.clamp(min=torch.finfo(torch.float64).tiny)).max())


def brute_force(x: torch.Tensor) -> float:
    """The least |sum c_i x_i|^2 over all supports, by least squares on the vectors themselves."""
    best = float("inf")
    for size in range(1, len(x) + 1):
        for support in itertools.combinations(range(len(x)), size):
            rows = x[list(support)]
            shifts = rows[1:] - rows[:1]
            shares = -torch.linalg.lstsq(shifts.T, rows[0][:, None], driver="gelsd").solution[:, 0]
            c = torch.cat([(1 - shares.sum()).reshape(1), shares]) if size > 1 else torch.ones(1, dtype=x.dtype)
            if (c >= -1e-12).all():
                c = c.clamp(min=0) / c.clamp(min=0).sum()
                best = min(best, float((c @ rows).square().sum()))
    return best


@given(vectors())
def test_it_satisfies_the_optimality_conditions(x):
    gramian = x @ x.T
    weights = min_norm(gramian)
    assert (weights >= 0).all() and weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert residual(gramian, weights) < 2e-12


@given(vectors(most=7))
def test_its_value_is_the_least_of_all_supports(x):
    weights = min_norm(x @ x.T)
    size = (weights @ x.norm(dim=1)).square().item()
    assert (weights @ x).square().sum().item() <= brute_force(x) + 1e-11 * size


@given(vectors(), st.randoms(use_true_random=False))
def test_a_permutation_permutes_it(x, random):
    order = list(range(len(x)))
    random.shuffle(order)
    gramian = x @ x.T
    weights, permuted = min_norm(gramian), min_norm(gramian[order][:, order])
    torch.testing.assert_close(permuted, weights[order], rtol=0, atol=1e-4)
    norms = [(c @ y).norm() for c, y in ((weights, x), (permuted, x[order]))]
    torch.testing.assert_close(*norms, rtol=1e-7, atol=1e-7 * float(weights @ x.norm(dim=1)))


@given(st.integers(3, 64), st.booleans(), st.integers(0, 2**20))  # two of one length cannot be told apart
def test_a_permutation_of_linearly_independent_vectors_changes_no_bit(n, alike, seed):
    """They are put in an order of their own first: by their lengths, and if those are alike by their products."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, n + 9, generator=generator, dtype=torch.float64) + 0.3
    if alike:
        x = x / x.norm(dim=1, keepdim=True)
    gramian = x @ x.T
    gramian = gramian.triu() + gramian.triu(1).T
    if alike:
        gramian.fill_diagonal_(1.0)
    order = torch.randperm(n, generator=generator)
    assert_same_bits(min_norm(gramian[order][:, order]), min_norm(gramian)[order])


@given(vectors(most=12))
def test_it_is_the_reference(x):
    gramian = x @ x.T
    ours, theirs = min_norm(gramian), reference.min_norm(gramian)
    scale = float(ours @ x.norm(dim=1))
    torch.testing.assert_close((ours @ x).norm(), (theirs @ x).norm(), rtol=1e-7, atol=1e-7 * scale)


@pytest.mark.parametrize("scale", [1e-100, 1e-8, 1.0, 1e8, 1e100])
def test_a_scale_changes_nothing(scale, device):
    x = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    gramian = (x @ x.T).to(device)
    torch.testing.assert_close(min_norm(gramian * scale), min_norm(gramian))


def test_orthogonal_vectors_over_sixteen_orders_of_magnitude(device):
    squares = 10.0 ** torch.arange(-16, 17, 4, dtype=torch.float64, device=device)
    weights = min_norm(squares.diag())
    torch.testing.assert_close(weights, (1 / squares) / (1 / squares).sum(), rtol=1e-11, atol=1e-30)


def test_duplicates_share_and_lengths_of_zero_take_all(device):
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 0.0]], dtype=torch.float64, device=device)
    weights = min_norm(x @ x.T)
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.2, 0.4], dtype=torch.float64, device=device))
    assert weights[0] == weights[2]
    x[1] = 0
    assert min_norm(x @ x.T).tolist() == [0, 1, 0]
    assert min_norm(torch.zeros(4, 4, device=device)).tolist() == [0.25] * 4


def test_symmetry_is_kept_where_the_minimum_is_not_unique(device):
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], dtype=torch.float64, device=device)
    torch.testing.assert_close(min_norm(x @ x.T), torch.full((4,), 0.25, dtype=torch.float64, device=device), atol=1e-4,
                               rtol=0)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(dtype, device):
    gramian = torch.tensor([[4.0, 1.0], [1.0, 2.0]]).to(device, dtype)
    weights = min_norm(gramian)
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert weights.device == gramian.device and weights.tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("shape", [(), (1,), (5,), (300,), (0,), (2, 3), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("n", [1, 3, 33])
def test_batches_of_any_shape_and_strides(shape, n, device):
    x = torch.randn(*shape, n, 50, generator=torch.Generator().manual_seed(0)).to(device)
    gramian = x @ x.mT
    weights = min_norm(gramian)
    assert weights.shape == (*shape, n)
    strided = torch.stack([gramian, gramian + 1], -1)[..., 0]
    assert_same_bits(min_norm(strided), weights)
    assert_same_bits(torch.ops.pama_ext.min_norm(gramian.reshape(-1, n, n)).reshape(weights.shape), weights)
    for index in itertools.product(*(range(min(size, 2)) for size in shape)):
        assert_same_bits(min_norm(gramian[index]), weights[index])


def test_only_the_upper_triangle_is_read(device):
    gramian = torch.tensor([[4.0, 1.0], [torch.nan, 2.0]], device=device)
    assert min_norm(gramian).tolist() == pytest.approx([0.25, 0.75])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_gives_nan_for_its_problem_alone(bad, device):
    gramian = torch.eye(3, device=device).repeat(2, 1, 1)
    gramian[1, 0, 2] = bad
    weights = min_norm(gramian)
    assert torch.isfinite(weights[0]).all() and torch.isnan(weights[1]).all()


def test_gradients_stop_here(device):
    gramian = torch.eye(3, device=device, requires_grad=True)
    assert not min_norm(gramian).requires_grad and not min_norm(gramian * 2).requires_grad


def test_it_compiles(device):
    gramian = torch.eye(3, device=device).repeat(4, 1, 1)
    assert torch.equal(torch.compile(min_norm, fullgraph=True)(gramian), min_norm(gramian))


BAD = [
    ([[1.0]], TypeError, "gramian: expected a tensor, got a list"),
    (torch.ones(2, 2).int(), TypeError, "gramian: expected float32, .* got torch.int32"),
    (torch.ones(2, 2).to_sparse(), TypeError, "gramian: expected a strided tensor"),
    (torch.ones(3), ValueError, r"gramian: expected \[..., N, N\], got \[3\]"),
    (torch.ones(3, 2), ValueError, r"gramian: expected \[..., N, N\], got \[3, 2\]"),
    (torch.ones(0, 0), ValueError, "gramian: expected N from 1 to 64, got 0"),
    (torch.ones(65, 65), ValueError, "gramian: expected N from 1 to 64, got 65"),
]


@pytest.mark.parametrize(("gramian", "exception", "message"), BAD, ids=lambda case: str(case)[:30])
def test_errors_name_the_argument(gramian, exception, message):
    with pytest.raises(exception, match=message):
        min_norm(gramian)


@pytest.mark.parametrize("level", [level for level in LEVELS if level != "token"])
@pytest.mark.parametrize("skip_inactive", [False, True])
@pytest.mark.parametrize("shape", [(12, 30, 4), (64, 10), (2, 700, 17)], ids=str)
def test_the_solver_takes_the_gram_matrix_of_the_tokens(shape, skip_inactive, level):
    def draw(s, g, d):
        return torch.randn(s, generator=g).to(d)

    problem = make(shape, torch.float64, draw=draw, solver="min_norm", level=level, skip_inactive=skip_inactive)
    result, expected = (f(problem.values, **problem.options) for f in (combine, reference.combine))
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(result.value, expected.value)
    torch.testing.assert_close(result.advantages, expected.advantages)
    if level == "batch":
        gated = problem.values.clamp(min=0) * (problem.options["log_ratio"] <= torch.tensor(1.2).log())[..., None]
        tokens = gated[problem.options["mask"]]
        torch.testing.assert_close(result.weights, min_norm(tokens.T @ tokens))
        torch.testing.assert_close(result.value, (tokens @ result.weights).square().mean().sqrt())


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("kind", ["plain", "scaled", "both signs", "a hole", "no objective is whole", "normalised"])
@pytest.mark.parametrize("n", [*range(1, 20), 32, 33])
def test_every_pair_of_objectives_is_in_the_gram_matrix(n, kind):
    """However they are dealt out, and whatever a tile holds. All of about one length and hardly correlated have a
    weight, so that each product counts."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(2 * TILE + 5, n, generator=g, dtype=torch.float64)
    x = x * (torch.rand(x.shape, generator=g) < 0.3) * torch.linspace(1, 1.05, n, dtype=torch.float64)
    options = {
        "mask": torch.rand(len(x), generator=g) < 0.9,
        "log_ratio": 0.2 * torch.randn(len(x), generator=g, dtype=torch.float64),
        "solver": "min_norm",
        "noon": kind != "both signs",
    }
    options["mask"][:n] = options["mask"][-1] = True
    if kind == "a hole":
        x[-1, n // 2] = torch.nan
    elif kind == "no objective is whole":
        x[:n].diagonal().fill_(torch.inf)
    elif kind == "normalised":
        options["normalize"] = Normalize(by="batch")
    if kind in ("normalised", "scaled"):
        options["reward_weights"] = torch.linspace(1.1, 1, n).tolist()
    result, expected = combine(x, **options), reference.combine(x, **options)
    assert (expected.weights > 0).all()
    for name in ("weights", "value", "advantages"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name))


def test_an_objective_that_is_never_active_takes_all_or_nothing():
    advantages = torch.tensor([[1.0, -1.0], [2.0, -1.0]])
    assert combine(advantages, solver="min_norm").weights.tolist() == [0, 1]
    assert combine(advantages, solver="min_norm", skip_inactive=True).weights.tolist() == [1, 0]


@pytest.mark.parametrize("noon", [True, False])
def test_for_one_token_it_is_the_closed_form(noon):
    advantages = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    ours, closed = (combine(advantages, noon=noon, level="token", solver=s) for s in ("min_norm", "closed_form"))
    assert torch.equal(ours.weights, closed.weights) and torch.equal(ours.advantages, closed.advantages)
    assert ours.value >= closed.value.abs()


def test_a_row_that_is_one_token_is_solved_as_one():
    """Its minimum is not unique where the signs differ: the closed form says which one it is."""
    advantages = torch.tensor([[1.0, -1.0, 2.0], [-2.0, -1.0, -1.0]])
    for function in (combine, reference.combine):
        ours, closed = (
            function(advantages, noon=False, level="sequence", solver=s) for s in ("min_norm", "closed_form")
        )
        assert torch.equal(ours.weights, closed.weights) and torch.equal(ours.value, closed.value.abs())
