// The statistics of a tile: pieces of one objective each, by a warp or a part of one. And the Gram matrix.
#pragma once

#include "pama/solve.h"
#include "tile.cuh"

namespace pama {

constexpr int kUnits = 128;  // pieces times objectives in a tile
constexpr int kPiece = 256;  // tokens of one objective that a warp takes; counts up to that are packed into 10 bits
static_assert(kUnits >= kMaxObjectives && kPiece < 1 << 10, "see above");

__host__ __device__ constexpr int64_t gram_size(int n) { return static_cast<int64_t>(n) * n + 1; }

// Per block in the workspace: the moments of each objective, then at level "token" the sums of c_i, of s* and of
// tokens; for min-norm the Gram matrix of the block, that of all, and the solver's scratch.
__host__ __device__ inline int64_t block_bytes(const CombineParams& p) {
  const int64_t doubles = p.n + 2 + (p.has_gram() ? 2 * gram_size(p.n) + min_norm_scratch(p.n) : 0);
  return p.n * static_cast<int64_t>(sizeof(Moments)) + doubles * static_cast<int64_t>(sizeof(double));
}

template <class C>
struct Shared {
  Moments part[kUnits];  // of a piece: [piece, n]
  Moments total[kMaxObjectives];
  double weights[kUnits], values[kUnits];  // of a pool: [pool, n] and [pool]
  double sums[kWarps][kMaxObjectives + 2];
  C scale[kMaxObjectives], share[kUnits];  // reward weights; the weights once more, as they are used
};
static_assert(sizeof(Shared<float>) % kBytes == 0 && sizeof(Shared<double>) % kBytes == 0,
              "the tile behind it is accessed kBytes at a time");

__device__ inline Moments* block_moments(const CombineParams& p, int block) {
  return reinterpret_cast<Moments*>(static_cast<char*>(p.workspace) + block * block_bytes(p));
}
__device__ inline double* block_sums(const CombineParams& p, int block) {
  return reinterpret_cast<double*>(block_moments(p, block) + p.n);
}
__device__ inline double* block_gram(const CombineParams& p, int block) { return block_sums(p, block) + p.n + 2; }

template <class T>
__device__ T warp_sum(T x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

template <class C>
class Scanner {
 protected:
  __device__ __forceinline__ Scanner(const CombineParams& params, char* memory)
      : p(params), shared(*reinterpret_cast<Shared<C>*>(memory)), tile(memory + sizeof(Shared<C>), params) {}

  struct Entry {
    C advantage, gated;
    bool finite, taken, positive, nonzero;
  };

  // Objective i at token k of the tile: A after reward_weights, and I(A).
  __device__ __forceinline__ Entry entry(int i, int k) const {
    const int flags = tile.flags[k];
    const C raw = tile.x[i * tile.stride + k];
    Entry e;
    e.finite = (flags & kValidFlag) && raw - raw == C{0};
    e.taken = e.finite || (p.propagate && (flags & kValidFlag));
    C processed = raw;
    if (p.affine && e.taken) {
      const bool grouped = p.normalizes_groups();
      const int64_t many = grouped ? p.groups : 1;
      processed = Maps<C>(static_cast<C*>(p.affine), p.n * many)[i * many + (grouped ? tile.pool[k] : 0)](raw);
    }
    e.positive = e.finite && processed > C{0};
    const C kept = e.taken ? noon(processed, p.noon ? C{0} : -static_cast<C>(HUGE_VAL)) : C{0};
    e.nonzero = kept != C{0};
    e.advantage = e.taken ? kept * shared.scale[i] : C{0};
    e.gated = gate(e.advantage, bool(flags & kNotAboveFlag), bool(flags & kNotBelowFlag));
    return e;
  }

  // Statistics of each piece of `piece` tokens and each objective, in part[piece, n]: by as many lanes of a warp as are
  // worth it, once to find the mean and once around it.
  __device__ __forceinline__ void scan(int count, int piece) {
    int lanes = 1;
    while (lanes < 32 && lanes * 2 < piece) lanes *= 2;
    const int units = (count + piece - 1) / piece * p.n, warp = threadIdx.x / 32, each = 32 / lanes;
    const int lane = threadIdx.x % lanes;
    for (int base = warp * each; base < units; base += kWarps * each) {
      const int unit = base + threadIdx.x % 32 / lanes, i = unit % p.n;
      const int begin = unit < units ? unit / p.n * piece : 0, end = unit < units ? min(count, begin + piece) : 0;
      const C* x = tile.x + i * tile.stride;
      C sum{0}, seen{0};
      for (int k = begin + lane; k < end; k += lanes) {
        const bool usable = (tile.flags[k] & kValidFlag) && x[k] - x[k] == C{0};
        sum += usable ? x[k] : C{0};
        seen += usable ? C{1} : C{0};
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        seen += __shfl_xor_sync(0xffffffffu, seen, offset);
      }
      C centre = sum / (seen > C{0} ? seen : C{1});
      if (!(centre - centre == C{0})) centre = C{0};  // the sum of huge entries has overflowed

      C deviation{0}, squares{0}, active{0}, low = static_cast<C>(HUGE_VAL), high = -low;
      unsigned found = 0, told = 0;  // count, nonfinite, positive; nonzero, clipped: 10 bits each
      for (int k = begin + lane; k < end; k += lanes) {
        const Entry e = entry(i, k);
        const C d = e.finite ? x[k] - centre : C{0};
        deviation += d;
        squares += d * d;
        low = e.finite && x[k] < low ? x[k] : low;
        high = e.finite && x[k] > high ? x[k] : high;
        active += e.gated;
        found += e.finite ? 1u : (tile.flags[k] & kValidFlag) ? 1u << 10 : 0u;
        found += e.positive ? 1u << 20 : 0u;
        told += e.nonzero ? 1u + (e.gated == C{0} ? 1u << 10 : 0u) : 0u;
      }
      for (int offset = lanes / 2; offset > 0; offset /= 2) {
        deviation += __shfl_xor_sync(0xffffffffu, deviation, offset);
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        active += __shfl_xor_sync(0xffffffffu, active, offset);
        const C lower = __shfl_xor_sync(0xffffffffu, low, offset), higher = __shfl_xor_sync(0xffffffffu, high, offset);
        low = lower < low ? lower : low;
        high = higher > high ? higher : high;
        found += __shfl_xor_sync(0xffffffffu, found, offset);
        told += __shfl_xor_sync(0xffffffffu, told, offset);
      }
      if (lane == 0 && unit < units) {
        Moments m = Moments::empty();
        m.count = found & 1023;
        m.nonfinite = found >> 10 & 1023;
        m.positive = found >> 20;
        m.nonzero = told & 1023;
        m.clipped = told >> 10;
        m.active = static_cast<double>(active);
        settle(m, static_cast<double>(centre), static_cast<double>(deviation), static_cast<double>(squares));
        if (m.count > 0) m.min = static_cast<double>(low), m.max = static_cast<double>(high);
        shared.part[unit] = m;
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void clear_gram() {
    double* gram = block_gram(p, blockIdx.x);
    for (int e = threadIdx.x; e < gram_size(p.n); e += kThreads) gram[e] = 0.0;
  }

  // Sums of I(A_i) I(A_j) over the tile, in the upper triangle of block_gram, and behind it the tokens with data: a
  // warp to a pair.
  __device__ __forceinline__ void add_gram(int count) {
    double* gram = block_gram(p, blockIdx.x);
    double used = 0.0;
    for (int k = threadIdx.x; k < count; k += kThreads) {
      bool any = false;
      for (int i = 0; i < p.n; ++i) {
        const Entry e = entry(i, k);
        tile.gated[i * tile.stride + k] = e.gated;
        any |= e.taken;
      }
      used += any;
    }
    used = warp_sum(used);
    if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32][0] = used;
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 0; w < kWarps; ++w) gram[p.n * p.n] += shared.sums[w][0];
    const int lane = threadIdx.x % 32;
    for (int e = threadIdx.x / 32; e < p.n * p.n; e += kWarps) {
      const int i = e / p.n, j = e % p.n;
      if (j < i) continue;
      const C *a = tile.gated + i * tile.stride, *b = tile.gated + j * tile.stride;
      double sum = 0.0;
      for (int k = lane; k < count; k += 32) sum += static_cast<double>(a[k]) * static_cast<double>(b[k]);
      sum = warp_sum(sum);
      if (lane == 0) gram[e] += sum;
    }
    __syncthreads();
  }

  // Every block's Gram matrix, summed in block order, behind that of the block that calls it.
  __device__ __forceinline__ const double* merge_grams() {
    double* total = block_gram(p, blockIdx.x) + gram_size(p.n);
    for (int e = threadIdx.x; e < gram_size(p.n); e += kThreads) {
      double sum = 0.0;
      for (int b = 0; b < gridDim.x; ++b) sum += block_gram(p, b)[e];
      total[e] = sum;
    }
    __syncthreads();
    return total;
  }

  const CombineParams& p;
  Shared<C>& shared;
  const Tile<C> tile;
};

}  // namespace pama
