"""csrc/cuda/min_norm.cu run on the host (see tests/cuda_on_host): the CPU's weights, to the bit."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compare import assert_same_bits

from pama_ext import min_norm

ROOT = Path(__file__).parents[1]
CXX = shutil.which("c++")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)  # in the order of pama::DType

pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler")

SOURCE = """
#include <vector>
#include "pama/combine.h"
static void call_kernel(const void* argument, const void* kernel) {
  reinterpret_cast<void (*)(pama::MinNormParams)>(const_cast<void*>(kernel))(
      *static_cast<const pama::MinNormParams*>(argument));
}
#include MIN_NORM_CU
extern "C" int64_t min_norm_on_host(const void* gramian, int dtype, int64_t batch, int n, const int64_t* strides,
                                    void* weights) {
  using namespace pama;
  MinNormParams p{gramian, static_cast<DType>(dtype), {DeviceType::kCUDA, 0}, batch,
                  {strides[0], strides[1], strides[2]}, n, weights, nullptr};
  std::vector<double> workspace(min_norm_cuda_workspace(p) / sizeof(double), NAN);
  p.workspace = workspace.data();
  launch_min_norm_cuda(p, nullptr);
  return static_cast<int64_t>(workspace.size());
}
"""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("host")
    (folder / "min_norm_on_host.cpp").write_text(SOURCE)
    library = folder / "min_norm_on_host.so"
    command = [CXX, "-std=c++20", "-O1", "-U_FORTIFY_SOURCE", "-w", "-fPIC", "-shared", "-pthread", "-DPAMA_WITH_CUDA"]
    command += [f'-DMIN_NORM_CU="{ROOT}/csrc/cuda/min_norm.cu"', f"-I{ROOT}/tests/cuda_on_host"]
    command += [f"-I{ROOT}/csrc/include", f"-I{ROOT}/csrc/cuda", str(folder / "min_norm_on_host.cpp")]
    subprocess.run([*command, "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).min_norm_on_host


def run(kernel, gramian: torch.Tensor) -> torch.Tensor:
    batch, n = gramian.shape[:2]
    weights = torch.full((batch, n), torch.nan, dtype=min_norm(gramian[:0]).dtype)
    kernel(
        ctypes.c_void_p(gramian.data_ptr()), DTYPES.index(gramian.dtype), ctypes.c_int64(batch), n,
        (ctypes.c_int64 * 3)(*gramian.stride()), ctypes.c_void_p(weights.data_ptr()),
    )  # fmt: skip
    return weights


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("batch", "n"), [(0, 3), (1, 1), (5, 3), (33, 10), (70, 17), (2, 64)])
def test_it_is_that_of_the_cpu(kernel, batch, n, dtype):
    x = torch.randn(batch, n, 80, generator=torch.Generator().manual_seed(n))
    gramian = (x @ x.mT).to(dtype)
    torch.testing.assert_close(run(kernel, gramian), min_norm(gramian), rtol=1e-6, atol=1e-7)


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
