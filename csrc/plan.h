// What the plans share: from tensors to the planes of a parameter struct.
#pragma once

#include "pama/tensor.h"

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

}  // namespace pama
