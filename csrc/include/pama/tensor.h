// A tensor as the kernels see it: memory, sizes and strides. Both doors fill these; nothing below them knows torch.
#pragma once

#include <cstdint>

#include "pama/hd.h"

namespace pama {

enum class DType : uint8_t { kFloat32, kFloat64, kFloat16, kBFloat16, kInt8, kInt16, kInt32, kInt64, kOther };

PAMA_HD constexpr bool is_float(DType t) { return t <= DType::kBFloat16; }

PAMA_HD constexpr int size_of(DType t) {
  switch (t) {
    case DType::kFloat64:
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kInt16: return 2;
    default: return 1;
  }
}

enum class DeviceType : uint8_t { kCPU, kCUDA, kOther };

struct Device {
  DeviceType type;
  int index;
  bool operator==(const Device& o) const { return type == o.type && index == o.index; }
};

// Sizes and strides are borrowed; strides count elements.
struct TensorView {
  void* data;
  DType dtype;
  Device device;
  int ndim;
  const int64_t* sizes;
  const int64_t* strides;
};

// A [rows, cols] plane of elements: one objective, the mask, log_ratio or out. Not initialised: calls carry 64 of them.
struct Plane {
  char* data;
  int64_t row, col;  // strides in elements
};

// Whether the objectives of a token stand side by side.
PAMA_HD bool adjacent(const Plane* planes, int n, DType dtype) {
  const Plane& q = planes[0];
  if (n == 1 || q.col != n) return false;
  for (int i = 1; i < n; ++i) {
    const Plane& r = planes[i];
    if (r.data != q.data + i * size_of(dtype) || r.row != q.row || r.col != q.col) return false;
  }
  return true;
}

}  // namespace pama
