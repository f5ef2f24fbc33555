"""The benchmark of the losses: its candidates compute what they are named after, and its gates can miss."""

from __future__ import annotations

import importlib.util
import json

import pytest
import released
import torch

from bench import loss, timer

pytestmark = [
    released.installed("verl"),
    pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="not installed: liger_kernel"),
]
SHAPE = (6, 40)


def doubled(right):
    """A loss that is wrong by a tenth of a percent."""

    def wrong(*arguments):
        result = right(*arguments)
        return (result[0] * 1.001, *result[1:]) if isinstance(result, tuple) else result * 1.001

    return wrong


@pytest.fixture
def uncompiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.usefixtures("uncompiled")
def test_candidates_are_verified_before_they_are_timed(monkeypatch):
    policy, value = loss.candidates(SHAPE, "cpu")
    assert {loss.OURS, loss.EAGER, loss.COMPILED, loss.LIGER, loss.VERL, loss.COPY} <= set(policy)
    assert set(value) == {loss.VALUE, loss.EAGER_VALUE, loss.COMPILED}
    for name in ("eager", "eager_alone", "eager_value"):
        with monkeypatch.context() as patch:
            patch.setattr(loss, name, doubled(getattr(loss, name)))
            with pytest.raises(AssertionError):
                loss.candidates(SHAPE, "cpu")
    for name in ("liger", "verl"):
        with monkeypatch.context() as patch:
            make = getattr(loss, name)
            patch.setattr(loss, name, lambda make=make, **options: doubled(make(**options)))
            with pytest.raises(AssertionError):
                loss.candidates(SHAPE, "cpu")


def test_a_wrong_gradient_is_seen():
    leaf = torch.zeros(3, 4, requires_grad=True)
    right = torch.ones(3, 4, dtype=torch.float64)
    loss.agree("right", torch.zeros(()), torch.ones(3, 4), torch.zeros((), dtype=torch.float64), right)
    for wrong in (torch.full((3, 4), 1.01), None):
        with pytest.raises(AssertionError):
            loss.agree("wrong", torch.zeros(()), wrong, torch.zeros((), dtype=torch.float64), right)
    assert leaf.grad is None


def test_the_metrics_are_those_of_the_specification():
    t = loss.problem((5, 30), "cpu")
    _, metrics = loss.eager(t.leaf, t.old, t.advantages, t.mask)
    _, expected = loss.pama_ext.reference.policy_loss(t.leaf, t.old, t.advantages, mask=t.mask)
    high_or_low, low, _, *others = expected[:6]
    torch.testing.assert_close(metrics, (high_or_low, low, *others))
    _, metrics = loss.eager_value(t.values, t.old_values, t.returns, t.mask)
    _, expected = loss.pama_ext.reference.value_loss(t.values, t.old_values, t.returns, mask=t.mask, clip=0.2)
    torch.testing.assert_close(metrics, tuple(expected))


@pytest.mark.usefixtures("uncompiled")
def test_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(loss, "SHAPES", (SHAPE,))
    monkeypatch.setattr(loss, "GATED", SHAPE)
    monkeypatch.setattr(loss, "judge", lambda times, slow, fast, bound: f"MISS  {slow} / {fast} >= {bound}")
    loss.main(["--json", str(tmp_path / "record.json"), "--seconds", "0.01"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["header"].keys() == timer.environment("cpu").keys()
    assert [table["of"] for table in record["tables"]] == [loss.OURS, loss.VALUE]
    assert "MISS  eager / policy_loss >= 3.0" in record["gates"][0]
    assert "share of a copy" in record["gates"][1]
    assert "MISS" in capsys.readouterr().out
