"""The Triton version that ``combine`` is compared with computes the specification."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_bench_baselines import awkward, check_baseline

ROOT = Path(__file__).resolve().parents[1]
TRITON = importlib.util.find_spec("triton")
needs_triton = pytest.mark.skipif(TRITON is None or TRITON.origin is None, reason="Triton is not installed")


@needs_triton
def test_interpreted_it_is_the_specification():
    """In a process of its own, on the CPU: Triton decides at import whether its kernels are interpreted."""
    program = """if True:
        import torch
        from bench.baselines import triton_combine
        from test_bench_baselines import awkward, check_baseline

        triton_combine.PROGRAMS = 3  # each reads several tiles
        for shape in ((4, 2), (9, 7, 3), (9, 700, 10), (100, 64)):
            check_baseline(triton_combine.triton_combine, *awkward(shape))
        clean = torch.randn(40, 3)
        check_baseline(triton_combine.triton_combine, clean, {})
        check_baseline(triton_combine.triton_combine, torch.full((5, 3), torch.nan), {})
    """
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
    run = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@needs_triton
@pytest.mark.cuda
@pytest.mark.parametrize("shape", [(4, 2), (9, 7, 3), (64, 512, 10), (100, 64)], ids=str)
def test_compiled_it_is_the_specification(shape):
    from bench.baselines.triton_combine import triton_combine

    advantages, options = awkward(shape)
    check_baseline(triton_combine, advantages.cuda(), {name: x.cuda() for name, x in options.items()})
    check_baseline(triton_combine, torch.randn(shape, device="cuda"), {})
