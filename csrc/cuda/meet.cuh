// Where the blocks of a launch wait for each other.
#pragma once

#include <cooperative_groups.h>

#include "pama/combine.h"

namespace pama {

// The cluster of this block; before compute capability 9.0 none is launched, and nothing here is called.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
__device__ __forceinline__ auto cluster() { return cooperative_groups::this_cluster(); }
#else
struct NoCluster {
  __device__ void sync() const {}
  __device__ void barrier_arrive() const {}
  __device__ void barrier_wait() const {}
  template <class T>
  __device__ T* map_shared_rank(T* mine, int) const {
    return mine;
  }
};
__device__ __forceinline__ NoCluster cluster() { return {}; }
#endif

__device__ __forceinline__ void wait_for_all(Meeting meeting) {
  switch (meeting) {
    case Meeting::kBlock: return __syncthreads();
    case Meeting::kCluster: return cluster().sync();
    default: return cooperative_groups::this_grid().sync();
  }
}

// Counts this block in, by one thread of a warp whose writes are then seen by whoever has counted it; how many have
// been.
__device__ __forceinline__ unsigned count_in(unsigned* count) {
#ifdef __CUDA_ARCH__  // unlike __threadfence(), it leaves the first-level cache as it is
  unsigned before;
  asm volatile("atom.add.release.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(count) : "memory");
  return before + 1;
#else
  return atomicAdd(count, 1u) + 1;
#endif
}

}  // namespace pama
