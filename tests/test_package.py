"""The package as a whole: what importing does, what the binary needs, its names, its commands, its threads."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits

import pama_ext
from pama_ext import _C, combine


def python(code: str, **environment: str) -> str:
    """What a new interpreter prints; its failure is ours."""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **environment}
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.strip()


def test_import_initialises_no_cuda_and_loads_no_compiler():
    """Only what ``import torch`` itself loads, and this package."""
    code = """
import sys, torch
before = set(sys.modules)
import pama_ext
pama_ext.combine(torch.ones(4, 3)).metrics()
assert not torch.cuda.is_initialized()
print(sorted({m.partition('.')[0] + '.' + m.split('.')[1] if '.' in m else m for m in set(sys.modules) - before
              if not m.startswith('pama_ext')}))
"""
    loaded = python(code)
    for heavy in ("torch._dynamo", "torch._inductor", "triton", "numpy", "sympy"):
        assert heavy not in loaded, loaded


def test_import_takes_little_beside_torch():
    """Measured against something in the same run: a tenth of what importing torch takes."""
    code = """
import time
start = time.perf_counter(); import torch
middle = time.perf_counter(); import pama_ext
print((time.perf_counter() - middle) / (middle - start))
"""
    assert min(float(python(code)) for _ in range(3)) < 0.1


FORK = """
import os, torch, pama_ext
torch.set_num_threads(2)
x = torch.randn(64, 1024, 3)
expected = pama_ext.combine(x)
child = os.fork()
if child == 0:
    small = pama_ext.combine(x[:2]).stats.count.tolist() == [2048] * 3
    torch.set_num_threads(1)
    os._exit(0 if small and torch.equal(pama_ext.combine(x).advantages, expected.advantages) else 3)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0, status
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_after_fork():
    """In a child of a process whose threads have run, where OpenMP would wait for ever if asked for two."""
    python(FORK)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_works_in_forked_workers():
    code = """
import multiprocessing, torch, pama_ext
def work(seed):
    torch.set_num_threads(1)
    return pama_ext.combine(torch.full((8, 2), float(seed))).value.item()
if __name__ == "__main__":
    pama_ext.combine(torch.randn(64, 1024, 3))
    with multiprocessing.get_context("fork").Pool(2) as pool:
        print(pool.map(work, range(1, 5)))
"""
    assert python(code) == "[1.0, 2.0, 3.0, 4.0]"


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
            if inspect.isfunction(value) and mine and not member.startswith("_"):
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


def test_unknown_command_is_an_error():
    run = subprocess.run([sys.executable, "-m", "pama_ext", "nonsense"], capture_output=True, text=True, check=False)
    assert run.returncode != 0


def test_module_that_does_not_load_says_what_to_do(tmp_path):
    """A copy of the package without its compiled module."""
    copy = tmp_path / "pama_ext"
    copy.mkdir()
    for source in Path(pama_ext.__file__).parent.glob("*.py"):
        (copy / source.name).write_text(source.read_text())
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", "import pama_ext"], env=environment, capture_output=True, text=True, check=False
    )
    last = run.stderr.strip().splitlines()[-1]
    assert run.returncode and last.startswith("ImportError") and "2.10" in last and torch.__version__ in last, (
        run.stderr
    )


THREADS = """
import os, time, torch, pama_ext
torch.set_num_threads(2)
x, mask = torch.randn(512, 1024, 3), torch.ones(512, 1024, dtype=torch.bool)
def ticks():
    times = {}
    for task in os.listdir("/proc/self/task"):
        fields = open(f"/proc/self/task/{task}/stat").read().rpartition(")")[2].split()
        times[task] = int(fields[11]) + int(fields[12])
    return times
pama_ext.combine(x, mask=mask)
before, end = ticks(), time.monotonic() + 20
while time.monotonic() < end:
    for _ in range(20):
        pama_ext.combine(x, mask=mask)
    busy = [t for t, spent in ticks().items() if spent - before.get(t, 0) >= 10]
    if len(busy) > 1:
        break
print(len(busy))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="counts threads the way Linux does")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_threads_really_work():
    """Each of two threads spends processor time in ``combine``; waiting workers of OpenMP sleep after a moment."""
    assert int(python(THREADS, OMP_WAIT_POLICY="passive")) >= 2
    assert (
        int(python(THREADS.replace("set_num_threads(2)", "set_num_threads(1)").replace("+ 20", "+ 2"))) == 1
    )  # control


def test_python_threads_with_different_options():
    """Options remembered by one thread are not those of another."""
    x, failures = torch.randn(200, 3), []
    calls = [{"clip_low": k / 100, "level": level} for k in range(8) for level in ("batch", "sequence", "token")]
    expected = [combine(x, **options) for options in calls]

    def work(k: int) -> None:
        for i in range(300):
            at = (i * 7 + k) % len(calls)
            result = combine(x, **calls[at])
            if not torch.equal(result.weights, expected[at].weights):
                failures.append(calls[at])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_results_do_not_depend_on_the_default_dtype():
    x = torch.randn(20, 3)
    expected = combine(x, reward_weights=[1.0, 0.5, 2.0])
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        result = combine(x, reward_weights=[1.0, 0.5, 2.0])
    finally:
        torch.set_default_dtype(before)
    assert_same_bits(result.advantages, expected.advantages)
    assert_same_bits(result.weights, expected.weights)
