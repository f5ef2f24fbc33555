// launch_min_norm_cuda: lanes of a warp for each problem of the batch.
#include <algorithm>

#include "launch.h"
#include "pama/min_norm.h"
#include "warp.cuh"

namespace pama {
namespace {

constexpr int kBlocksPerSM = 16;            // of a warp each
constexpr int64_t kMostShared = 48 * 1024;  // bytes that need not be asked for: enough for 44 vectors

template <int kSize>
__global__ void __launch_bounds__(32, kBlocksPerSM) min_norm_kernel(const __grid_constant__ MinNormParams p) {
  constexpr int kTeams = 32 / kSize;
  const int team = static_cast<int>(threadIdx.x) / kSize;
  double* scratch = reinterpret_cast<double*>(dynamic_shared()) + team * min_norm_problem(p.n);
  if (p.workspace) scratch = static_cast<double*>(p.workspace) + blockIdx.x * min_norm_problem(p.n);  // of one team
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kTeams + team; k < p.batch;
       k += static_cast<int64_t>(gridDim.x) * kTeams)
    solve_min_norm(p, k, scratch, Lanes<kSize>());
}

// Lanes for each problem: of few vectors, few.
int team_size(int n) { return n <= 4 ? 4 : n <= 8 ? 8 : 32; }

int64_t shared_bytes(int n) { return 32 / team_size(n) * min_norm_problem(n) * static_cast<int64_t>(sizeof(double)); }

int64_t blocks_for(const MinNormParams& p) {
  const int64_t most = attribute_of<cudaDevAttrMultiProcessorCount>(p.device.index) * kBlocksPerSM;
  const int teams = 32 / team_size(p.n);
  return std::min((p.batch + teams - 1) / teams, most);
}

}  // namespace

int64_t min_norm_cuda_workspace(const MinNormParams& p) {
  return shared_bytes(p.n) <= kMostShared ? 0 : blocks_for(p) * shared_bytes(p.n);
}

void launch_min_norm_cuda(const MinNormParams& params, void* stream) {
  if (params.batch == 0) return;
  const DeviceGuard guard(params.device.index);
  const int64_t shared = min_norm_cuda_workspace(params) ? 0 : shared_bytes(params.n);
  MinNormParams copy = params;
  if (shared > 0) copy.workspace = nullptr;
  void* arguments[] = {&copy};
  const int size = team_size(params.n);
  const void* kernel = size == 4   ? reinterpret_cast<const void*>(min_norm_kernel<4>)
                       : size == 8 ? reinterpret_cast<const void*>(min_norm_kernel<8>)
                                   : reinterpret_cast<const void*>(min_norm_kernel<32>);
  check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks_for(params))), 32, arguments,
                              static_cast<size_t>(shared), static_cast<cudaStream_t>(stream)),
             "launching min_norm_kernel");
  check_cuda(cudaGetLastError(), "after launching min_norm_kernel");
}

}  // namespace pama
