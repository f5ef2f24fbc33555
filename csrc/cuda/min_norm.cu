// launch_min_norm_cuda: a thread for each problem of the batch.
#include "check.h"
#include "pama/min_norm.h"

namespace pama {
namespace {

constexpr int kThreads = 32;  // a problem is long and sequential: rather many blocks than many threads

__host__ __device__ int64_t scratch_each(int n) { return min_norm_scratch(n) + (n + 1) * static_cast<int64_t>(n); }

__global__ void __launch_bounds__(kThreads) min_norm_kernel(const __grid_constant__ MinNormParams p) {
  const int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (k < p.batch) solve_min_norm(p, k, static_cast<double*>(p.workspace) + k * scratch_each(p.n));
}

}  // namespace

int64_t min_norm_cuda_workspace(const MinNormParams& p) {
  return p.batch * scratch_each(p.n) * static_cast<int64_t>(sizeof(double));
}

void launch_min_norm_cuda(const MinNormParams& params, void* stream) {
  if (params.batch == 0) return;
  const DeviceGuard guard(params.device.index);
  MinNormParams copy = params;
  void* arguments[] = {&copy};
  const dim3 blocks(static_cast<unsigned>((params.batch + kThreads - 1) / kThreads));
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(min_norm_kernel), blocks, kThreads, arguments, 0,
                              static_cast<cudaStream_t>(stream)),
             "launching min_norm_kernel");
  check_cuda(cudaGetLastError(), "after launching min_norm_kernel");
}

}  // namespace pama
