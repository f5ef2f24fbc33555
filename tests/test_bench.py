"""The benchmark's baselines compute what they claim to, its clock and gates judge right, and a failed stage is told."""

from __future__ import annotations

import importlib.util
import json
import sys
import time

import pytest
import torch

from bench import baselines, gpu_check, latency, sanitize, timer
from pama_ext import _C, reference

NUMBA = importlib.util.find_spec("numba") is not None
TINY = latency.Workload((6, 5, 3))


def awkward(shape=(9, 7, 3)):
    """NaN and inf behind the mask and before it, one objective that is all NaN."""
    advantages, options = sanitize.inputs(shape, torch.float32)
    advantages[..., -1] = torch.nan
    return advantages, options


def check_baseline(function, advantages, options):
    expected = reference.combine(advantages, **options)
    combined, weights, value, stats = function(advantages, **options)
    torch.testing.assert_close(combined, expected.advantages)
    torch.testing.assert_close(torch.as_tensor(weights).float(), expected.weights)
    torch.testing.assert_close(torch.as_tensor(value).float(), expected.value)
    for name, ours, theirs in zip(expected.stats._fields[:-1], stats, expected.stats, strict=False):
        torch.testing.assert_close(torch.as_tensor(ours).float(), theirs, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("present", [(), ("mask",), ("log_ratio",), ("mask", "log_ratio")])
def test_eager_baseline_is_the_reference(present):
    advantages, options = awkward()
    if "mask" not in present:
        advantages = torch.where(options["mask"][..., None], advantages, torch.inf)
    check_baseline(baselines.eager, advantages, {name: options[name] for name in present})


@pytest.mark.skipif(not NUMBA, reason="numba is not installed")
@pytest.mark.parametrize("shape", [(9, 7, 3), (256, 100, 3)], ids=["sequential", "parallel"])
def test_numba_baseline_is_the_reference(shape, threads):
    from bench.numba_loop import numba_loop

    check_baseline(numba_loop, *awkward(shape))
    if threads > 1 and shape[0] > 9:
        import numba

        assert numba.threading_layer()  # raises if no parallel loop ever ran


def test_specification_and_custom_op_are_the_reference():
    advantages, options = awkward()
    check_baseline(baselines.specification, advantages, options)
    clean = torch.randn(4, 2)
    torch.testing.assert_close(baselines.custom_op(clean), reference.combine(clean).advantages)


def test_interleave_tells_slow_from_fast():
    times = timer.interleave({"1 ms": lambda: time.sleep(1e-3), "3 ms": lambda: time.sleep(3e-3)}, budget_s=0.05)
    assert len(times["1 ms"]) == len(times["3 ms"]) >= 5
    assert 1.5 < timer.ratio(times, "3 ms", "1 ms") < 4
    assert timer.ratio(times, "1 ms", "1 ms") == 1


def test_ratio_pairs_rounds():
    assert timer.ratio({"a": [2.0, 20.0, 200.0], "b": [1.0, 10.0, 100.0]}, "a", "b") == 2


def test_quantiles_are_in_microseconds():
    assert timer.quantiles([s * 1e-6 for s in range(11)]) == pytest.approx({"p20_us": 2, "p50_us": 5, "p80_us": 8})


def test_gates_judge():
    times = {TINY: {"a": [3.0], "b": [1.0]}}
    assert latency.Gate(TINY, "a", "b", 3.0).judge(times).startswith("PASS")
    assert latency.Gate(TINY, "a", "b", 3.1).judge(times).startswith("MISS")
    assert latency.Gate(TINY, "a", "b", 3.0, at_most=True).judge(times).startswith("PASS")
    assert latency.Gate(TINY, "a", "b", 2.9, at_most=True).judge(times).startswith("MISS")
    assert latency.Gate(TINY, "a", "c", 2.0).judge(times).endswith("not measured")


def test_every_gate_names_candidates_that_exist():
    names = {w: set(latency.candidates(w, "cpu", compiled=False)) for w in {gate.workload for gate in latency.GATES}}
    for gate in latency.GATES:
        assert {gate.name, gate.base} - names[gate.workload] <= (set() if NUMBA else {latency.NUMBA})


def test_verification_stops_a_wrong_candidate():
    expected = reference.combine(torch.randn(4, 2).double())
    latency.verify("right", expected.advantages, expected)
    for wrong in (expected.advantages + 1, expected.advantages * torch.nan):
        with pytest.raises(SystemExit, match="wrong: combined differ"):
            latency.verify("wrong", wrong, expected)


def test_latency_writes_its_record(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(latency, "WORKLOADS", (latency.HOST, TINY))
    monkeypatch.setattr(latency, "THREADS_FROM", TINY.shape[0])
    monkeypatch.setattr(latency, "QUICK_S", 0.01)
    latency.main(["--quick", "--json", str(tmp_path / "new" / "record.json")])
    record = json.loads((tmp_path / "new" / "record.json").read_text())
    assert {"device", "cpu", "driver", "cuda", "torch", "python", "commit", "date", "threads", "load"} == set(
        record["header"]
    )
    assert [table["workload"] for table in record["tables"]] == [str(latency.HOST), str(TINY)]
    rows = {row["candidate"]: row for row in record["tables"][1]["rows"]}
    assert rows["combine"]["p20_us"] <= rows["combine"]["p50_us"] <= rows["combine"]["p80_us"]
    assert rows["combine"]["/ combine"] == 1
    assert len(record["gates"]) == len(latency.GATES)
    assert "% of copy" in capsys.readouterr().out


@pytest.mark.cuda
def test_device_time_is_less_than_host_time():
    runs = latency.measure(latency.SMALL, "cuda", compiled=False, budget_s=0.05)
    assert timer.ratio(runs["host"], latency.EAGER, latency.OURS) > 1
    assert 0 < min(runs["device"][latency.OURS]) < min(runs["host"]["reference"])


def test_sanitizer_program_runs(capsys):
    sanitize.main(["--device", "cpu"])
    assert "agree with the reference" in capsys.readouterr().out


@pytest.mark.parametrize("value", [torch.nan, 1.5])
def test_sanitizer_program_notices(value):
    with pytest.raises(SystemExit, match="weights: off by"):
        sanitize.compare("weights", torch.tensor([value]), torch.ones(1), torch.float32)


def stage(code, limit_s=60.0, **environment):
    return gpu_check.Stage((sys.executable, "-c", code), limit_s, environment)


def test_gpu_check_records_what_failed(tmp_path, monkeypatch, capsys):
    fakes = {
        "good": stage("import os; print('switch', os.environ['SWITCH'])", SWITCH="1"),
        "bad": stage("print('first'); raise SystemExit('the reason')"),
        "slow": stage("import time; time.sleep(60)", limit_s=0.5),
        "missing": gpu_check.Stage(("no-such-program",), 60),
        "not chosen": stage("raise SystemExit('never')"),
    }
    monkeypatch.setattr(gpu_check, "stages", lambda _: fakes)
    arguments = ["--out", str(tmp_path), "--commit", "abc/123", "--stages"]
    assert gpu_check.main([*arguments, "good", "bad", "slow", "missing"]) == 1
    (path,) = tmp_path.iterdir()
    assert path.name.endswith("_abc-123.json")
    record = json.loads(path.read_text())
    good, bad, slow, missing = record["stages"]
    assert good["status"] == 0 and good["summary"] == "switch 1" and "output" not in good
    assert bad["status"] == 1 and bad["output"] == ["first", "the reason"]
    assert slow["status"] != 0 and slow["seconds"] < 30 and "killed" in slow["summary"]
    assert missing["status"] == gpu_check.NOT_FOUND
    assert record["header"]["commit"] == "abc/123" and record["latency"] is None
    assert "FAIL  bad" in capsys.readouterr().out
    assert gpu_check.main([*arguments, "good"]) == 0


def test_gpu_check_embeds_the_records_of_benchmarks(tmp_path, monkeypatch):
    write = "open({!r}, 'w').write('[1]')"
    monkeypatch.setattr(gpu_check, "stages", lambda to: {"gae": stage(write.format(str(to / "gae.json")))})
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    record = json.loads(next(tmp_path.iterdir()).read_text())
    assert record["gae"] == [1]
    assert record["latency"] is None


def test_gpu_check_stops_in_time(monkeypatch):
    monkeypatch.setattr(gpu_check, "WHOLE_S", 0.0)
    (entry,) = gpu_check.check({"slow": stage("import time; time.sleep(60)")})
    assert entry["status"] != 0


def test_gpu_check_asks_for_cuda(tmp_path):
    known = gpu_check.stages(tmp_path)
    sanitizers = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert list(known) == ["build", "tests", *sanitizers, "latency", "gae", "loss"]
    assert known["tests"].environment == {"PAMA_EXT_REQUIRE_CUDA": "1"}
    assert known["build"].environment == {"PAMA_EXT_CUDA": "1"}


@pytest.mark.skipif(torch.cuda.is_available() and bool(_C.cuda_architectures()), reason="there is a CUDA device")
def test_latency_needs_the_device_it_is_asked_for(capsys):
    with pytest.raises(SystemExit):
        latency.main(["--device", "cuda", "--quick"])
    assert "no CUDA device" in capsys.readouterr().err
