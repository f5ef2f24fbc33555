"""Devices, threads and hypothesis profiles of the suite.

A test that takes ``device`` runs on the CPU and, behind the marker ``cuda``, on a GPU. Without a GPU (or a build with
CUDA kernels) the latter are skipped, and pytest prints how many; ``PAMA_EXT_REQUIRE_CUDA=1`` makes them fail instead.
"""

from __future__ import annotations

import functools
import os

import hypothesis
import pytest
import torch

from pama_ext import _C

# "suite" draws the same examples every time; `pytest --hypothesis-profile=explore` looks for new ones.
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None, max_examples=60, print_blob=True)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile("suite")


@functools.cache
def why_no_cuda() -> str | None:
    if not _C.cuda_architectures():
        return "this build has no CUDA kernels"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cuda: needs a CUDA device and a build with CUDA kernels")


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.manual_seed(0)
    if item.get_closest_marker("cuda") and (reason := why_no_cuda()):
        if os.environ.get("PAMA_EXT_REQUIRE_CUDA") == "1":
            pytest.fail(f"PAMA_EXT_REQUIRE_CUDA=1, but {reason}")
        pytest.skip(reason)


# Module scope: hypothesis wants fixtures that live longer than one example.
@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(params=[1, 2], ids="{}threads".format)
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=("avx512", "avx2", "generic"))
def instructions(request: pytest.FixtureRequest):
    """Each instruction set that the CPU kernels are compiled for and this machine has."""
    best = _C.cpu_instructions()
    if not _C.use_cpu_instructions(request.param):
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.use_cpu_instructions(best)
