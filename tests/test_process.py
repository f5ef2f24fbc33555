"""The package in a process: what importing does, forks, threads of torch and of Python."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch
from compare import assert_same_bits

from pama_ext import combine


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


def test_threads_with_other_options_and_other_lists():
    """What one thread remembers or replaces is no other thread's: options, and the elements of a shared list."""
    columns = [torch.rand(400, generator=torch.Generator().manual_seed(i)) for i in range(6)]
    shared, stop, wrong = list(columns[:3]), threading.Event(), []

    def replace():
        i = 0
        while not stop.is_set():
            i += 1
            shared[i % 3] = torch.rand(400)

    def call(seed):
        log_ratio = torch.linspace(-1, 1, 400)
        for i in range(8000):
            clip = clips[(seed * 400 + i) % len(clips)]  # a new option each time: the remembered ones change all along
            result = combine(columns[:3], log_ratio=log_ratio, clip_high=clip)
            if not torch.equal(result.stats.clipped, shares[clip]):
                wrong.append(clip)
            combine(shared)

    log_ratio = torch.linspace(-1, 1, 400)
    clips = [0.1 + i / 1000 for i in range(1600)]
    shares = {c: combine(columns[:3], log_ratio=log_ratio, clip_high=c).stats.clipped for c in clips}
    threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
    writer = threading.Thread(target=replace)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # seconds: threads alternate within a call, wherever it lets them
    try:
        for thread in (writer, *threads):
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        stop.set()
        writer.join()
        sys.setswitchinterval(interval)
    assert not wrong
