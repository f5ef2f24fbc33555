"""The benchmark of ``gae``: its candidates compute what they are named after, and its gates can miss."""

from __future__ import annotations

import json

import pytest
import released
import torch

from bench import gae, timer
from pama_ext import reference

pytestmark = released.installed("verl", "torchrl", "numba")
SHAPE = (4, 40, 3)


def test_candidates_are_verified_before_they_are_timed(monkeypatch):
    from bench import numba_loop

    calls, pipeline = gae.candidates(SHAPE, "cpu")
    assert {name for gate in gae.GATES for name in gate[:2]} <= set(calls)
    assert {gae.TWO, gae.SECOND, gae.CACHED, gae.PIPELINE} <= set(pipeline)
    for module, name in ((gae, "eager_scan"), (gae, "torchrl"), (gae, "trl"), (numba_loop, "numba_gae")):
        with monkeypatch.context() as patch:
            right = getattr(module, name)
            patch.setattr(module, name, lambda r, *rest, right=right: right(r + 0.01, *rest))
            with pytest.raises(AssertionError):
                gae.candidates(SHAPE, "cpu")


def test_what_is_not_installed_is_left_out(monkeypatch):
    monkeypatch.setattr(gae, "installed", lambda package: False)
    calls, _ = gae.candidates(SHAPE, "cpu")
    assert {gae.VERL, gae.RL, gae.NUMBA}.isdisjoint(calls)
    assert gae.TRL in calls


def test_the_eager_pipeline_is_the_specification():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2))
    advantages, returns = gae.eager_scan(rewards, values)
    exact = reference.gae(rewards, values, gamma=gae.GAMMA, lam=gae.LAM)
    torch.testing.assert_close((advantages, returns), exact)
    std, mean = torch.std_mean(advantages, (0, 1))
    expected = reference.combine((advantages - mean) / (std + 1e-4))
    torch.testing.assert_close(gae.eager_pipeline(rewards, values)[0], expected.advantages)


def test_what_is_in_cache_is_as_much_work(monkeypatch):
    """The part that is combined again and again, times how often, is the whole."""
    monkeypatch.setattr(gae, "CACHE_ELEMENTS", 10 * 40 * 3)
    _, pipeline = gae.candidates((40, 40, 3), "cpu")
    results = pipeline[gae.CACHED]()
    assert sum(result.advantages.numel() for result in results) == 40 * 40


def test_the_record(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gae, "SHAPES", (SHAPE,))
    monkeypatch.setattr(gae, "GATES", ((gae.TRL, gae.OURS, 1e9), (gae.TRL, gae.OURS, 0.0)))
    gae.main(["--json", str(tmp_path / "record.json"), "--seconds", "0.01"])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["header"].keys() == timer.environment("cpu").keys()
    assert [table["of"] for table in record["tables"]] == ["gae", "gae and combine"]
    verdicts = [gate.split("  ")[1] for gate in record["gates"]]
    assert verdicts[:2] == ["MISS", "PASS"]
    assert any("share of a copy" in gate for gate in record["gates"])
    assert any("a fused operator at best" in gate for gate in record["gates"])
    assert "MISS" in capsys.readouterr().out
