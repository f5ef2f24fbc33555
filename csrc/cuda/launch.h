// Kernels whose blocks meet at a barrier of the whole grid.
#pragma once

#include <algorithm>
#include <atomic>

#include "check.h"

namespace pama {

// Blocks of a kernel that are resident together, as a cooperative launch needs; asked once per device.
template <auto kKernel>
int resident_blocks(int device, int threads, int most_per_multiprocessor) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  if (device < kDevices && known[device]) return known[device];
  const DeviceGuard guard(device);
  int multiprocessors = 0, each = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int blocks = multiprocessors * std::clamp(each, 1, most_per_multiprocessor);
  if (device < kDevices) known[device] = blocks;
  return blocks;
}

// Launches a kernel of one argument, cooperatively if there is more than one block.
template <class Params>
void launch_together(const void* kernel, int64_t blocks, int threads, const Params& params, void* stream,
                     const char* name) {
  Params copy = params;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(blocks));
  if (blocks == 1) {
    check_cuda(cudaLaunchKernel(kernel, grid, threads, arguments, 0, static_cast<cudaStream_t>(stream)), name);
  } else {
    check_cuda(cudaLaunchCooperativeKernel(kernel, grid, threads, arguments, 0, static_cast<cudaStream_t>(stream)),
               name);
  }
  check_cuda(cudaGetLastError(), name);
}

}  // namespace pama
