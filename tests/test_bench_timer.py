"""The benchmarks' clocks: slow is told from fast, rounds are paired, and cold means that the caches were swept."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from bench import environment, timer


def test_interleave_tells_slow_from_fast():
    times = timer.interleave({"1 ms": lambda: time.sleep(1e-3), "3 ms": lambda: time.sleep(3e-3)}, budget_s=0.05)
    assert len(times["1 ms"]) == len(times["3 ms"]) >= 5
    assert 1.5 < timer.ratio(times, "3 ms", "1 ms") < 4
    assert timer.ratio(times, "1 ms", "1 ms") == 1


def test_ratio_pairs_rounds():
    assert timer.ratio({"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}, "a", "b") == 2


def test_quantiles_are_in_microseconds():
    assert timer.quantiles([s * 1e-6 for s in range(11)]) == pytest.approx({"p20_us": 2, "p50_us": 5, "p80_us": 8})


def test_candidates_take_turns_in_a_new_order_each_round():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}

    def clock(call, calls):
        call()
        return 1.0  # a long call: one in a block, and no untimed one before

    timer.interleave(calls, budget_s=1.0, clock=clock, rounds=(3, 3))
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab"


@pytest.mark.parametrize(("seconds", "lead", "untimed"), [(1e-6, True, 1), (1e-6, False, 0), (1.0, True, 0)])
def test_only_short_calls_are_led_in(seconds, lead, untimed):
    blocks: list[int] = []

    def clock(call, calls):
        blocks.append(calls)
        return seconds * calls

    timer.interleave({"a": lambda: None}, budget_s=1.0, clock=clock, rounds=(4, 4), max_calls=7, lead=lead)
    timed = 7 if seconds < 1 else 1
    assert blocks == [1, 1] + ([1] * untimed + [timed]) * 4


def test_slow_calls_get_the_fewest_rounds():
    seconds = {"fast": 1e-3, "slow": 1.0}
    current: list[str] = []
    calls = {name: lambda name=name: current.append(name) for name in seconds}

    def clock(call, calls):
        call()
        return seconds[current[-1]] * calls

    times = timer.interleave(calls, budget_s=60.0, clock=clock, rounds=(5, 100))
    assert len(times["slow"]) == 5 and len(times["fast"]) == 100
    times["fast"][5:] = [1.0] * 95  # rounds without the slow one
    assert timer.ratio(times, "slow", "fast") == pytest.approx(1000)


def test_a_cold_clock_sweeps_before_each_call_and_outside_of_what_it_times():
    events: list[str] = []

    def sweep():
        events.append("sweep")
        time.sleep(0.02)

    seconds = timer.cold(timer.host_clock, sweep)(lambda: events.append("call"), 3)
    assert events == ["sweep", "call"] * 3
    assert seconds < 0.02


def test_the_sweep_empties_the_caches():
    """What fits the nearer caches and was just read takes several times as long to read again after a sweep."""
    data = np.zeros(1 << 15, dtype=np.float32)
    swept = timer.cold(timer.host_clock, timer.cache_sweep("cpu"))
    for _ in range(5):  # others may hold the core, or sweep the caches too
        warm, cold = (min(clock(data.max, 1) for _ in range(10)) for clock in (timer.host_clock, swept))
        if cold > 2 * warm:
            return
    pytest.fail(f"{cold * 1e6:.1f} us swept, {warm * 1e6:.1f} us warm")


def test_the_environment_says_what_a_figure_depends_on():
    header = environment.environment("cpu")
    assert header["torch"] == torch.__version__ and header["threads"] == torch.get_num_threads()
    assert header["device"] == "cpu" and header["instructions"] in ("avx512", "avx2", "generic")
    assert {"cpu", "cores", "caches", "peers", "commit", "date", "load", "python", "driver", "cuda"} <= header.keys()
    assert all(size >= 1 << 14 for size in header["caches"].values())


def test_what_arithmetic_takes(monkeypatch):
    assert 0 < timer.core_clock(20)["p50_us"] < 1000
    monkeypatch.setattr(torch, "sin", lambda *_, **__: time.sleep(1e-3))
    assert timer.core_clock(20)["p20_us"] >= 1000


def test_a_processor_is_known_by_its_numbers(tmp_path, monkeypatch):
    """Virtual machines shorten the name of it."""
    said = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 1\nmodel name\t: AMD EPYC\n"
    (tmp_path / "cpuinfo").write_text(said + said)
    monkeypatch.setattr(environment, "PROCESSOR", tmp_path / "cpuinfo")
    assert environment.environment("cpu")["cpu"] == "AMD EPYC, family 25, model 1"
    monkeypatch.setattr(environment, "PROCESSOR", tmp_path / "none")
    assert "," not in environment.environment("cpu")["cpu"]


def test_a_commit_is_dirty_only_by_what_changes_a_figure(tmp_path, monkeypatch):
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    for path in ("bench/runner.py", "bench/records/r.json", "README.md"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("1")
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    assert environment.commit() == "unknown"
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        assert environment._output(*git, *command) == ""
    clean = environment.commit()
    assert len(clean) == 12
    for path in ("bench/records/r.json", "README.md"):
        (tmp_path / path).write_text("2")
    assert environment.commit() == clean
    (tmp_path / "bench/runner.py").write_text("2")
    assert environment.commit() == f"{clean}-dirty"
