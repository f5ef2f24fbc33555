// What the kernels of the losses share: rows or runs of tokens dealt to teams of threads, tokens read four at a time,
// and sums that meet in a fixed order.
#pragma once

#include <cooperative_groups.h>

#include "launch.h"
#include "pama/loss.h"
#include "warp.cuh"

namespace pama {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kBlocksPerSM = 2;   // more would leave a thread too few registers
constexpr int kRunTokens = 2048;  // of a segment where rows do not count
constexpr int kWarpRow = 256;     // up to this length a warp takes a row, else a block
constexpr unsigned kAll = 0xffffffffu;

__device__ inline double warp_max(double x) {
  for (int offset = 16; offset > 0; offset /= 2) {
    const double other = __shfl_xor_sync(kAll, x, offset);
    x = other > x ? other : x;
  }
  return x;
}

// The threads that work on one segment: a warp, or the block.
struct Team {
  bool warps;
  int lane, size;
  int64_t index, count;  // of the team among all

  __device__ explicit Team(const LossParams& p)
      : warps(p.by_rows() && p.cols <= kWarpRow),
        lane(warps ? threadIdx.x % 32 : threadIdx.x),
        size(warps ? 32 : kThreads),
        index(warps ? static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32 : blockIdx.x),
        count(warps ? static_cast<int64_t>(gridDim.x) * kWarps : gridDim.x) {}

  // Over the team, known to all of it; `shared` has a slot for each warp.
  __device__ double sum(double x, double* shared) const {
    x = warp_sum(x);
    if (warps) return x;
    __syncthreads();  // the slots may still be read from the last time
    if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
    __syncthreads();
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += shared[w];
    return total;
  }
};

__host__ __device__ inline int64_t segment_length(const LossParams& p) { return p.by_rows() ? p.cols : kRunTokens; }
__host__ __device__ inline int64_t segments_of(const LossParams& p) {
  if (p.by_rows()) return p.rows;
  return (p.tokens() + kRunTokens - 1) / kRunTokens;
}

// Up to four tokens that follow each other.
struct Four {
  int64_t token, row, col;
  int count;
  bool together;  // four in one row

  __device__ Four(const LossParams& p, int64_t first, int64_t last)
      : token(first),
        row(p.rows == 1 ? 0 : first / p.cols),
        col(first - row * p.cols),
        count(first >= last      ? 0
              : last - first < 4 ? static_cast<int>(last - first)
                                 : 4),
        together(count == 4 && col + 4 <= p.cols) {}

  // Where token k of them is in a plane.
  __device__ int64_t in(const LossParams& p, const Plane& q, int k) const {
    if (together) return row * q.row + (col + k) * q.col;
    const int64_t r = p.rows == 1 ? 0 : (token + k) / p.cols;
    return r * q.row + (token + k - r * p.cols) * q.col;
  }
};

template <class S>
struct alignas(4 * sizeof(S) < 16 ? 4 * sizeof(S) : 16) Quad {
  S at[4];
};
template <class S>
__device__ bool holds_quad(const S* data) {
  return reinterpret_cast<uintptr_t>(data) % alignof(Quad<S>) == 0;
}

template <class S, class C>
__device__ void load_as(const LossParams& p, const Plane& q, const Four& f, C* to) {
  const S* const data = reinterpret_cast<const S*>(q.data);
  if (f.together && q.col == 1 && holds_quad(data + f.in(p, q, 0))) {
    const Quad<S> quad = *reinterpret_cast<const Quad<S>*>(data + f.in(p, q, 0));
    for (int k = 0; k < 4; ++k) to[k] = static_cast<C>(Storage<S>::load(quad.at[k]));
  } else {
    for (int k = 0; k < 4; ++k) to[k] = k < f.count ? static_cast<C>(Storage<S>::load(data[f.in(p, q, k)])) : C{0};
  }
}

template <class C>
__device__ void load(const LossParams& p, const Plane& q, DType dtype, const Four& f, C* to) {
  switch (dtype) {
    case DType::kFloat32: return load_as<float>(p, q, f, to);
    case DType::kFloat64: return load_as<double>(p, q, f, to);
    case DType::kFloat16: return load_as<Half>(p, q, f, to);
    default: return load_as<BFloat16>(p, q, f, to);
  }
}

// Which of the four are valid; returns how many.
__device__ inline int load_valid(const LossParams& p, const Four& f, bool* to) {
  if (f.together && p.mask.data && p.mask.col == 1 && size_of(p.mask_dtype) == 1) {
    const int8_t* const data = reinterpret_cast<const int8_t*>(p.mask.data) + f.in(p, p.mask, 0);
    if (holds_quad(data)) {
      const Quad<int8_t> quad = *reinterpret_cast<const Quad<int8_t>*>(data);
      int count = 0;
      for (int k = 0; k < 4; ++k) count += to[k] = quad.at[k] != 0;
      return count;
    }
  }
  int count = 0;
  for (int k = 0; k < 4; ++k)
    count += to[k] = k < f.count && (!p.mask.data || is_set(p.mask.data, p.mask_dtype, f.in(p, p.mask, k)));
  return count;
}

template <class S, class C>
__device__ void store_as(char* data, int64_t at, int64_t step, const Four& f, const C* from) {
  S* const to = reinterpret_cast<S*>(data) + at;
  Quad<S> quad;
  for (int k = 0; k < 4; ++k) quad.at[k] = store_finite<S>(from[k]);
  if (f.count == 4 && step == 1 && holds_quad(to)) {
    *reinterpret_cast<Quad<S>*>(to) = quad;
  } else {
    for (int k = 0; k < 4; ++k)
      if (k < f.count) to[k * step] = quad.at[k];
  }
}

// To tokens `step` apart, the first of them at `at`.
template <class C>
__device__ void store(char* data, DType dtype, int64_t at, int64_t step, const Four& f, const C* from) {
  switch (dtype) {
    case DType::kFloat32: return store_as<float>(data, at, step, f, from);
    case DType::kFloat64: return store_as<double>(data, at, step, f, from);
    case DType::kFloat16: return store_as<Half>(data, at, step, f, from);
    default: return store_as<BFloat16>(data, at, step, f, from);
  }
}

// Calls each(four, valid, scale) for the tokens of the team's segments, for all lanes of a warp equally often, and
// returns how many valid tokens its thread has seen; rows with any are added to `sequences` by the team's first thread.
template <class C, class F>
__device__ int64_t for_tokens(const LossParams& p, const Team& team, double* shared, int64_t& sequences, F each) {
  int64_t tokens = 0;
  const int64_t length = segment_length(p), all = p.tokens(), segments = segments_of(p);
  for (int64_t s = team.index; s < segments; s += team.count) {
    const int64_t begin = s * length, end = begin + length < all ? begin + length : all;
    double scale = 1.0;
    bool valid[4];
    if (p.by_rows()) {
      int64_t own = 0;
      for (int64_t t = begin + 4 * team.lane; t < end; t += 4 * team.size) own += load_valid(p, Four(p, t, end), valid);
      const int64_t counted = static_cast<int64_t>(team.sum(static_cast<double>(own), shared));
      scale = p.row_scale(counted);
      if (team.lane == 0) {
        sequences += counted > 0;
        if (p.row_scales()) static_cast<C*>(p.scale)[1 + s] = static_cast<C>(scale);
      }
    }
    for (int64_t t = begin; t < end; t += 4 * team.size) {
      const Four four(p, t + 4 * team.lane, end);
      tokens += load_valid(p, four, valid);
      each(four, valid, scale);
    }
  }
  return tokens;
}

// Slot k of a block's sums stands at [k * gridDim.x + block] of the workspace.
__device__ inline double& slot(const LossParams& p, int k, int block) {
  return static_cast<double*>(p.workspace)[static_cast<int64_t>(k) * gridDim.x + block];
}

// A thread's x, summed over the block, into a slot. All threads must call it.
__device__ inline void leave(const LossParams& p, int k, double x, double* shared, bool largest = false) {
  x = largest ? warp_max(x) : warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x != 0) return;
  double total = shared[0];
  for (int w = 1; w < kWarps; ++w) total = !largest ? total + shared[w] : shared[w] > total ? shared[w] : total;
  slot(p, k, blockIdx.x) = total;
}

// What each warp has summed for each objective, `sums` [kWarps][kMaxObjectives], into the slots from k on.
__device__ inline void leave_objectives(const LossParams& p, int k, const double (*sums)[kMaxObjectives], int n) {
  if (threadIdx.x >= n) return;
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += sums[w][threadIdx.x];
  slot(p, k + threadIdx.x, blockIdx.x) = total;
}

// The slots of all blocks, in block 0; `largest` is the slot of which not the sum is wanted. True there.
__device__ inline bool meet(const LossParams& p, int slots, int largest, double* totals) {
  if (gridDim.x > 1) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
  if (blockIdx.x != 0) return false;
  for (int k = threadIdx.x / 32; k < slots; k += kWarps) {
    double x = 0.0;  // no largest is below
    for (int b = threadIdx.x % 32; b < gridDim.x; b += 32) {
      const double other = slot(p, k, b);
      x = k != largest ? x + other : other > x ? other : x;
    }
    x = k != largest ? warp_sum(x) : warp_max(x);
    if (threadIdx.x % 32 == 0) totals[k] = x;
  }
  __syncthreads();
  return true;
}

// Blocks for a loss: as many as there are teams for, but all resident together if there is more than one.
template <auto kKernel>
int blocks_for(const LossParams& p) {
  const int64_t teams = p.by_rows() && p.cols <= kWarpRow ? kWarps : 1, wanted = (segments_of(p) + teams - 1) / teams;
  if (wanted <= 1) return 1;
  const int64_t most = resident_blocks<kKernel>(p.device.index, kThreads, kBlocksPerSM);
  return static_cast<int>(wanted < most ? wanted : most);
}

}  // namespace pama
