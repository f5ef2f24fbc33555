// Errors of the CUDA runtime as exceptions, and the device of a call.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pama {

inline void check_cuda(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the next call would find this error once more
  throw std::runtime_error(std::string("pama_ext: ") + what + ": " + cudaGetErrorString(status));
}

// Makes `device` current and puts the former one back.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check_cuda(cudaGetDevice(&former_), "cudaGetDevice");
    if (former_ != device_) check_cuda(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (former_ != device_) cudaSetDevice(former_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_, former_ = -1;
};

}  // namespace pama
