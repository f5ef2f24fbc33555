// What both doors need of torch at run time, through its stable C interface only.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include "pama/combine.h"
#include "pama/gae.h"

// In libtorch_cuda; null in a CPU-only torch, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace pama {

inline void run_combine(CombineParams& params, void* stream) {
#ifdef PAMA_WITH_CUDA
  if (params.device.type == DeviceType::kCUDA) return launch_combine_cuda(params, stream);
#endif
  (void)stream;
  launch_combine_cpu(params, torch_parallel_for);
}

// Bytes behind the packed results that the kernel wants for itself.
inline int64_t combine_workspace(const CombineParams& params) {
#ifdef PAMA_WITH_CUDA
  if (params.device.type == DeviceType::kCUDA) return combine_cuda_workspace(params);
#endif
  (void)params;
  return 0;
}

inline void run_gae(const GaeParams& params, void* stream) {
#ifdef PAMA_WITH_CUDA
  if (params.device.type == DeviceType::kCUDA) return launch_gae_cuda(params, stream);
#endif
  (void)stream;
  launch_gae_cpu(params, torch_parallel_for);
}

inline void run_min_norm(const MinNormParams& params, void* stream) {
#ifdef PAMA_WITH_CUDA
  if (params.device.type == DeviceType::kCUDA) return launch_min_norm_cuda(params, stream);
#endif
  (void)stream;
  launch_min_norm_cpu(params, torch_parallel_for);
}

inline int64_t min_norm_workspace(const MinNormParams& params) {
#ifdef PAMA_WITH_CUDA
  if (params.device.type == DeviceType::kCUDA) return min_norm_cuda_workspace(params);
#endif
  (void)params;
  return 0;
}

}  // namespace pama
