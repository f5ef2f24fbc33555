"""Every way to call the losses wrongly: what is said, by which check, and that the eager door declines it."""

from __future__ import annotations

import pytest
import torch
from loss_cases import POLICY, VALUE

from pama_ext import _C, policy_loss, value_loss

X, ROWS, MANY = torch.randn(4, 5), torch.randn(4), torch.randn(4, 5, 3)
META = torch.ones(4, 5, device="meta")
TE, VE = TypeError, ValueError
POLICY_ERRORS = [
    ({"log_probs": [X]}, TE, "log_probs: expected a tensor, got a list"),
    ({"log_probs": X.long()}, TE, "log_probs: expected float32, float64, float16 or bfloat16, got torch.int64"),
    ({"log_probs": X.to_sparse()}, TE, "log_probs: expected a strided tensor"),
    ({"log_probs": ROWS}, VE, r"log_probs: expected \[B, T\], got \[4\]"),
    ({"log_probs": MANY}, VE, r"log_probs: expected \[B, T\], got \[4, 5, 3\]"),
    ({"old_log_probs": None}, TE, "old_log_probs: expected a tensor, got a NoneType"),
    ({"old_log_probs": X[:, :4]}, VE, r"old_log_probs: expected the shape of log_probs \[4, 5\], got \[4, 4\]"),
    ({"old_log_probs": X.int()}, TE, "old_log_probs: expected float32"),
    ({"old_log_probs": META}, VE, "old_log_probs: expected device cpu as log_probs, got meta"),
    ({"advantages": None}, VE, "advantages: expected either these or objective_advantages"),
    ({"objective_advantages": MANY}, VE, "advantages: expected either these or objective_advantages"),
    ({"advantages": 1.0}, TE, "advantages: expected a tensor, got a float"),
    ({"advantages": X.bool()}, TE, "advantages: expected float32.*got torch.bool"),
    ({"advantages": X[:, :4]}, VE, r"advantages: expected \[4, 5\] or \[4\], got \[4, 4\]"),
    ({"advantages": MANY}, VE, r"advantages: expected \[4, 5\] or \[4\], got \[4, 5, 3\]"),
    ({"advantages": X[0]}, VE, r"advantages: expected \[4, 5\] or \[4\], got \[5\]"),
    ({"advantages": META}, VE, "advantages: expected device cpu as log_probs, got meta"),
    ({"mask": [1]}, TE, "mask: expected a tensor, got a list"),
    ({"mask": ROWS}, VE, r"mask: expected the shape of log_probs \[4, 5\], got \[4\]"),
    ({"mask": X.to(torch.complex64)}, TE, "mask: expected a bool, integer or floating"),
    ({"mask": META}, VE, "mask: expected device cpu as log_probs, got meta"),
    ({"clip_low": "a"}, TE, "clip_low: expected a float, got a str"),
    ({"clip_low": -0.1}, VE, "clip_low: expected a clip range >= 0, got -0.1"),
    ({"clip_high": float("nan")}, VE, "clip_high: expected a clip range >= 0, got nan"),
    ({"clip_high": True}, TE, "clip_high: expected a float, got a bool"),
    ({"clip_high": None}, TE, "clip_high: expected a float, got a NoneType"),
    ({"dual_clip": 1.0}, VE, "dual_clip: expected a number > 1, got 1.0"),
    ({"dual_clip": "3"}, TE, "dual_clip: expected a float, got a str"),
    ({"dual_clip": 3.0, "max_weight": 2.0}, VE, "dual_clip: expected none beside max_weight"),
    ({"max_weight": 0.0}, VE, "max_weight: expected a finite number > 0, got 0.0"),
    ({"max_weight": float("inf")}, VE, "max_weight: expected a finite number > 0, got inf"),
    ({"max_weight": [2.0]}, TE, "max_weight: expected a float, got a list"),
    ({"kl_coef": 0.1}, VE, "ref_log_probs: expected them for kl_coef 0.1, got None"),
    ({"kl_coef": -0.1}, VE, "kl_coef: expected a finite number >= 0, got -0.1"),
    ({"kl_coef": float("inf")}, VE, "kl_coef: expected a finite number >= 0, got inf"),
    ({"kl_coef": 10**400}, VE, "kl_coef: expected a number that a float holds"),
    ({"normalizer": 10**400}, VE, "normalizer: expected a number that a float holds"),
    ({"kl_coef": "0"}, TE, "kl_coef: expected a float, got a str"),
    ({"ref_log_probs": ROWS}, VE, r"ref_log_probs: expected the shape of log_probs \[4, 5\], got \[4\]"),
    ({"ref_log_probs": X.int()}, TE, "ref_log_probs: expected float32"),
    ({"ref_log_probs": META}, VE, "ref_log_probs: expected device cpu as log_probs, got meta"),
    ({"aggregate": "mean"}, VE, "aggregate: expected one of 'token-mean', .*got 'mean'"),
    ({"aggregate": None}, TE, "aggregate: expected a str, got a NoneType"),
    ({"aggregate": "token-mean\udc80"}, VE, "aggregate: expected one of"),
    ({"normalizer": -1}, VE, "normalizer: expected a finite number >= 0, got -1"),
    ({"normalizer": float("nan")}, VE, "normalizer: expected a finite number >= 0, got nan"),
    ({"normalizer": "1"}, TE, "normalizer: expected a float, got a str"),
    ({"normalizer": True}, TE, "normalizer: expected a float, got a bool"),
    ({"normalizer": torch.ones(2)}, VE, r"normalizer: expected a tensor of one element, got \[2\]"),
    ({"normalizer": torch.tensor(1, dtype=torch.int16)}, TE, "normalizer: expected a floating tensor or 32 or 64 bit"),
    ({"normalizer": torch.tensor(True)}, TE, "normalizer: expected a floating tensor or 32 or 64 bit"),
    ({"normalizer": torch.ones((), device="meta")}, VE, "normalizer: expected device cpu as log_probs, got meta"),
    ({"weights": [1.0]}, VE, "weights: expected none without objective_advantages"),
]
OBJECTIVE_ERRORS = [
    ({"objective_advantages": 1.0}, TE, "objective_advantages: expected a tensor, or a sequence or dict"),
    ({"objective_advantages": []}, VE, "objective_advantages: expected at least one objective"),
    ({"objective_advantages": [X, 2]}, TE, r"objective_advantages\[1\]: expected a tensor, got a int"),
    (
        {"objective_advantages": [X, ROWS]},
        VE,
        r"objective_advantages\[1\]: expected one shape for all, got \[4, 5\] before and \[4\]",
    ),
    ({"objective_advantages": {"a": X, "b": X.half()}}, TE, r"objective_advantages\['b'\]: expected one dtype for all"),
    ({"objective_advantages": {1: X}}, TE, r"objective_advantages: expected str keys, got \(1,\)"),
    ({"objective_advantages": MANY.int()}, TE, "objective_advantages: expected float32"),
    ({"objective_advantages": torch.ones(4, 5, 65)}, VE, "objective_advantages: expected from 1 to 64.*got 65"),
    ({"objective_advantages": torch.ones(4, 5, 0)}, VE, "objective_advantages: expected from 1 to 64.*got 0"),
    ({"objective_advantages": ROWS}, VE, r"objective_advantages: expected \[B, T, N\] or \[B, N\], got \[4\]"),
    ({"objective_advantages": MANY[:3]}, VE, r"objective_advantages: expected \[4, 5\] or \[4\] for each.*\[3, 5\]"),
    ({"objective_advantages": MANY.to("meta")}, VE, "objective_advantages: expected device cpu as log_probs, got meta"),
    ({"weights": 1.0}, TE, "weights: expected a tensor or a sequence of floats, got a float"),
    ({"weights": "abc"}, TE, "weights: expected a tensor or a sequence of floats, got a str"),
    ({"weights": [1.0, "a", 1.0]}, TE, "weights: expected floats, got a str"),
    ({"weights": [1.0, float("inf"), 1.0]}, VE, "weights: expected finite numbers, got inf"),
    ({"weights": [1.0, 10**400, 1.0]}, VE, "weights: expected a number that a float holds"),
    ({"weights": [1.0, 2.0]}, VE, r"weights: expected one per objective \(3\), got 2"),
    ({"weights": torch.ones(2)}, VE, r"weights: expected shape \[3\], got \[2\]"),
    ({"weights": torch.ones(3).int()}, TE, "weights: expected a floating tensor, got torch.int32"),
    ({"weights": torch.ones(3, device="meta")}, VE, "weights: expected device cpu as log_probs, got meta"),
]
VALUE_ERRORS = [
    ({"values": "x"}, TE, "values: expected a tensor, or a sequence or dict of tensors, got a str"),
    ({"values": []}, VE, "values: expected at least one objective, got none"),
    ({"values": ROWS}, VE, r"values: expected \[B, T, N\], \[B, T\], or N tensors \[B, T\], got \[4\]"),
    ({"values": [ROWS] * 3}, VE, r"values: expected \[B, T, N\], \[B, T\], or N tensors \[B, T\], got 3 tensors \[4\]"),
    ({"values": X.int()}, TE, "values: expected float32"),
    ({"values": [X, X.half(), X]}, TE, r"values\[1\]: expected one dtype for all"),
    ({"values": torch.ones(4, 5, 65)}, VE, "values: expected from 1 to 64 objectives, got 65"),
    ({"returns": X}, VE, "returns: expected 3 objectives as in values, got 1"),
    ({"returns": None}, TE, "returns: expected a tensor, or a sequence or dict of tensors, got a NoneType"),
    ({"returns": MANY[:, :4]}, VE, r"returns: expected \[4, 5\] for each objective as in values, got \[4, 4\]"),
    ({"returns": MANY.int()}, TE, "returns: expected float32"),
    ({"returns": MANY.to("meta")}, VE, "returns: expected device cpu as values, got meta"),
    ({"old_values": None}, TE, "old_values: expected a tensor, or a sequence or dict of tensors, got a NoneType"),
    ({"old_values": MANY[..., :2]}, VE, "old_values: expected 3 objectives as in values, got 2"),
    ({"old_values": [X[:3]] * 3}, VE, r"old_values: expected \[4, 5\] for each objective as in values, got \[3, 5\]"),
    (
        {"values": dict(zip("abc", [X] * 3, strict=True)), "returns": dict(zip("abd", [X] * 3, strict=True))},
        VE,
        r"returns: expected the keys of values \['a', 'b', 'c'\], got \['a', 'b', 'd'\]",
    ),
    ({"mask": MANY}, VE, r"mask: expected the shape of one objective \[4, 5\], got \[4, 5, 3\]"),
    ({"mask": X.to(torch.complex64)}, TE, "mask: expected a bool, integer or floating"),
    ({"mask": META}, VE, "mask: expected device cpu as values, got meta"),
    ({"clip": -1.0}, VE, "clip: expected a clip range >= 0, got -1.0"),
    ({"clip": "1"}, TE, "clip: expected a float, got a str"),
    ({"aggregate": "sum"}, VE, "aggregate: expected one of"),
    ({"normalizer": torch.ones(2)}, VE, r"normalizer: expected a tensor of one element, got \[2\]"),
    ({"normalizer": -2.0}, VE, "normalizer: expected a finite number >= 0, got -2.0"),
]
GOOD = {
    policy_loss: {"log_probs": X, "old_log_probs": X, "advantages": X},
    value_loss: {"values": MANY, "old_values": MANY, "returns": MANY, "clip": 0.2},
}
OBJECTIVES = {"log_probs": X, "old_log_probs": X, "objective_advantages": MANY}
CALLS = [
    *((POLICY, GOOD[policy_loss], *error) for error in POLICY_ERRORS),
    *((POLICY, OBJECTIVES, *error) for error in OBJECTIVE_ERRORS),
    *((VALUE, GOOD[value_loss], *error) for error in VALUE_ERRORS),
]


@pytest.mark.parametrize(("loss", "good", "wrong", "kind", "message"), CALLS, ids=[m for *_, m in CALLS])
def test_errors(loss, good, wrong, kind, message):
    with pytest.raises(kind, match=message):
        loss.public(**{**good, **wrong})


@pytest.mark.skipif(not _C.has_door(), reason="this torch has no exchange table")
@pytest.mark.parametrize(("loss", "good", "wrong", "kind", "message"), CALLS, ids=[m for *_, m in CALLS])
def test_the_eager_door_declines_what_is_wrong(loss, good, wrong, kind, message):
    with pytest.raises(AssertionError, match="declined"):
        loss.eager(**{**good, **wrong})


def test_what_is_not_wrong():
    """Numbers of other kinds, one of everything, and a bound beyond all ratios."""
    import numpy as np

    expected, _ = policy_loss(X, X + 0.1, X, clip_low=0.5, dual_clip=2.0, normalizer=3)
    for clip in (np.float32(0.5), np.float64(0.5)):
        got, _ = policy_loss(X, X + 0.1, X, clip_low=clip, dual_clip=np.float64(2.0), normalizer=np.int64(3))
        torch.testing.assert_close(got, expected)
    policy_loss(X, X, X, clip_low=1, clip_high=10**6, dual_clip=float("inf"))
    value_loss(X, X, X, clip=1)


def policy(**options):
    """Arguments of the operator itself, which has checks of its own."""
    plain = {"log_probs": X, "old_log_probs": X, "advantages": [X], "per_objective": False, "weights": None,
             "weight_values": [1.0], "mask": None, "ref_log_probs": None, "clip_low": 0.2, "clip_high": 0.2,
             "dual_clip": None, "max_weight": None, "kl_coef": 0.0, "aggregate": "token-mean", "normalizer": None,
             "normalizer_value": None, "needs_gradient": True}  # fmt: skip
    return POLICY, {**plain, **options}


def value(**options):
    plain = {"values": [MANY], "old_values": [], "returns": [X] * 3, "clip": 0.0, "mask": None,
             "aggregate": "token-mean", "normalizer": None, "normalizer_value": None,
             "needs_gradient": True}  # fmt: skip
    return VALUE, {**plain, **options}


OPERATOR_ERRORS = [
    (policy(log_probs=ROWS), r"log_probs: expected \[B, T\]"),
    (policy(log_probs=X.int()), "log_probs: expected float32"),
    (policy(old_log_probs=X[:3]), "old_log_probs: expected a floating tensor like"),
    (policy(old_log_probs=X.int()), "old_log_probs: expected a floating tensor like"),
    (policy(ref_log_probs=ROWS), "ref_log_probs: expected a floating tensor like"),
    (policy(kl_coef=0.1), "ref_log_probs: kl_coef needs them"),
    (policy(advantages=[]), "advantages: expected 1 to 64"),
    (policy(advantages=[MANY]), r"advantages: expected \[B, T\] or \[B\]"),
    (policy(advantages=[X.int()]), "advantages: expected float32"),
    (policy(advantages=[X, X.half()], weight_values=[1.0] * 2), "advantages: expected tensors of one dtype"),
    (policy(advantages=[X, ROWS], weight_values=[1.0] * 2), "advantages: expected tensors of one shape"),
    (policy(weights=torch.ones(2)), r"weights: expected floating \[N\]"),
    (policy(weight_values=[]), "weights: expected one number per objective"),
    (policy(mask=ROWS), r"mask: expected \[B, T\]"),
    (policy(mask=X.to(torch.complex64)), "mask: expected a bool"),
    (policy(aggregate="mean"), "aggregate: unknown"),
    (policy(normalizer=torch.ones(2)), "normalizer: expected a tensor of one element"),
    (policy(normalizer=torch.ones((), dtype=torch.int8)), "normalizer: expected a floating tensor, or an integer"),
    (value(values=[]), "values, returns: expected 1 to 64"),
    (value(values=[torch.ones(4, 5, 0)]), "values: expected 1 to 64 objectives"),
    (value(values=[ROWS] * 3), r"values: expected \[B, T\]"),
    (value(values=[X.int()] * 3), "values: expected float32"),
    (value(values=[X, X, X.half()]), "values: expected tensors of one kind"),
    (value(returns=[X]), "returns: expected as many objectives"),
    (value(returns=[X, X, X.int()]), "returns: expected tensors like values"),
    (value(old_values=[X]), "old_values: expected as many objectives"),
    (value(old_values=[X, X, ROWS]), "old_values: expected tensors like values"),
    (value(aggregate="mean"), "aggregate: unknown"),
]


@pytest.mark.parametrize(("call", "message"), OPERATOR_ERRORS, ids=[message for _, message in OPERATOR_ERRORS])
def test_the_operators_check_too(call, message):
    loss, arguments = call
    with pytest.raises(ValueError, match=message):
        getattr(torch.ops.pama_ext, loss.name)(**arguments)


def test_an_operator_that_kept_nothing_says_so():
    leaf = X.clone().requires_grad_()
    _, arguments = policy(log_probs=leaf, needs_gradient=False)
    loss = torch.ops.pama_ext.policy_loss(**arguments)[0]
    with pytest.raises(RuntimeError, match="called with needs_gradient=False"):
        loss.backward()
