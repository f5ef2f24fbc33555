"""The benchmarks of ``Normalize`` and ``min_norm``: what they time is what they say, and their gates can miss."""

from __future__ import annotations

import json

import pytest
import released
import torch

from bench import groups, min_norm, timer
from pama_ext import Normalize, reference

pytestmark = released.installed("trl", "verl", "torchjd")


def test_the_eager_baseline_is_the_specification():
    rewards = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards[:8, 1] = 2.0
    expected = reference.combine(rewards, normalize=Normalize(by="group", group_size=groups.GROUP))
    combined, weights, value, _, dead = groups.eager(rewards)
    torch.testing.assert_close(combined, expected.advantages)
    torch.testing.assert_close(weights, expected.weights)
    torch.testing.assert_close(value, expected.value)
    assert dead.tolist() == expected.stats.dead_groups.tolist() == [0, 1, 0]


def test_every_gate_names_candidates_that_exist():
    for shape, slower, faster, _ in groups.GATES:
        assert {slower, faster} <= set(groups.candidates(shape, "cpu"))


def test_candidates_compute_what_they_are_named_after():
    calls = groups.candidates((64, 2), "cpu")
    rewards = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    normal, _ = groups.group_norm(rewards, eps=1e-6)
    for name in (groups.VERL, groups.VERL_LOOP):
        for column, result in zip(normal.unbind(1), calls[name](), strict=True):
            torch.testing.assert_close(result[:, 0], column, rtol=1e-4, atol=1e-5)
    by_trl = Normalize.trl_gdpo(groups.GROUP)
    expected = reference.combine(rewards, normalize=by_trl, noon=False, solver="fixed", reward_weights=[1.0, 1.0])
    torch.testing.assert_close(calls[groups.TRL](), expected.advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(calls[groups.OURS]().advantages, calls[groups.OURS_IDS]().advantages)


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    right = groups.group_norm
    monkeypatch.setattr(groups, "group_norm", lambda rewards: right(rewards, eps=0.5))
    with pytest.raises(AssertionError, match="eager PyTorch"):
        groups.candidates((64, 2), "cpu")


def test_verls_loop_is_left_out_where_it_takes_seconds(monkeypatch):
    monkeypatch.setattr(groups, "LOOP_ROWS", 32)
    assert groups.VERL_LOOP not in groups.candidates((64, 2), "cpu")


def test_judgement():
    times = {"slow": [8.0, 8.0], "fast": [2.0, 2.0]}
    assert groups.judge(times, "slow", "fast", 4.0).startswith("PASS")
    assert groups.judge(times, "slow", "fast", 4.1).startswith("MISS")


def test_groups_writes_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(groups, "SHAPES", ((64, 2),))
    monkeypatch.setattr(groups, "GATES", (((64, 2), groups.EAGER, groups.OURS, 0.0),))
    groups.main(["--seconds", "0.01", "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["header"]["torch"] == torch.__version__ and len(record["gates"]) == 1
    (table,) = record["tables"]
    rows = {row["candidate"]: row for row in table["rows"]}
    assert table["shape"] == [64, 2] and rows[groups.OURS][f"/ {groups.OURS}"] == 1
    assert "PASS" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["normal", "lengths 1e-4 to 1e4"])
def test_vectors_are_what_the_table_says(kind):
    lengths = min_norm.vectors(32, kind).norm(dim=1)
    assert (lengths.max() / lengths.min() > 1e6) == (kind != "normal")


def test_the_step_of_torchjd_is_a_min_norm_combination():
    """Frank-Wolfe comes near the optimum of an easy problem; the weights are then those of min_norm."""
    advantages = torch.eye(3).repeat(20, 1) * torch.tensor([1.0, 2.0, 3.0])
    combined, weights = min_norm.mgda_step(advantages)
    expected = reference.combine(advantages, solver="min_norm")
    torch.testing.assert_close(weights, expected.weights, rtol=0, atol=0.02)
    torch.testing.assert_close(combined, expected.advantages, rtol=0, atol=0.06)


def test_min_norm_writes_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(min_norm, "SIZES", (3, 10))
    monkeypatch.setattr(min_norm, "STEP", (4, 8, 3))
    min_norm.main(["--seconds", "0.01", "--json", str(tmp_path / "record.json")])
    record = json.loads((tmp_path / "record.json").read_text())
    assert len(record["tables"]) == 5 and len(record["gates"]) == 2
    for table in record["tables"][:4]:
        assert table["norms"][min_norm.OURS] <= table["norms"][min_norm.MGDA] * (1 + 1e-6)
    assert "norm of MGDA / of min_norm" in capsys.readouterr().out


def test_both_share_the_header_of_every_record():
    assert {"device", "cpu", "torch", "commit", "date", "threads"} <= set(timer.environment("cpu"))
