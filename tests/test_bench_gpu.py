"""The check on a GPU machine tells a stage that failed, and the sanitiser's program notices a wrong kernel."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from bench import ceilings, gpu_check, sanitize, suites


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
    monkeypatch.setattr(gpu_check, "stages", lambda *_: fakes)
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
    assert record["header"]["commit"] == "abc/123"
    assert "FAIL  bad" in capsys.readouterr().out
    assert gpu_check.main([*arguments, "good"]) == 0


def test_a_test_that_hangs_is_named(tmp_path):
    """As one does whose kernel never ends; the others need their time on the device."""
    (tmp_path / "test_hangs.py").write_text("import time\n\n\ndef test_waits_for_ever():\n    time.sleep(60)\n")
    command = (sys.executable, "-m", "pytest", "-q", *gpu_check.ends_when_hanging(1), str(tmp_path))
    entry = gpu_check.run("tests", gpu_check.Stage(command, 60), 60)
    assert entry["status"] != 0 and entry["seconds"] < 30
    assert any("in test_waits_for_ever" in line for line in entry["output"])


def test_suites_leave_their_records_beside_that_of_the_check(tmp_path, monkeypatch):
    write = "import sys; open(sys.argv[-1] + '/gae-cuda.json', 'w').write('[1]')"

    def stages(out, commit=""):
        return {"gae": gpu_check.Stage((sys.executable, "-c", write, str(out)), 60)}

    monkeypatch.setattr(gpu_check, "stages", stages)
    assert gpu_check.main(["--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "gae-cuda.json").read_text()) == [1]
    assert len(list(tmp_path.iterdir())) == 2


def test_gpu_check_stops_in_time(monkeypatch):
    monkeypatch.setattr(gpu_check, "WHOLE_S", 0.0)
    (entry,) = gpu_check.check({"slow": stage("import time; time.sleep(60)")})
    assert entry["status"] != 0


def test_gpu_check_asks_for_cuda(tmp_path):
    known = gpu_check.stages(tmp_path, "abc")
    sanitizers = ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert list(known) == ["build", "tests", "gpu-tests", *sanitizers, "ceilings", *suites.NAMES]
    assert known["tests"].environment["PAMA_EXT_REQUIRE_CUDA"] == "1"
    assert known["build"].environment == {"PAMA_EXT_CUDA": "1"}
    command = " ".join(known["gae"].command)
    for part in ("-m bench gae", "--device cuda", f"--out {tmp_path}", "--commit abc"):
        assert part in command


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")
def test_ceilings_compile(tmp_path):
    ceilings.compile_program(tmp_path / "ceilings", "sm_90")
    assert (tmp_path / "ceilings").stat().st_size > 0


def test_ceilings_are_recorded(tmp_path, monkeypatch, capsys):
    def compile_program(target, architecture="native"):
        target.write_text('#!/bin/sh\necho \'{"empty kernel": 0.9, "barrier of a block": 0.02}\'\n')
        target.chmod(0o755)

    monkeypatch.setattr(ceilings, "compile_program", compile_program)
    ceilings.main(["--out", str(tmp_path), "--commit", "abc"])
    record = json.loads((tmp_path / "ceilings.json").read_text())
    assert record["microseconds"] == {"empty kernel": 0.9, "barrier of a block": 0.02}
    assert record["header"]["commit"] == "abc"
    assert "0.900" in capsys.readouterr().out


def test_ceilings_need_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(SystemExit, match="nvcc was not found"):
        ceilings.compile_program(tmp_path / "ceilings")


def test_stages_that_may_run_side_by_side_do(tmp_path):
    """Each waits for a file that the other writes."""
    wait = "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n"
    wait += "while not pathlib.Path(sys.argv[2]).exists(): time.sleep(0.01)"
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    commands = {"first": (one, other), "second": (other, one)}
    chosen = {
        name: gpu_check.Stage((sys.executable, "-c", wait, *files), 30, beside=True) for name, files in commands.items()
    }
    assert [(entry["stage"], entry["status"]) for entry in gpu_check.check(chosen)] == [("first", 0), ("second", 0)]
