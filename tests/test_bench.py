"""The runner verifies before it times, counts bytes, judges both ways and writes its record; the smoke test fails."""

from __future__ import annotations

import json
import time

import pytest
import torch

from bench import __main__ as command
from bench import runner, suites, timer
from bench.workload import BESIDE, COPY, ERROR, Accuracy, Candidate, Case, Gate, Growth, Workload
from pama_ext import _C

OURS, THEIRS = "ours", "theirs"
BIG = {"input": runner.COLD_BYTES, "output": runner.COLD_BYTES}


def workload(ours=lambda: 1.0, theirs=lambda: 1.0, *, moved=None, gates=(), **options):
    def check(result):
        assert result == 1.0, f"{result} is not 1"

    def build(device):
        found = {
            OURS: Candidate(ours, check),
            THEIRS: Candidate(theirs, check, compiles=options.get("compiles", False)),
        }
        return Case(found, moved or {}, {ERROR: {THEIRS: 0.25}, BESIDE: {OURS: 6.0}})

    return Workload(
        "a workload", build, tuple(gates), quick=options.get("quick", True), device=options.get("device", "")
    )


def run(*workloads, **options):
    return runner.run("tiny", workloads, "cpu", budget_s=0.01, **options)


def test_a_wrong_candidate_is_not_timed(monkeypatch):
    monkeypatch.setattr(timer, "interleave", lambda *a, **k: pytest.fail("timed"))
    with pytest.raises(SystemExit, match=r"a workload: theirs: 1\.5 is not 1"):
        run(workload(theirs=lambda: 1.5))


def test_what_cannot_run_here_is_left_out_but_not_our_own(capsys):
    def fails():
        raise RuntimeError("no such device")

    record = run(workload(theirs=fails, gates=[Gate(THEIRS, OURS, 2.0)]))
    assert [row["candidate"] for row in record["workloads"][0]["rows"]] == [OURS]
    assert record["gates"][0]["verdict"] == "not measured"
    assert "theirs is left out: RuntimeError: no such device" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no such device"):
        run(workload(fails))


def test_the_record_of_a_run(capsys):
    gates = (Gate(THEIRS, OURS, 2.0), Gate(THEIRS, OURS, 1e6), Gate(THEIRS, OURS, 2.0, device="cuda"))
    gates += (Accuracy(OURS, THEIRS, 4.0, at_most=True),)
    record = run(workload(theirs=lambda: time.sleep(1e-3) or 1.0, gates=gates))
    assert record["suite"] == "tiny" and record["header"]["torch"] == torch.__version__
    (entry,) = record["workloads"]
    before, after = entry["core"]
    for arithmetic in (before, after):
        assert 0 < arithmetic["p20_us"] <= arithmetic["p50_us"] <= arithmetic["p80_us"]
    ours, theirs = entry["rows"]
    assert [row["candidate"] for row in entry["rows"]] == [OURS, THEIRS]
    assert ours["ratio"] == 1 and theirs["ratio"] > 100 and theirs[ERROR] == 0.25
    for row in entry["rows"]:
        assert row["side"] == "host" and row["cache"] == "warm" and row["rounds"] >= 5
        assert row["p20_us"] <= row["p50_us"] <= row["p80_us"]
    assert [gate["verdict"] for gate in record["gates"]] == ["PASS", "MISS", "MISS"]
    assert record["gates"][2]["value"] == 6
    assert record["gates"][0] == record["gates"][1] | {"bound": 2.0, "verdict": "PASS"}
    printed = capsys.readouterr().out
    assert (
        "arithmetic alone, before and after:" in printed
        and "p50 µs" in printed
        and "theirs / ours >= 2:" in printed
        and "MISS" in printed
    )
    json.dumps(record)


def test_cold_caches_and_the_copy_come_with_the_bytes():
    (entry,) = run(workload(moved=BIG))["workloads"]
    rows = {(row["candidate"], row["cache"]): row for row in entry["rows"]}
    assert rows.keys() == {(name, cache) for name in (OURS, THEIRS, COPY) for cache in ("warm", "cold")}
    for row in rows.values():
        assert row["gb_per_s"] == pytest.approx(2 * runner.COLD_BYTES / row["p50_us"] / 1e3, rel=1e-3)
    assert rows[COPY, "cold"]["share_of_copy"] == 1 and rows[OURS, "warm"]["share_of_copy"] > 1
    (entry,) = run(workload(moved={"input": 64}))["workloads"]
    assert {row["candidate"] for row in entry["rows"]} == {OURS, THEIRS}
    assert all("gb_per_s" not in row and row["cache"] == "warm" for row in entry["rows"])


def test_the_copy_moves_as_many_bytes():
    case = runner.prepare(workload(moved=BIG), "cpu", lambda *_: True)
    target = case.candidates[COPY].call()
    assert 2 * target.numel() * target.element_size() == 2 * runner.COLD_BYTES


def test_long_calls_are_not_timed_cold(monkeypatch):
    monkeypatch.setattr(runner, "COLD_LIMIT_S", 0.02)
    (entry,) = run(workload(theirs=lambda: time.sleep(0.03) or 1.0, moved=BIG))["workloads"]
    assert {row["candidate"] for row in entry["rows"] if row["cache"] == "cold"} == {OURS, COPY}


def test_a_quick_run_compiles_nothing_and_leaves_out_what_is_large():
    def never():
        pytest.fail("called")

    record = run(workload(never, never, quick=False), workload(theirs=never, compiles=True), quick=True)
    (entry,) = record["workloads"]
    assert [row["candidate"] for row in entry["rows"]] == [OURS]
    assert run(workload(never, never, device="cuda"))["workloads"] == []


TIMES = {"host": {"slow": [9.0, 3.0, 8.0], "fast": [3.0, 1.0, 2.0]}}


@pytest.mark.parametrize(
    ("gate", "verdict", "value"),
    [
        (Gate("slow", "fast", 3.0), "PASS", 3.0),
        (Gate("slow", "fast", 3.1), "MISS", 3.0),
        (Gate("slow", "fast", 3.0, at_most=True), "PASS", 3.0),
        (Gate("slow", "fast", 2.9, at_most=True), "MISS", 3.0),
        (Gate("slow", "nobody", 3.0), "not measured", None),
        (Gate("slow", "fast", 3.0, view="cold"), "not measured", None),
        (Growth("slow", "fast", 1.6, at_most=True, units={"slow": 4, "fast": 2}), "PASS", 1.5),
        (Growth("slow", "fast", 1.4, at_most=True, units={"slow": 4, "fast": 2}), "MISS", 1.5),
    ],
)
def test_gates_judge(gate, verdict, value):
    judged = runner.judge(gate, TIMES, gate.bound)
    assert (judged["verdict"], judged["value"]) == (verdict, value)


def test_gates_say_what_they_judge():
    assert runner.said(runner.judge(Gate("slow", "fast", 4.0), TIMES, 4.0)) == "slow / fast >= 4: 3"
    assert Gate(COPY, "fast", 0.6, view="cold").text == "share of a copy's bandwidth, cold caches"
    assert Growth("a", "b", 1.3, unit="element").text == "time per element, largest / smallest"


@pytest.fixture
def imitated(monkeypatch):
    """What runs on CUDA, run on the CPU: graphs are loops, a call that "synchronises" cannot be captured."""

    def graph_replay(call, calls=timer.GRAPH_CALLS):
        if call.__name__ == "synchronises":
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return lambda: [call() for _ in range(calls)]

    monkeypatch.setattr(timer, "graph_replay", graph_replay)
    monkeypatch.setattr(timer, "device_clock", timer.host_clock)
    monkeypatch.setattr(timer, "cache_sweep", lambda device: lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)


@pytest.mark.usefixtures("imitated")
def test_cuda_is_timed_three_ways(capsys):
    def synchronises():
        time.sleep(1e-3)

    candidates = {
        OURS: Candidate(lambda: time.sleep(1e-3), lambda result: None),
        THEIRS: Candidate(synchronises, lambda result: None),
        "host only": Candidate(lambda: time.sleep(1e-3), graph=False),
    }
    case = Case(candidates, BIG)
    found = runner.measure(case, "cuda", 0.01)
    assert list(found) == ["host", "device", "cold"]
    for times in found.values():
        assert times.keys() == candidates.keys()
        for name in candidates:  # of one call each, not of a graph
            assert 0.9e-3 < min(times[name]) < 10e-3
    assert "theirs: timed as calls" in capsys.readouterr().err
    sides = {(row["side"], row["cache"]): row for row in runner.rows(case, found, "cuda")}
    assert sides.keys() == {("host", "warm"), ("device", "warm"), ("device", "cold")}


@pytest.mark.cuda
def test_a_suite_on_cuda():
    workloads = [w for w in suites.load("combine") if w.quick][:4]
    record = runner.run("combine", workloads, "cuda", budget_s=0.05, quick=True)
    rows = {(row["candidate"], row["side"]): row for row in record["workloads"][1]["rows"]}
    assert rows["eager PyTorch", "host"]["ratio"] > 1
    assert 0 < rows["combine", "device"]["p50_us"] < rows["reference", "host"]["p50_us"]


@pytest.fixture
def tiny(monkeypatch):
    """The suites replaced by one with the workload given to it."""
    monkeypatch.setattr(timer, "SETTLE_S", 1e-3)

    def use(*workloads):
        monkeypatch.setattr(suites, "NAMES", ("tiny",))
        monkeypatch.setattr(suites, "load", lambda name: workloads)

    return use


def test_the_command_writes_a_record(tmp_path, tiny, capsys):
    tiny(workload())
    arguments = ["--out", str(tmp_path / "new"), "--seconds", "0.01", "--commit", "abc"]
    assert command.main([*arguments, "tiny"]) == command.main(arguments) == 0
    record = json.loads((tmp_path / "new" / "tiny-cpu.json").read_text())
    assert record["header"]["commit"] == "abc" and len(record["workloads"]) == 1
    with pytest.raises(SystemExit):
        command.main(["nonsense"])


@pytest.mark.skipif(torch.cuda.is_available() and bool(_C.cuda_architectures()), reason="there is a CUDA device")
def test_the_command_needs_the_device_it_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        command.main(["--device", "cuda", "--quick"])
    assert "no CUDA device" in capsys.readouterr().err
