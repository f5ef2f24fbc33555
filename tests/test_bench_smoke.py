"""The smoke test fails where a ratio is outside of its bound twice, and only there."""

from __future__ import annotations

import time

import pytest
import torch
from test_bench import OURS, THEIRS, tiny, workload  # noqa: F401

import pama_ext
from bench import __main__ as command
from bench import runner, smoke, suites
from bench.workload import Gate


@pytest.fixture(autouse=True)
def threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def slow(seconds):
    return lambda: time.sleep(seconds) or 1.0


GUARD = Gate(THEIRS, OURS, 100.0, smoke=3.0)


def test_it_passes_far_from_its_aim(tiny, capsys):  # noqa: F811
    """A ratio of about 10: misses what is aimed at, keeps the wide bound."""
    tiny(workload(slow(5e-4), slow(5e-3), gates=[GUARD]))
    assert command.main(["--smoke"]) == 0
    assert "PASS" in capsys.readouterr().out


def test_it_runs_on_one_thread_unless_told_otherwise(tiny):  # noqa: F811
    seen = []
    tiny(workload(lambda: seen.append(torch.get_num_threads()) or 1.0, slow(5e-3), gates=[GUARD]))
    for arguments, threads in ((["--smoke"], 1), (["--smoke", "--threads", "2"], 2)):
        seen.clear()
        command.main(arguments)
        assert set(seen) == {threads}


def test_it_fails_for_a_slow_candidate_after_a_second_try(tiny, capsys):  # noqa: F811
    tiny(workload(slow(5e-3), slow(5e-3), gates=[GUARD]))
    assert command.main(["--smoke"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("MISS") == 2 and "again: theirs / ours >= 3" in printed and "FAIL" in printed


def test_it_forgives_a_disturbance(tiny, monkeypatch):  # noqa: F811
    tries = []

    def judge(gate, found, bound):
        tries.append(bound)
        return right(gate, found, bound if len(tries) > 1 else 1e9)

    right = runner.judge
    monkeypatch.setattr(runner, "judge", judge)
    tiny(workload(slow(5e-4), slow(5e-3), gates=[GUARD]))
    assert command.main(["--smoke"]) == 0
    assert tries == [3.0, 3.0]


def test_it_times_nothing_else(tiny):  # noqa: F811
    def never():
        pytest.fail("called")

    tiny(
        workload(slow(5e-4), slow(5e-3), gates=[GUARD]),
        workload(never, never, gates=[GUARD], quick=False),
        workload(never, never, gates=[Gate(THEIRS, OURS, 1.0)]),
    )
    assert smoke.main({"tiny": suites.load("tiny")}, "cpu") == 0
    unneeded = workload(slow(5e-4), never, gates=[Gate(OURS, OURS, 0.5, smoke=0.5)])
    assert smoke.main({"tiny": [unneeded]}, "cpu") == 0


def test_a_slow_kernel_is_noticed_in_a_real_suite(monkeypatch, capsys):
    name = "[64, 3], mask, log_ratio"
    (real,) = (w for w in suites.load("combine") if w.name == name)
    right = pama_ext.combine
    monkeypatch.setattr(pama_ext, "combine", lambda *a, **k: time.sleep(1e-3) or right(*a, **k))
    assert smoke.main({"combine": [real]}, "cpu") == 1
    assert f"{name}, again: eager PyTorch / combine >= 10" in capsys.readouterr().out
