"""``policy_loss`` and ``value_loss`` beside the losses of verl 0.9.1 and TRL 1.16.0, by their own installed code."""

from __future__ import annotations

import pytest
import torch
from loss_cases import AGGREGATES, POLICY, VALUE, make, make_values
from released import installed, trl_grpo_loss, verl_policy_loss, verl_value_loss

from pama_ext import policy_loss, value_loss


def no_worse(ours, theirs, exact) -> None:
    """Our error is at most four times theirs in the same dtype, plus rounding."""
    for a, b, truth in zip(ours, theirs, exact, strict=True):
        error, other = ((x.double() - truth).abs().max() for x in (a, b))
        assert error <= 4 * other + 8 * torch.finfo(torch.float32).eps * truth.abs().max()


def problem(shape=(7, 60), **options):
    """Some tokens masked, some rows whole; no row without a token, on which trainers differ."""
    arguments = make(shape, **options)
    arguments["mask"][:, 0] = True
    arguments["mask"][3] = True
    return arguments


VERL = {
    "plain": {},
    "asymmetric": {"clip_low": 0.1, "clip_high": 0.28},
    "dual": {"dual_clip": 2.0},
    "global": {"normalizer": 500},
    "kl": {"kl_coef": 0.05, "ref": True},
}


@installed("verl")
@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("options", VERL.values(), ids=VERL)
def test_verl(options, aggregate):
    """Its ``compute_policy_loss_vanilla`` and ``agg_loss``, with ``clip_ratio_c`` 10 where none is meant."""
    if aggregate == "token-sum" and "normalizer" in options:
        return  # verl divides by nothing there
    arguments = problem(aggregate=aggregate, **options)
    loss, metrics, (gradient,) = POLICY.run(policy_loss, {"dual_clip": 10.0, **arguments})
    theirs, exact = (verl_policy_loss(**arguments, dtype=dtype) for dtype in (torch.float32, torch.float64))
    no_worse((loss, gradient), theirs[:2], exact[:2])
    ours = {
        "actor/pg_clipfrac": metrics.clip_fraction,
        "actor/ppo_kl": metrics.approx_kl,
        "actor/pg_clipfrac_lower": metrics.clip_fraction_dual,
    }
    for name, value in ours.items():
        assert value.item() == pytest.approx(exact[2][name], rel=1e-5, abs=1e-6), name


@installed("verl")
def test_verl_cispo():
    """Truncated importance weights; verl bounds them from below too, which a ``clip_ratio_low`` of 1 takes away."""
    arguments = problem(max_weight=1.5)
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    theirs, exact = (verl_policy_loss(**arguments, dtype=dtype) for dtype in (torch.float32, torch.float64))
    no_worse((loss, gradient), theirs[:2], exact[:2])
    assert metrics.clip_fraction.item() == pytest.approx(exact[2]["actor/pg_clipfrac"], rel=1e-5)


@installed("verl")
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_verl_value_loss(aggregate):
    arguments = make_values((7, 60), aggregate=aggregate)
    arguments["mask"][:, 0] = True
    loss, metrics, (gradient,) = VALUE.run(value_loss, arguments)
    theirs, exact = (verl_value_loss(**arguments, dtype=dtype) for dtype in (torch.float32, torch.float64))
    no_worse((loss, gradient), theirs[:2], exact[:2])
    assert metrics.clip_fraction.item() == pytest.approx(float(exact[2]), rel=1e-5)


@installed("trl")
@pytest.mark.parametrize("by_row", [True, False], ids=["rows", "tokens"])
@pytest.mark.parametrize("options", [{}, {"dual_clip": 2.0}, {"kl_coef": 0.05, "ref": True}], ids=str)
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo"])
def test_trl(loss_type, options, by_row):
    """``GRPOTrainer._compute_loss`` itself, fed with log-probabilities."""
    if loss_type == "cispo":
        options = {**{k: v for k, v in options.items() if k != "dual_clip"}, "max_weight": 1.5}
    longest, count = 100, 333
    aggregate, normalizer = {
        "grpo": ("seq-mean-token-mean", 7),
        "bnpo": ("token-mean", None),
        "dr_grpo": ("token-sum", 7 * longest),
        "dapo": ("token-sum", count),
        "luspo": ("seq-mean-token-sum", 7),
        "cispo": ("token-sum", torch.tensor(count)),
    }[loss_type]
    arguments = problem(aggregate=aggregate, normalizer=normalizer, by_row=by_row, **options)
    loss, metrics, (gradient,) = POLICY.run(policy_loss, arguments)
    theirs, exact = (
        trl_grpo_loss(**arguments, loss_type=loss_type, longest=longest, count=count, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    no_worse((loss, gradient), theirs[:2], exact[:2])
    logged = exact[2]
    if loss_type != "cispo":
        assert metrics.clip_fraction_low.item() == pytest.approx(logged["clip_ratio/low_mean"], rel=1e-5)
        assert metrics.clip_fraction.item() == pytest.approx(logged["clip_ratio/region_mean"], rel=1e-5)
    if "kl_coef" in options:
        assert metrics.ref_kl.item() == pytest.approx(logged["kl"], rel=1e-5)
