"""csrc/cuda/min_norm.cu run on the host (see tests/cuda_on_host): the CPU's weights, in any order of the threads."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits
from on_host import ROOT, compiled, needs_compiler

from pama_ext import min_norm

ORDERS = (0, 1, 7, 8)
HEADER = (ROOT / "csrc/include/pama/min_norm.h").read_text()
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of pama::DType

pytestmark = needs_compiler

SOURCE = """
#include <vector>
#include "pama/combine.h"
static void call_kernel(const void* argument, const void* kernel) {
  reinterpret_cast<void (*)(pama::MinNormParams)>(const_cast<void*>(kernel))(
      *static_cast<const pama::MinNormParams*>(argument));
}
#include MIN_NORM_CU
extern "C" int64_t min_norm_on_host(const void* gramian, int dtype, int64_t batch, int n, const int64_t* strides,
                                    void* weights, unsigned order) {
  using namespace pama;
  host::order = order;
  MinNormParams p{gramian, static_cast<DType>(dtype), {DeviceType::kCUDA, 0}, batch,
                  {strides[0], strides[1], strides[2]}, n, weights, nullptr};
  std::vector<double> workspace(min_norm_cuda_workspace(p) / sizeof(double), NAN);
  p.workspace = workspace.data();
  launch_min_norm_cuda(p, nullptr);
  return static_cast<int64_t>(workspace.size());
}
"""


def build(folder: Path, header: str | None = None):
    """The kernel, perhaps with another pama/min_norm.h."""
    (folder / "min_norm_on_host.cpp").write_text(SOURCE)
    (folder / "pama").mkdir()
    if header:
        (folder / "pama/min_norm.h").write_text(header)
    kernels = f'-DMIN_NORM_CU="{ROOT}/csrc/cuda/min_norm.cu"'
    source = str(folder / "min_norm_on_host.cpp")
    return compiled(folder / "min_norm_on_host.so", kernels, f"-I{folder}", source).min_norm_on_host


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    return build(tmp_path_factory.mktemp("host"))


def run(kernel, gramian: torch.Tensor, order: int = 0) -> torch.Tensor:
    return run_and_measure(kernel, gramian, order)[0]


def run_and_measure(kernel, gramian: torch.Tensor, order: int = 0) -> tuple[torch.Tensor, int]:
    """The weights, and how many doubles of workspace were asked for."""
    batch, n = gramian.shape[:2]
    weights = torch.full((batch, n), torch.nan, dtype=min_norm(gramian[:0]).dtype)
    doubles = kernel(
        ctypes.c_void_p(gramian.data_ptr()), DTYPES.index(gramian.dtype), ctypes.c_int64(batch), n,
        (ctypes.c_int64 * 3)(*gramian.stride()), ctypes.c_void_p(weights.data_ptr()), order,
    )  # fmt: skip
    return weights, doubles


def problems(batch: int, n: int) -> torch.Tensor:
    """Of vectors of unequal length that lean to one side, so that some come and go; two of each are the same."""
    x = torch.randn(batch, n, n + 9, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    x = x * torch.linspace(0.1, 3, n)[:, None] + 0.4
    x[:, -1] = x[:, 0]
    return x @ x.mT


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(0, 3), (1, 1), (5, 3), (33, 10), (70, 17), (2, 64)])
def test_it_is_that_of_the_cpu(kernel, batch, n, dtype):
    x = torch.randn(batch, n, 80, generator=torch.Generator().manual_seed(n))
    gramian = (x @ x.mT).to(dtype)
    torch.testing.assert_close(run(kernel, gramian), min_norm(gramian), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 10, 33, 44, 45, 64])
def test_the_order_of_threads_changes_no_bit(kernel, n):
    gramian = problems(600 if n < 9 else 40, n)  # some teams of lanes have several
    expected = run(kernel, gramian)
    torch.testing.assert_close(expected, min_norm(gramian), rtol=1e-7, atol=1e-9)
    for order in ORDERS[1:]:
        assert_same_bits(run(kernel, gramian, order), expected)


BEFORE_SYNCS = (
    "size[k] = sqrt(entry(index[k], index[k])); });",
    "u[support[k]] = y[k]; });",
    "y[j] -= l[j * n + k] * known; });",
    "support[k] = j;",
)


@pytest.mark.parametrize("before", BEFORE_SYNCS)
def test_a_missing_sync_is_seen(tmp_path, before):
    """The solver without one of its syncs gives other weights in some order of the threads."""
    broken, found = re.subn(rf"({re.escape(before)})\s*team\.sync\(\);", r"\1", HEADER)
    assert found == 1
    kernel = build(tmp_path, broken)
    gramian = problems(40, 10)
    expected = min_norm(gramian)
    differences = [(run(kernel, gramian, order) - expected).abs() for order in ORDERS]
    assert any(not difference.max() < 1e-6 for difference in differences)


@pytest.mark.parametrize(("n", "batch", "teams"), [(4, 500, 0), (44, 50, 0), (45, 3, 3), (64, 2, 2), (45, 50, 32)])
def test_no_more_memory_than_teams_that_reside(kernel, n, batch, teams):
    """None but that of the multiprocessors where it suffices; two of them have 32 blocks here."""
    gramian = torch.eye(n, dtype=torch.float64).repeat(batch, 1, 1)
    weights, doubles = run_and_measure(kernel, gramian)
    assert doubles == teams * (3 * n * n + 7 * n)
    expected = torch.full_like(weights, 1 / n)
    torch.testing.assert_close(weights, expected, rtol=1e-14, atol=0.0)


def test_strides_are_followed(kernel):
    x = torch.randn(6, 4, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gramian = x @ x.mT
    apart = torch.stack([gramian, gramian * torch.nan], 2)[:, :, 0]
    assert not apart.is_contiguous()
    assert_same_bits(run(kernel, apart), run(kernel, gramian))


def test_a_problem_that_is_not_finite_stays_alone(kernel):
    gramian = torch.eye(3).repeat(40, 1, 1)
    gramian[7, 0, 0] = torch.inf
    weights = run(kernel, gramian)
    assert torch.isnan(weights[7]).all() and torch.isfinite(weights[torch.arange(40) != 7]).all()
