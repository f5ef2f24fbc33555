// What the plans share: from tensors to the planes of a parameter struct.
#pragma once

#include "pama/combine.h"

namespace pama {

inline bool same_shape(const TensorView& t, const int64_t* sizes, int ndim) {
  if (t.ndim != ndim) return false;
  for (int d = 0; d < ndim; ++d)
    if (t.sizes[d] != sizes[d]) return false;
  return true;
}

// A [B] or [B, T] tensor as a plane; [B] is one row of B tokens.
inline Plane plane(const TensorView& t) {
  if (t.ndim == 1) return {static_cast<char*>(t.data), 0, t.strides[0]};
  return {static_cast<char*>(t.data), t.strides[0], t.strides[1]};
}

// A number for each objective, from a tensor if there is one. Returns null, or `problem`.
inline const char* plan_numbers(const TensorView* t, int n, Device device, PerObjective& to, const char* problem) {
  to.data = nullptr;
  if (!t) return nullptr;
  if (t->ndim != 1 || t->sizes[0] != n || !is_float(t->dtype) || !(t->device == device)) return problem;
  to.data = t->data;
  to.dtype = t->dtype;
  to.stride = t->strides[0];
  return nullptr;
}

}  // namespace pama
