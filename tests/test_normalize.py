"""``Normalize``: what it refuses, and that the fused call computes the specification for every way to use it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cases import DTYPES, LEVELS, make, problems
from compare import assert_same_bits, assert_same_result
from doors import assert_matches, nearly_tied, on_threads
from hypothesis import assume, given
from hypothesis import strategies as st

import pama_ext
from pama_ext import Normalize, combine, combine_, reference
from pama_ext._combine import _combine_dispatcher

IDS = torch.tensor([0, 0, 1, 1])
X = torch.tensor([[1.0, 2.0], [3.0, 2.0], [0.0, 1.0], [4.0, 1.0]])

BAD = [
    ({"by": "rows"}, ValueError, "by: expected one of 'none', 'batch', 'group', got 'rows'"),
    ({"by": 3}, TypeError, "by: expected a str, got a int"),
    ({"over": "rows"}, ValueError, "over: expected one of 'tokens', 'row_sums'"),
    ({"eps_in": "mean"}, ValueError, "eps_in: expected one of 'std', 'var'"),
    ({"singleton": "one"}, ValueError, "singleton: expected one of 'zero', 'raw'"),
    ({"center": 1}, TypeError, "center: expected a bool"),
    ({"scale": "yes"}, TypeError, "scale: expected a bool"),
    ({"correction": 2}, ValueError, "correction: expected 0 or 1, got 2"),
    ({"correction": 1.0}, TypeError, "correction: expected an int"),
    ({"correction": True}, TypeError, "correction: expected an int"),
    ({"eps": -1e-9}, ValueError, "eps: expected a finite number >= 0"),
    ({"eps": float("nan")}, ValueError, "eps: expected a finite number >= 0"),
    ({"eps": float("inf")}, ValueError, "eps: expected a finite number >= 0"),
    ({"eps": "small"}, TypeError, "eps: expected a float"),
    ({"by": "group"}, ValueError, "group_size: expected one of group_size, group_ids, group_offsets"),
    ({"combined": "group"}, ValueError, "group_size: expected one of"),
    ({"combined": "rows"}, ValueError, "combined: expected one of"),
    ({"combined": None}, TypeError, "combined: expected a str"),
    ({"combined": Normalize()}, ValueError, r'combined: expected a Normalize\(by="batch"\)'),
    ({"combined": Normalize(by="group", group_size=2)}, ValueError, r'combined: expected a Normalize\(by="batch"\)'),
    ({"combined": Normalize(by="batch", group_size=2)}, ValueError, r'combined: expected a Normalize\(by="batch"\)'),
    ({"group_size": 0}, ValueError, "group_size: expected at least 1, got 0"),
    ({"group_size": 2.0}, TypeError, "group_size: expected an int"),
    ({"group_size": True}, TypeError, "group_size: expected an int"),
    ({"group_size": 2, "group_ids": IDS}, ValueError, "group_ids: expected at most one of"),
    ({"group_ids": [0, 0, 1, 1]}, TypeError, "group_ids: expected a tensor, got a list"),
    ({"group_ids": IDS.float()}, TypeError, "group_ids: expected one of .*int64.*, got torch.float32"),
    ({"group_ids": IDS.bool()}, TypeError, "group_ids: expected one of .*, got torch.bool"),
    ({"group_ids": IDS[None]}, ValueError, r"group_ids: expected one dimension, got \[1, 4\]"),
    ({"group_offsets": IDS.short()}, TypeError, "group_offsets: expected one of .*, got torch.int16"),
    ({"group_offsets": IDS[:0]}, ValueError, r"group_offsets: expected \[G \+ 1\]"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "exception", "message"), BAD, ids=lambda case: str(case)[:40])
def test_bad_options_are_refused_at_construction(options, exception, message):
    with pytest.raises(exception, match=message):
        Normalize(**options)


def test_it_is_frozen_and_takes_keywords_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Normalize().eps = 1.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        Normalize("group")  # type: ignore[misc]


def offsets(*values: int, dtype=torch.int64) -> Normalize:
    return Normalize(by="group", group_offsets=torch.tensor(values, dtype=dtype))


MISFITS = [
    (Normalize(by="group", group_size=3), "group_size that divides the 4 rows, got 3"),
    (Normalize(by="group", group_ids=IDS[:3]), "group_ids for each of 4 rows, got 3"),
    (Normalize(by="group", group_ids=IDS.to("meta")), "group_ids on cpu as advantages, got meta"),
    (offsets(1, 4), "offsets that start at 0"),
    (offsets(0, 3, 2, 4), "offsets that start at 0, ascend"),
    (offsets(0, 2), "ascend and end at 4"),
    (offsets(0, 5, dtype=torch.int32), "ascend and end at 4"),
    (offsets(0), "end at 4"),
]


@pytest.mark.parametrize(("normalize", "message"), MISFITS, ids=lambda case: str(case)[:40])
def test_groups_that_do_not_fit_are_refused_before_any_work(normalize, message, device):
    if device.type == "cuda" and normalize.group_offsets is not None:
        pytest.skip("offsets on a GPU are not looked at")
    x, out = X.clone(), torch.full((4,), 7.0)
    for call in (lambda: combine(x, normalize=normalize, out=out), lambda: combine_(x, normalize=normalize)):
        with pytest.raises(ValueError, match=f"normalize: expected.*{message}"):
            call()
    assert torch.equal(x, X) and (out == 7).all()


def test_a_normalised_combination_has_no_form_in_place():
    x = X.clone()
    with pytest.raises(ValueError, match="normalize: combined has no in-place form"):
        combine_(x, normalize=Normalize.trl(2))
    assert torch.equal(x, X)


def test_level_group_needs_groups():
    with pytest.raises(ValueError, match='level: "group" needs a normalize'):
        combine(X, level="group", normalize=Normalize(by="batch"))


@st.composite
def groups(draw, rows: int) -> dict:
    """Some description of groups of ``rows`` rows."""
    kind = draw(st.sampled_from(["size", "ids", "offsets"]))
    if kind == "size":
        return {"group_size": draw(st.sampled_from([d for d in range(1, rows + 1) if rows % d == 0] or [1]))}
    if kind == "offsets":
        cuts = sorted(draw(st.lists(st.integers(0, rows), max_size=4)))
        return {
            "group_offsets": torch.tensor([0, *cuts, rows], dtype=draw(st.sampled_from([torch.int32, torch.int64])))
        }
    dtype = draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16]))
    ids = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)), dtype=dtype)
    return {"group_ids": ids.sort().values if draw(st.booleans()) else ids}


@st.composite
def normalized(draw, values=None):
    """A problem with a Normalize. Normal values, so that means of positive parts do not tie by accident of rounding."""
    problem = draw(problems(nan=("ignore", "propagate")))
    seed = draw(st.integers(0, 2**20))
    noise = torch.randn(problem.values.shape, generator=torch.Generator().manual_seed(seed))
    keep = ~torch.isfinite(problem.values) | (draw(st.booleans()) & (problem.values > 2.5))
    values = torch.where(keep, problem.values, noise.to(problem.values.dtype))
    combined = draw(st.sampled_from(["none", "batch", "group", Normalize(by="batch", eps=1e-8, eps_in="var")]))
    by = draw(st.sampled_from(["none", "batch", "group"]))
    center = draw(st.booleans())
    normalize = Normalize(
        by=by, combined=combined, over=draw(st.sampled_from(["tokens", "row_sums"])), center=center,
        scale=draw(st.booleans()), correction=draw(st.sampled_from([0, 1])), eps=draw(st.sampled_from([1e-4, 0.1])),
        eps_in=draw(st.sampled_from(["std", "var"])), singleton=draw(st.sampled_from(["zero", "raw"])),
        **draw(groups(values.shape[0])),
    )  # fmt: skip
    options = {"level": draw(st.sampled_from([*LEVELS, "group"])), "normalize": normalize}
    if by != "none" and center:
        options["noon"] = True  # signed, centred means are all 0, and the weights then follow rounding alone
    return problem.but(values, **options)


@given(normalized())
def test_the_fused_call_computes_the_specification(problem):
    """In float64, to a hundred thousand roundings: what cancels in a mean is amplified by a small std."""
    problem = problem.but(problem.values.double())
    advantages, options = problem.call()
    expected = reference.combine(problem.values, **problem.options)
    result = combine(advantages, **options)
    for name, ours, theirs in zip(expected.stats._fields, result.stats, expected.stats, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)
    assume(not close_call(problem, expected))
    torch.testing.assert_close(result.weights, expected.weights, rtol=1e-7, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(result.value, expected.value, rtol=1e-7, atol=1e-9, equal_nan=True)
    torch.testing.assert_close(result.advantages, expected.advantages, rtol=1e-6, atol=1e-6, equal_nan=True)


def close_call(problem, expected) -> bool:
    """Whether rounding may decide who is extreme: the same specification with rounded advantages decides otherwise."""
    nudged = problem.values * (1 + 1e-13 * torch.randn(problem.values.shape, dtype=torch.float64))
    other = reference.combine(nudged, **problem.options)
    return not torch.allclose(other.weights, expected.weights, atol=1e-8, equal_nan=True) or not torch.allclose(
        other.advantages, expected.advantages, atol=1e-7, rtol=1e-7, equal_nan=True
    )


@given(normalized())
def test_both_doors_give_the_same_bits(problem):
    advantages, options = problem.call()
    eager, again = combine(advantages, **options), _combine_dispatcher(advantages, **options)
    for ours, theirs in zip([*eager[:3], *eager.stats], [*again[:3], *again.stats], strict=True):
        assert_same_bits(ours, theirs)


@given(normalized())
def test_in_place_adds_up_to_the_combination(problem):
    problem = problem.but(problem.values.double())
    options = {**problem.options, "normalize": dataclasses.replace(problem.options["normalize"], combined="none")}
    shares = problem.values.clone()
    combine_(shares, **options)
    torch.testing.assert_close(shares.sum(-1), combine(problem.values, **options).advantages, equal_nan=True)


@given(normalized(), st.randoms(use_true_random=False))
def test_what_is_masked_has_no_influence(problem, random):
    mask = torch.rand(problem.values.shape[:-1], generator=torch.Generator().manual_seed(random.getrandbits(20))) < 0.5
    poisoned = torch.where(mask[..., None], problem.values, torch.nan)
    clean = torch.where(mask[..., None], problem.values, 0.0)
    ours, theirs = (combine(v, **{**problem.options, "mask": mask}) for v in (poisoned, clean))
    assert_same_bits(ours.advantages, theirs.advantages)
    assert_same_bits(ours.weights, theirs.weights)
    assert (ours.advantages[~mask] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [*LEVELS, "group"])
@pytest.mark.parametrize("shape", [(64, 3), (1024, 5), (96, 40, 3), (8, 3000, 2), (4, 33, 20)], ids=str)
@pytest.mark.parametrize("how", ["size", "ids", "shuffled", "offsets", "batch", "row_sums"])
def test_every_kind_of_group_and_shape(how, shape, level, dtype, device):
    rows = shape[0]
    ids = torch.arange(rows) // 4
    described = {
        "size": {"group_size": 4},
        "ids": {"group_ids": ids},
        "shuffled": {"group_ids": ids[torch.randperm(rows, generator=torch.Generator().manual_seed(1))].int()},
        "offsets": {"group_offsets": torch.tensor([0, 1, 1, rows // 2, rows])},
    }
    normalize = Normalize(
        by="batch" if how == "batch" else "group",
        over="row_sums" if how == "row_sums" else "tokens",
        **described.get(how, {"group_size": 4}),
    )
    problem = make(shape, dtype, draw=lambda s, g, d: (1 + torch.randn(s, generator=g)).to(d), level=level)
    problem = problem.but(normalize=normalize).to(device)
    result = combine(problem.values, **problem.options)
    assert_matches(result, problem, weights=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [2, 4, 8, 16, 32, 64, 24])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_small_groups_of_one_size(n, size, dtype, instructions):
    """Of which the kernels take many at once, a group to a lane, and what is left in another way."""
    problem = make((300 * size, n), dtype, draw=lambda s, g, d: (1 + torch.randn(s, generator=g)).to(d))
    problem = problem.but(normalize=Normalize(by="group", group_size=size), mask=None)
    assert_matches(combine(problem.values, **problem.options), problem, weights=False)


def test_what_comes_late_may_be_far_from_what_came_first(instructions):
    """The square of what lies between them overflows, squares around the mean of either do not."""
    rewards = torch.zeros(6000, 2)
    rewards[3000:] = 1e20
    mask = torch.ones(6000, dtype=torch.bool)
    mask[1500:4500] = False  # more than is looked at at once
    options = {"noon": False, "solver": "fixed", "reward_weights": [1.0, 0.0]}
    result = combine(rewards, mask=mask, normalize=Normalize(by="batch", correction=0), **options)
    expected = torch.where(mask, torch.where(rewards[:, 0] > 0, 1.0, -1.0), 0.0)
    torch.testing.assert_close(result.advantages, expected)


def test_rewards_around_a_thousand_come_out_at_unit_scale(device):
    rewards = (1000 + torch.tensor([0.0, 0.01]).repeat(32, 1).T.reshape(-1, 1)).to(device)  # 32 of each
    ids = torch.arange(32, device=device).repeat(2)
    result = combine(rewards, normalize=Normalize(by="group", group_ids=ids, eps=0.0), noon=False)
    torch.testing.assert_close(result.advantages.abs(), torch.full((64,), 0.5**0.5, device=device))
    batch = combine(rewards, normalize=Normalize(by="batch", eps=0.0, correction=0), noon=False)
    torch.testing.assert_close(batch.advantages.abs(), torch.ones(64, device=device))


@pytest.mark.parametrize("value", [0.1, 1e-30, -3.3e38, 12345.678])
def test_a_constant_group_is_exactly_zero_and_counted(value, device):
    rewards = torch.randn(24, 2)
    rewards[8:16, 0] = value
    normalize = Normalize(by="group", group_size=8, eps=0.0)
    result = combine(rewards.to(device), normalize=normalize, noon=False, solver="fixed", reward_weights=[1.0, 0.0])
    assert (result.advantages[8:16] == 0).all() and (result.advantages[:8] != 0).all()
    assert result.stats.dead_groups.tolist() == [1, 0]


@pytest.mark.parametrize(("singleton", "first"), [("zero", 0.0), ("raw", 3.0 / 1.5)])
def test_the_only_usable_sample_of_a_group(singleton, first):
    rewards = torch.tensor([[3.0], [torch.nan], [1.0], [2.0]])
    normalize = Normalize(by="group", group_size=2, eps=0.5, singleton=singleton)
    result = combine(rewards, normalize=normalize, noon=False)
    assert result.advantages[0].item() == pytest.approx(first) and result.advantages[1] == 0
    assert result.stats.dead_groups.item() == (singleton == "zero")


def test_a_nan_stays_with_its_own_group_and_objective():
    rewards = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    broken = rewards.clone()
    broken[5, 1] = torch.nan
    normalize = Normalize(by="group", group_size=4)
    for i in range(3):
        options = {"normalize": normalize, "noon": False, "solver": "fixed", "reward_weights": torch.eye(3)[i]}
        clean, other = combine(rewards, **options).advantages, combine(broken, **options).advantages
        untouched = torch.ones(16, dtype=torch.bool)
        untouched[4:8] = i != 1
        assert torch.equal(clean[untouched], other[untouched]) and torch.isfinite(other).all()


def test_rows_without_a_usable_objective_give_zero():
    rewards = torch.tensor([[torch.nan, torch.nan], [1.0, 2.0], [2.0, torch.inf], [4.0, 4.0]])
    for normalize in (Normalize.trl(2), Normalize.trl_gdpo(2), Normalize(by="batch", combined="batch")):
        result = combine(rewards, normalize=normalize, solver="fixed", noon=False)
        assert result.advantages[0] == 0 and torch.isfinite(result.advantages).all()


@pytest.mark.parametrize("normalize", [None, Normalize(by="group", group_size=4)], ids=["plain", "grouped"])
def test_level_group_is_level_batch_on_each_group(normalize, device):
    described = normalize or Normalize(group_size=4)
    problem = make((12, 30, 3), torch.float64, draw=lambda s, g, d: torch.randn(s, generator=g).to(d)).to(device)
    result = combine(problem.values, **problem.options, level="group", normalize=described)
    for g in range(3):
        rows = slice(4 * g, 4 * g + 4)
        options = {name: tensor[rows] for name, tensor in problem.options.items()}
        alone = combine(problem.values[rows], **options, normalize=described)
        torch.testing.assert_close(result.weights[g], alone.weights)
        torch.testing.assert_close(result.advantages[rows], alone.advantages)


def test_statistics_are_the_same_bits_for_any_number_of_threads():
    rewards = torch.randn(4096, 8)
    normalize = Normalize(by="group", group_size=8, combined="batch")
    one, two = (on_threads(count, lambda: combine(rewards, normalize=normalize)) for count in (1, 2))
    assert_same_result(one, two)


def test_it_compiles_and_traces(device):
    normalize = Normalize(by="group", group_ids=(torch.arange(12) // 3).to(device), combined="batch")
    x = torch.randn(12, 3, device=device)
    compiled = torch.compile(lambda a: combine(a, normalize=normalize, level="group")[:3], fullgraph=True)
    for ours, theirs in zip(compiled(x), combine(x, normalize=normalize, level="group")[:3], strict=True):
        assert torch.equal(ours, theirs)


def test_nearly_tied_is_what_the_suite_uses():
    assert not nearly_tied(make((4, 3)))
    assert pama_ext.Normalize is Normalize
