"""The package as a whole: what the binary needs, its names, its version, its commands."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import pama_ext
from pama_ext import _C, combine
from pama_ext.__main__ import _runs, _verify_on

ROOT = Path(__file__).parents[1]


def undefined_symbols() -> list[str]:
    run = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    return [line.split()[-1] for line in run.stdout.splitlines()]


TORCH_CPP = re.compile(r"N?K?(2at|3c10|5torch)")  # names of namespaces in the Itanium mangling: at::, c10::, torch::


def test_no_symbol_of_torch_s_cpp_interface():
    """Only C functions of the stable ABI are asked of torch: one binary for every version from 2.10 on."""
    symbols = undefined_symbols()
    assert [s for s in symbols if s.startswith("_Z") and TORCH_CPP.search(s)] == []
    asked = [s for s in symbols if s.startswith(("torch_", "aoti_torch_"))]
    assert len(asked) > 5, "the list of symbols was not read"


def test_what_parts_objectives_is_inlined():
    """As a function of its own it hands vectors on through memory: 16 objectives took a third longer."""
    names = subprocess.run(["nm", _C.__file__], capture_output=True, text=True, check=True).stdout
    assert "deinterleave" in names, "the list of symbols was not read"
    assert "part_further" not in names


def test_the_pattern_for_symbols_finds_what_it_should():
    for name in ("_ZN2at5emptyE", "_ZN3c105ErrorC1Ev", "_ZNK5torch8autogradE", "_ZN3c106detail14torchCheckFailE"):
        assert TORCH_CPP.search(name)
    for name in ("_ZNSt6vectorIiE", "_ZN8pybind116detailE", "_ZN4pama5mergeE"):
        assert not TORCH_CPP.search(name)


def test_public_names():
    assert len(pama_ext.__all__) <= 12 and sorted(pama_ext.__all__) == pama_ext.__all__
    assert {name for name in vars(pama_ext) if not name.startswith("_")} == set(pama_ext.__all__)
    for name in pama_ext.__all__:
        thing = getattr(pama_ext, name)
        assert inspect.getdoc(thing), name
        members = vars(thing).items() if inspect.isclass(thing) or inspect.ismodule(thing) else ()
        for member, value in members:
            mine = getattr(value, "__module__", "").startswith("pama_ext")
            if inspect.isfunction(value) and mine and not member.startswith("_") and not hasattr(tuple, member):
                assert value.__doc__, f"{name}.{member}"
    for argument in inspect.signature(combine).parameters:
        assert f"{argument}:" in combine.__doc__, argument


def test_version_has_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", pama_ext.__version__)
    folder = Path(pama_ext.__file__).parent
    places = [p.name for p in folder.glob("*.py") if f'"{pama_ext.__version__}"' in p.read_text()]
    assert places == ["__init__.py"]
    assert (folder / "py.typed").exists()


def command(*arguments: str) -> str:
    run = subprocess.run(
        [sys.executable, "-m", "pama_ext", *arguments], capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_info():
    text = command("info")
    for part in (pama_ext.__version__, torch.__version__, _C.cpu_instructions(), "door"):
        assert part in text, text


def test_verify():
    text = command("verify")
    assert "cpu" in text.lower() and "fail" not in text.lower(), text


@pytest.mark.parametrize("name", ["combine", "gae"])
def test_verify_sees_a_wrong_kernel(name, monkeypatch, capsys):
    right = getattr(pama_ext, name)

    def wrong(x, *rest, **options):
        return right(x * 1.01, *rest, **options)

    monkeypatch.setattr(pama_ext, name, wrong)
    assert _verify_on("cpu", "cpu") > 0
    assert "results differ" in capsys.readouterr().out


def test_unknown_command_is_an_error():
    run = subprocess.run([sys.executable, "-m", "pama_ext", "nonsense"], capture_output=True, text=True, check=False)
    assert run.returncode != 0


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (None, "not built"),
        ("raise ImportError('undefined symbol: x')", f"torch {torch.__version__} (undefined symbol: x)"),
    ],
    ids=["absent", "does not fit"],
)
def test_module_that_does_not_load_says_what_to_do(tmp_path, module, message):
    """A copy of the package without its compiled module, or with one that torch cannot load."""
    copy = tmp_path / "pama_ext"
    copy.mkdir()
    for source in Path(pama_ext.__file__).parent.glob("*.py"):
        (copy / source.name).write_text(source.read_text())
    if module:
        (copy / "_C.py").write_text(module)
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    # An editable install would still find the compiled module of the checkout.
    finders = "[f for f in sys.meta_path if '__editable__' not in getattr(f, '__module__', '')]"
    code = [sys.executable, "-c", f"import sys; sys.meta_path[:] = {finders}; import pama_ext"]
    run = subprocess.run(code, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode and last.startswith("ImportError: pama_ext") and "pip install" in last, run.stderr
    assert message in last, last


@pytest.mark.parametrize(
    ("name", "capability", "runs"),
    [
        ("sm_80", (8, 6), True),
        ("sm_80", (9, 0), False),
        ("sm_90", (9, 0), True),
        ("sm_90a", (9, 0), True),
        ("sm_90a", (9, 1), False),
        ("compute_90", (12, 0), True),
        ("compute_90", (8, 9), False),
    ],
)
def test_which_code_runs_where(name, capability, runs):
    assert _runs(name, *capability) is runs


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a checkout")
def test_a_source_distribution_holds_the_kernels(tmp_path):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {"/".join(name.split("/")[1:]) for name in archive.getnames()}
    assert {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*.*")} <= names
