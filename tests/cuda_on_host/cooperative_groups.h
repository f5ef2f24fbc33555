#pragma once

#include "cuda_runtime.h"

// A cluster here is the whole grid, as it is in the kernels of this package.
namespace cooperative_groups {
struct Grid {
  void sync() const {
    barrier_arrive();
    barrier_wait();
  }
  // One after the other, or a GPU would wait forever. Here who waits waits until all do; there, until all have arrived.
  void barrier_arrive() const {
    if ((*host::fibers)[threadIdx.x].arrived++ != 0) std::terminate();
  }
  void barrier_wait() const {
    if (--(*host::fibers)[threadIdx.x].arrived != 0) std::terminate();
    host::wait(host::State::kGrid);
  }
  template <class T>
  T* map_shared_rank(T* mine, int block) const {
    const char* base = aligned((*host::shared)[blockIdx.x]);
    return reinterpret_cast<T*>(aligned((*host::shared)[block]) + (reinterpret_cast<const char*>(mine) - base));
  }
};
inline Grid this_grid() { return {}; }
inline Grid this_cluster() { return {}; }
}  // namespace cooperative_groups
