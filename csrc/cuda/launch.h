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

// What ask() says of a device, asked once; 0 is asked again.
constexpr int kKnownDevices = 64;
template <class Ask>
int ask_once(std::atomic<int> (&known)[kKnownDevices], int device, Ask ask) {
  if (device >= kKnownDevices) return ask();
  int answer = known[device];
  if (answer == 0) known[device] = answer = ask();
  return answer;
}

template <cudaDeviceAttr kAttribute>
int attribute_of(int device) {
  static std::atomic<int> known[kKnownDevices];
  return ask_once(known, device, [&] {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, kAttribute, device), "cudaDeviceGetAttribute");
    return value;
  });
}

// Lets a kernel have so much dynamic shared memory on a device.
template <auto kKernel>
void allow_shared(int device, int bytes) {
  static std::atomic<int> done[kKnownDevices];
  ask_once(done, device, [&] {
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kKernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    bytes),
               "cudaFuncSetAttribute");
    return 1;
  });
}

// Compute capability that the code of a kernel was written for, 90 for 9.0: less than the device's where that runs
// older PTX.
template <auto kKernel>
int code_version(int device) {
  static std::atomic<int> known[kKnownDevices];
  return ask_once(known, device, [&] {
    cudaFuncAttributes attributes{};
    check_cuda(cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kKernel)), "cudaFuncGetAttributes");
    return attributes.ptxVersion;
  });
}

// Blocks of a kernel that are resident together, as a cooperative launch needs.
template <auto kKernel>
int resident_blocks(int device, int threads, int most_per_multiprocessor, int shared = 0) {
  static std::atomic<int> known[kKnownDevices];
  return ask_once(known, device, [&] {
    const DeviceGuard guard(device);
    if (shared > 0) allow_shared<kKernel>(device, shared);
    int each = 0;
    check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, shared),
               "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
    return attribute_of<cudaDevAttrMultiProcessorCount>(device) * std::clamp(each, 1, most_per_multiprocessor);
  });
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
