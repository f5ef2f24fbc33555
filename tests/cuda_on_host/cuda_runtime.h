// Enough of CUDA to run csrc/cuda/*.cu on the host: each block is an OS thread, each of its threads a fiber.
//
// Fibers run one after the other, in an order the caller chooses, from one barrier to the next; a warp goes on alone
// until it waits for the block. A correct kernel gives the same bits in every order; one that lacks a barrier does not,
// since some fiber reads what another has yet to write, or has overwritten.
//
// Compile with -U_FORTIFY_SOURCE, under which the C library takes a jump from fiber to fiber for an error.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#define CUDART_VERSION 0
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__ static thread_local  // one copy per OS thread, that is per block

struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x_ = 1) : x(x_) {}
};
struct Index {
  int x;
};
inline thread_local Index threadIdx, blockIdx, blockDim, gridDim;

using cudaError_t = int;
using cudaStream_t = void*;
constexpr int cudaSuccess = 0;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor,
  cudaDevAttrReservedSharedMemoryPerBlock,
  cudaDevAttrL2CacheSize,
};
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension = 1, cudaLaunchAttributeCooperative };
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
namespace host {
// The devices that are imitated.
struct Imitated {
  int compute_capability, shared_bytes, multiprocessors, cache_bytes;
  bool operator==(const Imitated&) const = default;
};
inline std::vector<Imitated> devices{{9, 228 * 1024, 2, 50 << 20}};
inline int device = 0;
}  // namespace host
inline const char* cudaGetErrorString(int) { return "none"; }
inline int cudaGetLastError() { return cudaSuccess; }
inline int cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline int cudaSetDevice(int) { return cudaSuccess; }
inline int cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  const auto [capability, shared, multiprocessors, cache] = host::devices.at(device);
  const int known[] = {multiprocessors, capability, shared - 1024, shared, 1024, cache};
  return *value = known[attribute], cudaSuccess;
}
struct cudaFuncAttributes {
  int ptxVersion;
};
inline int cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  attributes->ptxVersion = 10 * host::devices.at(host::device).compute_capability;
  return cudaSuccess;
}
inline int cudaFuncSetAttribute(const void*, int, int) { return cudaSuccess; }
template <class Kernel>
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 2, cudaSuccess;
}
inline int cudaMemsetAsync(void* data, int value, size_t bytes, void*) { return std::memset(data, value, bytes), 0; }
inline int64_t min(int64_t a, int64_t b) { return std::min(a, b); }
inline int64_t max(int64_t a, int64_t b) { return std::max(a, b); }
inline void atomicAdd(unsigned long long* to, unsigned long long x) { std::atomic_ref(*to) += x; }
inline unsigned atomicAdd(unsigned* to, unsigned x) { return std::atomic_ref(*to).fetch_add(x); }
inline void __threadfence() { std::atomic_thread_fence(std::memory_order_seq_cst); }
inline int min(int a, int b) { return std::min(a, b); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
using std::signbit;

namespace host {

enum class State { kReady, kWarp, kBlock, kGrid, kDone };

struct Fiber {
  ucontext_t start;
  jmp_buf at;  // once it has started: unlike swapcontext, a jump asks nothing of the kernel
  bool started = false;
  State state = State::kReady;
  unsigned mask;    // at kWarp: the lanes that wait for each other
  int arrived = 0;  // at the barrier of the cluster or the grid, without having waited there yet
  double exchange;  // what a shuffle shows the others
};

inline int launches = 0, blocks_together = 0;  // of the last kernel whose blocks may meet
inline unsigned order = 0;                     // 0: ascending, 1: descending, else the seed of a shuffle
inline thread_local std::vector<Fiber>* fibers;
inline thread_local std::vector<std::vector<char>>* shared;  // dynamic shared memory of all blocks
inline thread_local jmp_buf scheduler;

inline void wait(State state, unsigned mask = ~0u) {
  Fiber& self = (*fibers)[threadIdx.x];
  if (!(mask >> threadIdx.x % 32 & 1)) std::terminate();  // a lane has to be one of those that it waits for
  self.state = state;
  self.mask = mask;
  if (!_setjmp(self.at)) _longjmp(scheduler, 1);
}

// Runs a fiber until it waits or is done.
inline void resume(Fiber& fiber) {
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.at, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

// Stacks of the threads of a block, used again: their pages are there then.
constexpr size_t kStack = 128 * 1024, kMostThreads = 1024;
class Stacks {
 public:
  Stacks() {
    const std::lock_guard lock(mutex);
    if (free.empty()) free.emplace_back(new char[kMostThreads * kStack]);
    memory = std::move(free.back());
    free.pop_back();
  }
  ~Stacks() {
    const std::lock_guard lock(mutex);
    free.push_back(std::move(memory));
  }
  char* operator[](int thread) { return memory.get() + thread * kStack; }

 private:
  static inline std::mutex mutex;
  static inline std::vector<std::unique_ptr<char[]>> free;
  std::unique_ptr<char[]> memory;
};

using Kernel = void (*)(const void* argument, const void* kernel);

inline void run_block(int block, int blocks, int threads, const void* kernel, const void* argument, Kernel call,
                      std::barrier<>& grid, std::vector<std::vector<char>>& memory) {
  static thread_local struct {
    const void *kernel, *argument;
    Kernel call;
  } job;
  job = {kernel, argument, call};
  std::vector<Fiber> all(threads);
  fibers = &all;
  shared = &memory;
  blockIdx.x = block;
  gridDim.x = blocks;
  blockDim.x = threads;
  std::vector<int> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  if (order == 1) std::reverse(turn.begin(), turn.end());
  if (order > 1) std::shuffle(turn.begin(), turn.end(), std::mt19937(order));

  Stacks stacks;
  for (int k = 0; k < threads; ++k) {
    getcontext(&all[k].start);
    all[k].start.uc_stack.ss_sp = stacks[k];
    all[k].start.uc_stack.ss_size = kStack;
    makecontext(
        &all[k].start,
        +[] {
          job.call(job.argument, job.kernel);
          if ((*fibers)[threadIdx.x].arrived != 0) std::terminate();
          wait(State::kDone);
        },
        0);
  }
  auto all_wait = [&](int first, int last, State state) {
    bool some = false;
    for (int k = first; k < last; ++k) {
      if (all[k].state != state && all[k].state != State::kDone) return false;
      some |= all[k].state == state;
    }
    return some;
  };
  auto release = [&](int first, int last, State state) {
    for (int k = first; k < last; ++k)
      if (all[k].state == state) all[k].state = State::kReady;
  };
  auto team_waits = [&](int warp, unsigned mask) {
    for (int k = warp; k < warp + 32; ++k) {
      const bool waits = all[k].state == State::kWarp && all[k].mask == mask;
      if (mask >> (k - warp) & 1 && !waits && all[k].state != State::kDone) return false;
    }
    return true;
  };
  auto release_team = [&](int warp, unsigned mask) {
    for (int k = warp; k < warp + 32; ++k)
      if (mask >> (k - warp) & 1 && all[k].state == State::kWarp) all[k].state = State::kReady;
  };
  while (!std::all_of(all.begin(), all.end(), [](const Fiber& f) { return f.state == State::kDone; })) {
    for (int first : turn) {  // a warp runs as far as it can before another one does
      const int warp = first / 32 * 32;
      const auto ready = [&](int k) { return k / 32 * 32 == warp && all[k].state == State::kReady; };
      while (std::any_of(turn.begin(), turn.end(), ready)) {
        for (int k : turn) {
          if (!ready(k)) continue;
          threadIdx.x = k;
          resume(all[k]);
        }
        for (int k = warp; k < warp + 32; ++k)
          if (all[k].state == State::kWarp && team_waits(warp, all[k].mask)) release_team(warp, all[k].mask);
      }
    }
    if (all_wait(0, threads, State::kBlock)) release(0, threads, State::kBlock);
    if (all_wait(0, threads, State::kGrid)) {
      grid.arrive_and_wait();
      release(0, threads, State::kGrid);
    }
    if (std::none_of(all.begin(), all.end(), [](const Fiber& f) { return f.state == State::kReady; }) &&
        std::any_of(all.begin(), all.end(), [](const Fiber& f) { return f.state != State::kDone; }))
      std::terminate();  // threads wait at different barriers: a deadlock on a GPU
  }
}

}  // namespace host

inline void __syncthreads() { host::wait(host::State::kBlock); }
inline int __syncthreads_or(int x) {
  static thread_local int any = 0;
  any |= x;
  __syncthreads();
  const int all = any;
  __syncthreads();
  any = 0;
  return all;
}
inline void __syncwarp(unsigned mask = ~0u) { host::wait(host::State::kWarp, mask); }
inline char* aligned(std::vector<char>& memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 15) / 16 * 16);
}
namespace pama {
inline char* dynamic_shared() { return aligned((*host::shared)[blockIdx.x]); }
}  // namespace pama
inline double shuffle(unsigned mask, double x, int from) {
  (*host::fibers)[threadIdx.x].exchange = x;
  __syncwarp(mask);
  if (!(mask >> from % 32 & 1)) std::terminate();  // what others show is undefined
  const double other = (*host::fibers)[from].exchange;
  __syncwarp(mask);
  return other;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset) {
  return static_cast<T>(shuffle(mask, x, threadIdx.x ^ offset));
}
template <class T>
T __shfl_sync(unsigned mask, T x, int lane) {
  return static_cast<T>(shuffle(mask, x, threadIdx.x / 32 * 32 + lane % 32));
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int offset) {  // beyond the warp: the lane's own
  return static_cast<T>(shuffle(mask, x, threadIdx.x % 32 + offset < 32 ? threadIdx.x + offset : threadIdx.x));
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  (*host::fibers)[threadIdx.x].exchange = x;
  __syncwarp(mask);
  unsigned all = 0;
  for (int lane = 0; lane < 32; ++lane)
    if (mask >> lane & 1) all |= unsigned{(*host::fibers)[threadIdx.x / 32 * 32 + lane].exchange != 0} << lane;
  __syncwarp(mask);
  return all;
}
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

// The kernels of this package take one argument, their parameter struct; the source under test says which. What has not
// been written to in dynamic shared memory is NaN.
inline int run_on_host(const void* kernel, dim3 blocks, int threads, void** arguments, host::Kernel call,
                       size_t shared) {
  std::barrier<> grid(blocks.x);
  ++host::launches;
  if (shared > static_cast<size_t>(host::devices.at(host::device).shared_bytes - 1024)) std::terminate();
  constexpr size_t kCanary = 256;
  std::vector<std::vector<char>> memory(blocks.x, std::vector<char>(shared + 16 + kCanary, static_cast<char>(0xff)));
  std::vector<std::thread> workers;
  for (unsigned b = 0; b < blocks.x; ++b)
    workers.emplace_back([&, b] { host::run_block(b, blocks.x, threads, kernel, arguments[0], call, grid, memory); });
  for (std::thread& worker : workers) worker.join();
  for (std::vector<char>& block : memory)
    for (const char* at = aligned(block) + shared; at < block.data() + block.size(); ++at)
      if (*at != static_cast<char>(0xff)) std::terminate();  // a kernel has written beyond its shared memory
  return cudaSuccess;
}
#define cudaLaunchKernel(kernel, blocks, threads, arguments, shared, stream) \
  run_on_host(kernel, blocks, threads, arguments, call_kernel, shared)
#define cudaLaunchKernelExC(config, kernel, arguments)            \
  (host::blocks_together = static_cast<int>((config)->gridDim.x), \
   run_on_host(kernel, (config)->gridDim, (config)->blockDim.x, arguments, call_kernel, (config)->dynamicSmemBytes))
