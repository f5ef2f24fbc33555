// What no launch can be faster than, as JSON: device time of empty kernels and of barriers, in microseconds.
//
// Each kernel is launched 20 times in a CUDA graph; the median of 51 replays counts. A barrier is the difference
// between a kernel that meets 8 times more and one that does not.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

namespace {

constexpr int kThreads = 256, kLaunches = 20, kReplays = 51, kClusterBlocks = 8;

struct Wide {
  char bytes[2560];  // about as much as the parameters of `combine`
};

__global__ void empty() {}
__global__ void empty_wide(const __grid_constant__ Wide) {}

__global__ void block_barriers(int times) {
  for (int k = 0; k < times; ++k) __syncthreads();
}

__global__ void grid_barriers(int times) {
  for (int k = 0; k < times; ++k) cooperative_groups::this_grid().sync();
}

__global__ void cluster_barriers(int times) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  for (int k = 0; k < times; ++k) cooperative_groups::this_cluster().sync();
#endif
}

void check(cudaError_t status) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(status));
  std::exit(1);
}

struct Launch {
  const void* kernel;
  int blocks;
  void** arguments;
  size_t shared;
  cudaLaunchAttributeID attribute;  // cudaLaunchAttributeIgnore: none
};

float median_us(const Launch& launch) {
  cudaStream_t stream;
  check(cudaStreamCreate(&stream));
  cudaLaunchAttribute attribute{};
  attribute.id = launch.attribute;
  attribute.val.cooperative = 1;
  if (launch.attribute == cudaLaunchAttributeClusterDimension) {
    attribute.val.clusterDim.x = static_cast<unsigned>(launch.blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(launch.blocks));
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = launch.shared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = launch.attribute == cudaLaunchAttributeIgnore ? 0 : 1;
  check(cudaFuncSetAttribute(launch.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, 100 * 1024));

  cudaGraph_t graph;
  cudaGraphExec_t replay;
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int k = 0; k < kLaunches; ++k) check(cudaLaunchKernelExC(&config, launch.kernel, launch.arguments));
  check(cudaStreamEndCapture(stream, &graph));
  check(cudaGraphInstantiate(&replay, graph, 0));

  cudaEvent_t start, end;
  check(cudaEventCreate(&start));
  check(cudaEventCreate(&end));
  std::vector<float> found;
  for (int k = 0; k < kReplays + 5; ++k) {
    check(cudaEventRecord(start, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaEventRecord(end, stream));
    check(cudaEventSynchronize(end));
    float ms = 0;
    check(cudaEventElapsedTime(&ms, start, end));
    if (k >= 5) found.push_back(ms * 1e3f / kLaunches);
  }
  std::nth_element(found.begin(), found.begin() + kReplays / 2, found.end());
  return found[kReplays / 2];
}

}  // namespace

int main() {
  int device = 0, multiprocessors = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device));
  const auto pointer = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  const auto none = cudaLaunchAttributeIgnore, grid = cudaLaunchAttributeCooperative,
             cluster = cudaLaunchAttributeClusterDimension;
  Wide wide{};
  int zero = 0, one = 1, nine = 9;
  void* wide_argument[] = {&wide};
  void *times_0[] = {&zero}, *times_1[] = {&one}, *times_9[] = {&nine};
  const int all = 2 * multiprocessors;

  const auto per_barrier = [&](auto* kernel, int blocks, cudaLaunchAttributeID how) {
    return (median_us({pointer(kernel), blocks, times_9, 0, how}) -
            median_us({pointer(kernel), blocks, times_1, 0, how})) /
           8;
  };
  std::printf("{\"empty kernel\": %.3f,\n", median_us({pointer(empty), 1, nullptr, 0, none}));
  std::printf(" \"empty kernel, 2560 bytes of parameters\": %.3f,\n",
              median_us({pointer(empty_wide), 1, wide_argument, 0, none}));
  std::printf(" \"empty kernel, 100 KB of shared memory\": %.3f,\n",
              median_us({pointer(empty_wide), 1, wide_argument, 100 * 1024, none}));
  std::printf(" \"empty kernel, %d blocks\": %.3f,\n", all, median_us({pointer(empty), all, nullptr, 0, none}));
  std::printf(" \"empty kernel, %d blocks, 100 KB each\": %.3f,\n", all,
              median_us({pointer(empty_wide), all, wide_argument, 100 * 1024, none}));
  std::printf(" \"empty cooperative kernel, %d blocks\": %.3f,\n", all,
              median_us({pointer(grid_barriers), all, times_0, 0, grid}));
  std::printf(" \"cooperative kernel, one barrier, %d blocks\": %.3f,\n", all,
              median_us({pointer(grid_barriers), all, times_1, 0, grid}));
  std::printf(" \"empty cluster of %d\": %.3f,\n", kClusterBlocks,
              median_us({pointer(cluster_barriers), kClusterBlocks, times_0, 0, cluster}));
  std::printf(" \"barrier of a block\": %.3f,\n", per_barrier(block_barriers, 1, none));
  std::printf(" \"barrier of a cluster of %d\": %.3f,\n", kClusterBlocks,
              per_barrier(cluster_barriers, kClusterBlocks, cluster));
  std::printf(" \"barrier of a grid of %d\": %.3f}\n", all, per_barrier(grid_barriers, all, grid));
}
