// Kernels whose blocks meet: in a cluster, or at a barrier of the whole grid.
#pragma once

#include <algorithm>
#include <atomic>

#include "check.h"
#include "pama/combine.h"

namespace pama {

#ifdef __CUDACC__
__device__ inline char* dynamic_shared() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}
#endif

constexpr int kKnownDevices = 64;

// Lets a kernel have so much dynamic shared memory on a device; told to CUDA once.
template <auto kKernel>
void allow_shared(int device, int bytes) {
  static std::atomic<bool> done[kKnownDevices];
  if (device < kKnownDevices && done[device]) return;
  check_cuda(
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
      "cudaFuncSetAttribute");
  if (device < kKnownDevices) done[device] = true;
}

// Compute capability that the code of a kernel was written for, 90 for 9.0: less than the device's where that runs
// older PTX. Asked once per device.
template <auto kKernel>
int code_version(int device) {
  static std::atomic<int> known[kKnownDevices];
  if (device < kKnownDevices && known[device]) return known[device];
  cudaFuncAttributes attributes{};
  check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)), "cudaFuncGetAttributes");
  if (device < kKnownDevices) known[device] = attributes.ptxVersion;
  return attributes.ptxVersion;
}

// Blocks of a kernel that are resident together, as a cooperative launch needs; asked once per device.
template <auto kKernel>
int resident_blocks(int device, int threads, int most_per_multiprocessor, int shared = 0) {
  static std::atomic<int> known[kKnownDevices];
  if (device < kKnownDevices && known[device]) return known[device];
  const DeviceGuard guard(device);
  if (shared > 0) allow_shared<kKernel>(device, shared);
  int multiprocessors = 0, each = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, shared),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int blocks = multiprocessors * std::clamp(each, 1, most_per_multiprocessor);
  if (device < kKnownDevices) known[device] = blocks;
  return blocks;
}

// Launches a kernel of one argument whose blocks meet, if there is more than one, as `meeting` says.
template <class Params>
void launch_together(const void* kernel, int64_t blocks, int threads, const Params& params, void* stream,
                     const char* name, Meeting meeting = Meeting::kGrid, int64_t shared = 0) {
  Params copy = params;
  void* arguments[] = {&copy};
  cudaLaunchAttribute attribute{};
  if (meeting == Meeting::kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = blocks > 1 ? 1 : 0;
  check_cuda(cudaLaunchKernelExC(&config, kernel, arguments), name);
  check_cuda(cudaGetLastError(), name);
}

}  // namespace pama
