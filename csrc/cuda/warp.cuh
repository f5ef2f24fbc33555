// What the lanes of a warp do together.
#pragma once

#include <cmath>

namespace pama {

// Over so many lanes that follow each other; `mask` has all that call it together.
template <class T>
__device__ __forceinline__ T warp_sum(T x, int lanes = 32, unsigned mask = 0xffffffffu) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(mask, x, offset);
  return x;
}
__device__ __forceinline__ unsigned warp_sum(unsigned x, int lanes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  if (lanes == 32) return __reduce_add_sync(0xffffffffu, x);
#endif
  return warp_sum<unsigned>(x, lanes);
}

// So many lanes of a warp, a power of two, as the team that solves a min-norm problem: see pama/min_norm.h.
template <int kSize>
struct Lanes {
  const int lane;
  const bool first;
  const unsigned mask;  // of the team

  __device__ __forceinline__ Lanes()
      : lane(static_cast<int>(threadIdx.x) % kSize),
        first(lane == 0),
        mask((~0u >> (32 - kSize)) << (static_cast<int>(threadIdx.x) % 32 - lane)) {}

  template <class F>
  __device__ __forceinline__ void each(int begin, int end, F f) const {
#pragma unroll 1
    for (int k = begin + lane; k < end; k += kSize) f(k);
  }
  __device__ __forceinline__ void sync() const { __syncwarp(mask); }
  __device__ __forceinline__ bool any(bool x) const { return __ballot_sync(mask, x) != 0; }
  __device__ __forceinline__ double sum(double x) const { return warp_sum(x, kSize, mask); }
  __device__ __forceinline__ double least(double x) const {
    for (int offset = kSize / 2; offset > 0; offset /= 2) x = fmin(x, __shfl_xor_sync(mask, x, offset));
    return x;
  }
  __device__ __forceinline__ void find_least(double x, int& at) const {
    for (int offset = kSize / 2; offset > 0; offset /= 2) {
      const double other = __shfl_xor_sync(mask, x, offset);
      const int other_at = __shfl_xor_sync(mask, at, offset);
      if (other > x || (other == x && other_at >= at)) continue;
      x = other;
      at = other_at;
    }
  }
};

}  // namespace pama
