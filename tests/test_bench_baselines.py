"""What a user would run instead computes what it claims to: the specification, or its own project's rule."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bench import sanitize, verify
from bench.baselines import eager, eager_loss
from pama_ext import Normalize, reference

NUMBA = importlib.util.find_spec("numba") is not None
GAMMA, LAM = 0.99, 0.95


def awkward(shape=(9, 7, 3)):
    """NaN and inf behind the mask and before it, one objective that is all NaN."""
    advantages, options = sanitize.inputs(shape, torch.float32)
    advantages[..., -1] = torch.nan
    return advantages, options


def check_baseline(function, advantages, options, **more):
    expected = reference.combine(advantages.double(), **options, **more)
    verify.combination(expected)(function(advantages, **options))


@pytest.mark.parametrize("level", ["batch", "token"])
@pytest.mark.parametrize("present", [(), ("mask",), ("log_ratio",), ("mask", "log_ratio")])
def test_eager_is_the_specification(level, present):
    advantages, options = awkward()
    if "mask" not in present:
        advantages = torch.where(options["mask"][..., None], advantages, torch.inf)
    function = {"batch": eager.by_batch, "token": eager.by_token}[level]
    check_baseline(function, advantages, {name: options[name] for name in present}, level=level)


@pytest.mark.skipif(not NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("shape", [(9, 7, 3), (256, 100, 3)], ids=["sequential", "parallel"])
def test_numba_is_the_specification(shape, threads):
    from bench.baselines.numba_loop import numba_loop

    check_baseline(numba_loop, *awkward(shape))
    if threads > 1 and shape[0] > 9:
        import numba

        assert numba.threading_layer()  # raises if no parallel loop ever ran


def test_specification_and_custom_op_are_the_reference():
    check_baseline(eager.specification, *awkward())
    clean = torch.randn(4, 2)
    torch.testing.assert_close(eager.custom_op(clean), reference.combine(clean).advantages)


def test_eager_group_norm_is_the_specification():
    rewards = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[:8, 1] = 2.0
    expected = reference.combine(rewards, normalize=Normalize(by="group", group_size=8))
    result = eager.by_group_norm(rewards, 8)
    verify.combination(expected)(result)
    assert result[3][-1].tolist() == expected.stats.dead_groups.tolist() == [0, 1, 0]


def test_eager_gae_and_its_pipeline_are_the_specification():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, 40, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    exact = reference.gae(rewards, values, gamma=GAMMA, lam=LAM)
    torch.testing.assert_close(eager.gae_scan(rewards, values, GAMMA, LAM), exact)
    expected = reference.combine(exact[0], normalize=Normalize(by="batch"))
    verify.combination(expected)(eager.gae_pipeline(rewards, values, GAMMA, LAM))


def test_metrics_of_the_eager_losses_are_the_specification():
    from bench.suites import loss

    t = loss.problem((5, 30), "cpu")
    _, metrics = eager_loss.policy(t.leaf, t.old, t.advantages, t.mask)
    _, expected = reference.policy_loss(t.leaf, t.old, t.advantages, mask=t.mask)
    high_or_low, low, _, *others = expected[:6]
    torch.testing.assert_close(metrics, (high_or_low, low, *others))
    _, metrics = eager_loss.value(t.values, t.old_values, t.returns, t.mask)
    _, expected = reference.value_loss(t.values, t.old_values, t.returns, mask=t.mask, clip=0.2)
    torch.testing.assert_close(metrics, tuple(expected))


@pytest.mark.parametrize("wrong", [1.001, torch.nan])
@pytest.mark.parametrize("field", ["combined", "weights", "value", "stats"])
def test_a_wrong_result_is_noticed(field, wrong):
    expected = reference.combine(torch.randn(40, 3, dtype=torch.float64))
    result = {"combined": expected.advantages, "weights": expected.weights, "value": expected.value,
              "stats": tuple(expected.stats)}  # fmt: skip
    verify.combination(expected)(tuple(result.values()))
    spoilt = result[field] * wrong if field != "stats" else (*result["stats"][:2], result["stats"][2] * wrong)
    with pytest.raises(AssertionError, match="std" if field == "stats" else field):
        verify.combination(expected)(tuple((result | {field: spoilt}).values()))
