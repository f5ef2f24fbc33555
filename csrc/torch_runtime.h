// What both doors need of torch at run time, through its stable C interface only.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include "pama/combine.h"
#include "pama/gae.h"
#include "pama/loss.h"

// In libtorch_cuda; null in a CPU-only torch, where nothing calls it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace pama {

#ifdef PAMA_WITH_CUDA
constexpr bool kWithCuda = true;
#else
constexpr bool kWithCuda = false;  // then what launches CUDA kernels does not exist, and is not named below
#endif

inline void run_combine(CombineParams& params, void* stream) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return launch_combine_cuda(params, stream);
  launch_combine_cpu(params, torch_parallel_for);
}

inline void run_gae(const GaeParams& params, void* stream) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return launch_gae_cuda(params, stream);
  launch_gae_cpu(params, torch_parallel_for);
}

inline void run_min_norm(const MinNormParams& params, void* stream) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return launch_min_norm_cuda(params, stream);
  launch_min_norm_cpu(params, torch_parallel_for);
}

inline void run_policy_loss(const PolicyParams& params, void* stream) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return launch_policy_loss_cuda(params, stream);
  launch_policy_loss_cpu(params, torch_parallel_for);
}

inline void run_value_loss(const ValueParams& params, void* stream) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return launch_value_loss_cuda(params, stream);
  launch_value_loss_cpu(params, torch_parallel_for);
}

inline void run_scale(const ScaleParams& params, void* stream) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return launch_scale_cuda(params, stream);
  launch_scale_cpu(params, torch_parallel_for);
}

// Bytes that a kernel wants for itself.

inline int64_t combine_workspace(const CombineParams& params) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return combine_cuda_workspace(params);
  return 0;
}

inline int64_t min_norm_workspace(const MinNormParams& params) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return min_norm_cuda_workspace(params);
  return 0;
}

inline int64_t policy_loss_workspace(const PolicyParams& params) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return policy_loss_cuda_workspace(params);
  return 0;
}

inline int64_t value_loss_workspace(const ValueParams& params) {
  if constexpr (kWithCuda)
    if (params.device.type == DeviceType::kCUDA) return value_loss_cuda_workspace(params);
  return 0;
}

}  // namespace pama
