// The statistics of a tile, by a warp for a slice of it or a part of a warp for a small pool. And the Gram matrix.
#pragma once

#include "pama/solve.h"
#include "tile.cuh"
#include "warp.cuh"

namespace pama {

constexpr int kUnits = 128;           // slices or pools of a tile, times objectives
constexpr int kPoolTokens = 256;      // of a pool that shares its tile with others
constexpr int kTileTokens = 1 << 13;  // at most: a lane adds up 32 of a slice, and counts fit 16 bits
static_assert(kUnits >= kMaxObjectives, "a unit for each objective");

__host__ __device__ constexpr int64_t gram_size(int n) { return static_cast<int64_t>(n) * n + 1; }

// Per block in the workspace: the moments of each objective, then at level "token" the sums of c_i, of s* and of
// tokens; for min-norm the Gram matrix of the block, that of all, and the solver's scratch.
__host__ __device__ inline int64_t block_bytes(const CombineParams& p) {
  const int64_t doubles = p.n + 2 + (p.has_gram() ? 2 * gram_size(p.n) + min_norm_scratch(p.n) : 0);
  return p.n * static_cast<int64_t>(sizeof(Moments)) + doubles * static_cast<int64_t>(sizeof(double));
}

template <class C>
struct Shared {
  Moments part[kUnits];  // of a slice or a pool: [slice, n]
  Moments total[kMaxObjectives];
  double weights[kUnits], values[kUnits];   // of a pool: [pool, n] and [pool]
  double sums[kWarps][kMaxObjectives + 2];  // of a warp; of a slice of the blocks, for an entry of the Gram matrix
  unsigned long long dead[kMaxObjectives];  // groups that give only 0, if they are measured here
  C scale[kMaxObjectives], share[kUnits];   // reward weights; the weights once more, as they are used
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

template <class C>
__device__ bool is_finite(C x) {
  return fabs(x) < static_cast<C>(HUGE_VAL);
}

// Whether the token at byte t of some flags has one of them.
__device__ __forceinline__ bool has(unsigned flags, TokenFlags flag, int t = 0) {
  return (flags & static_cast<unsigned>(flag) << 8 * t) != 0;
}

// An entry once it has been processed.
template <class C>
struct Entry {
  C advantage, gated;
  bool finite, taken, positive, nonzero, clipped;
};

// Where there is Noon and no more: neither normalised nor weighted nor signed, and NaN is nowhere kept.
template <class C>
__device__ __forceinline__ Entry<C> plain_entry(C raw, bool valid, bool not_above) {
  Entry<C> e;
  e.finite = e.taken = valid & is_finite(raw);
  e.positive = e.nonzero = e.finite & (raw > C{0});
  e.clipped = e.positive & !not_above;
  e.advantage = e.positive ? raw : C{0};
  e.gated = e.positive & not_above ? raw : C{0};
  return e;
}

// What the lanes of a warp, or `lanes` of them, have found in one objective, each in tokens of its own: sums around
// their mean. Counts fit 16 bits.
template <class C>
struct Sums {
  C centre{0}, deviation{0}, squares{0}, active{0};
  C low = static_cast<C>(HUGE_VAL), high = -static_cast<C>(HUGE_VAL);
  unsigned usable = 0, valid = 0, positive_nonzero = 0, clipped = 0;

  // The mean of the usable ones: call see() for each, then find_centre().
  __device__ __forceinline__ void see(C raw, bool valid) {
    if (valid & is_finite(raw)) centre += raw, ++usable;
  }
  __device__ __forceinline__ void find_centre(int lanes) {
    usable = warp_sum(usable, lanes);
    centre = warp_sum(centre, lanes) / static_cast<C>(usable > 0 ? usable : 1);
    if (!is_finite(centre)) centre = C{0};  // the sum of huge entries has overflowed
  }

  template <bool kPlain>
  __device__ __forceinline__ void add(C raw, const Entry<C>& e) {
    if (e.finite) {
      const C d = raw - centre;
      deviation += d;
      squares += d * d;
      low = static_cast<C>(fmin(low, raw));
      high = static_cast<C>(fmax(high, raw));
    }
    active += e.gated;
    if (e.positive) positive_nonzero += kPlain ? (1u << 16) + 1 : 1u << 16;
    if (!kPlain && e.nonzero) ++positive_nonzero;
    if (e.clipped) ++clipped;
  }

  __device__ __forceinline__ void meet(int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
      deviation += __shfl_xor_sync(0xffffffffu, deviation, offset);
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
      active += __shfl_xor_sync(0xffffffffu, active, offset);
      low = static_cast<C>(fmin(low, __shfl_xor_sync(0xffffffffu, low, offset)));
      high = static_cast<C>(fmax(high, __shfl_xor_sync(0xffffffffu, high, offset)));
    }
    valid = warp_sum(valid, lanes);
    positive_nonzero = warp_sum(positive_nonzero, lanes);
    clipped = warp_sum(clipped, lanes);
  }

  __device__ __forceinline__ Moments moments() const {
    Moments m = Moments::empty();
    m.count = usable;
    m.nonfinite = valid - usable;
    m.positive = positive_nonzero >> 16;
    m.nonzero = positive_nonzero & 0xffff;
    m.clipped = clipped;
    m.active = static_cast<double>(active);
    settle(m, static_cast<double>(centre), static_cast<double>(deviation), static_cast<double>(squares));
    if (m.count > 0) m.min = static_cast<double>(low), m.max = static_cast<double>(high);
    return m;
  }
};

template <class C>
class Scanner {
 protected:
  __device__ __forceinline__ Scanner(const CombineParams& params, char* memory)
      : p(params), shared(*reinterpret_cast<Shared<C>*>(memory)), tile(memory + sizeof(Shared<C>), params) {}

  // Objective i at token k of the tile, byte t of its flags: A after reward_weights, and I(A).
  template <bool kPlain>
  __device__ __forceinline__ Entry<C> entry(int i, int k, C raw, unsigned flags, int t = 0) const {
    const bool valid = has(flags, kValidFlag, t), not_above = has(flags, kNotAboveFlag, t);
    if (kPlain) return plain_entry(raw, valid, not_above);
    Entry<C> e;
    e.finite = valid & is_finite(raw);
    e.taken = e.finite | (p.propagate & valid);
    C processed = raw;
    if (p.affine && e.taken) {
      const bool grouped = p.normalizes_groups();
      const int64_t many = grouped ? p.groups : 1;
      processed = Maps<C>(static_cast<C*>(p.affine), p.n * many)[i * many + (grouped ? tile.pool[k] : 0)](raw);
    }
    e.positive = e.finite & (processed > C{0});
    const C kept = e.taken ? noon(processed, p.noon ? C{0} : -static_cast<C>(HUGE_VAL)) : C{0};
    e.nonzero = kept != C{0};
    e.advantage = e.taken ? kept * shared.scale[i] : C{0};
    e.gated = gate(e.advantage, not_above, has(flags, kNotBelowFlag, t));
    e.clipped = e.nonzero & (e.gated == C{0});
    return e;
  }
  __device__ __forceinline__ Entry<C> entry(int i, int k) const {
    return entry<false>(i, k, tile.x[i * tile.stride + k], tile.flags[k]);
  }

  __device__ __forceinline__ unsigned flags_of_quad(int k) const {
    return *reinterpret_cast<const unsigned*>(tile.flags + k);
  }

  __device__ __forceinline__ void clear_slices() {
    for (int e = threadIdx.x; e < p.tile_slices * p.n; e += kThreads) shared.part[e] = Moments::empty();
  }

  // Statistics of a tile, added to part[slice, n], or the first there: a warp takes a slice of the tokens, of some of
  // the objectives.
  template <bool kPlain>
  __device__ __forceinline__ void scan_slices(int count, bool first) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slice = warp % p.tile_slices, objective = warp / p.tile_slices, apart = kWarps / p.tile_slices;
    const int begin = kQuad * (32 * slice + lane), step = kQuad * 32 * p.tile_slices;
    Sums<C> own;
    for (int i = objective, turn = 0; i < p.n; i += apart, ++turn) {
      const C* x = tile.x + i * tile.stride;
      Sums<C> sums;
      for (int k = begin; k < count; k += step) {
        const auto raw = pack<C, kQuad>(x + k);
        const unsigned flags = flags_of_quad(k);
#pragma unroll
        for (int t = 0; t < kQuad; ++t) sums.see(raw.at[t], has(flags, kValidFlag, t));
      }
      sums.find_centre(32);
      for (int k = begin; k < count; k += step) {
        const auto raw = pack<C, kQuad>(x + k);
        const unsigned flags = flags_of_quad(k);
        sums.valid += static_cast<unsigned>(__popc(flags & kValidFlag * 0x01010101u));
#pragma unroll
        for (int t = 0; t < kQuad; ++t)
          sums.template add<kPlain>(raw.at[t], entry<kPlain>(i, k + t, raw.at[t], flags, t));
      }
      sums.meet(32);
      if (lane == turn) own = sums;
    }
    const int mine = objective + apart * lane;
    if (mine >= p.n) return;
    Moments& kept = shared.part[slice * p.n + mine];
    if (first) {
      kept = own.moments();
    } else {
      merge(kept, own.moments());
    }
  }

  // What the slices have found, in part[n].
  __device__ __forceinline__ void merge_slices() {
    __syncthreads();
    if (p.tile_slices == 1) return;
    if (threadIdx.x < p.n) {
      Moments* part = shared.part + threadIdx.x;
      Moments m = Moments::empty();
      for (int k = 0; k < p.tile_slices; ++k) gather(m, part[k * p.n], part[0].mean);
      if (!gathered(m, part[0])) {
        m = Moments::empty();
        for (int k = 0; k < p.tile_slices; ++k) merge(m, part[k * p.n]);
      }
      part[0] = m;
    }
    __syncthreads();
  }

  // f(unit, i, begin, end, lane, lanes) for each pool of `size` tokens of a tile and each objective i, as unit pool * n
  // + i, by as many lanes of a warp as are worth it: of its tokens from begin to end. Lanes that have no unit come too,
  // with no tokens.
  template <class F>
  __device__ __forceinline__ void for_pools(int count, int size, F f) const {
    int lanes = 1;
    while (lanes < 32 && lanes * 2 < size) lanes *= 2;
    const int units = count / size * p.n, warp = threadIdx.x / 32, each = 32 / lanes;
    for (int base = warp * each; base < units; base += kWarps * each) {
      const int unit = base + threadIdx.x % 32 / lanes;
      const int begin = unit < units ? unit / p.n * size : 0, end = unit < units ? begin + size : 0;
      f(unit, unit % p.n, begin, end, threadIdx.x % lanes, lanes);
    }
    __syncthreads();
  }

  // Statistics of each pool of `size` tokens and each objective, in part[pool, n].
  __device__ __forceinline__ void scan_pools(int count, int size) {
    for_pools(count, size, [&](int unit, int i, int begin, int end, int lane, int lanes) {
      const C* x = tile.x + i * tile.stride;
      Sums<C> sums;
      for (int k = begin + lane; k < end; k += lanes) sums.see(x[k], has(tile.flags[k], kValidFlag));
      sums.find_centre(lanes);
      for (int k = begin + lane; k < end; k += lanes) {
        sums.valid += has(tile.flags[k], kValidFlag);
        sums.template add<false>(x[k], entry(i, k));
      }
      sums.meet(lanes);
      if (lane == 0 && begin < end) shared.part[unit] = sums.moments();
    });
  }

  // The groups of the tokens of a tile, of equal size, the first of which is `group`.
  __device__ __forceinline__ void number_groups(int64_t group, int count) {
    const int size = static_cast<int>(p.group_tokens());
    for (int k = threadIdx.x; k < count; k += kThreads) tile.pool[k] = static_cast<int>(group) + k / size;
  }

  // Their maps.
  __device__ __forceinline__ void measure_groups(int64_t group, int count) {
    for_pools(count, static_cast<int>(p.group_tokens()), [&](int unit, int i, int begin, int end, int lane, int lanes) {
      const C* x = tile.x + i * tile.stride;
      Sums<C> sums;
      for (int k = begin + lane; k < end; k += lanes) sums.see(x[k], has(tile.flags[k], kValidFlag));
      sums.find_centre(lanes);
      double drift = 0.0, squares = 0.0;  // in double, as a division by their root follows: of any size
      for (int k = begin + lane; k < end; k += lanes) {
        const bool valid = has(tile.flags[k], kValidFlag);
        sums.valid += valid;
        if (!(valid & is_finite(x[k]))) continue;
        sums.low = static_cast<C>(fmin(sums.low, x[k]));
        sums.high = static_cast<C>(fmax(sums.high, x[k]));
        const double d = static_cast<double>(x[k]) - static_cast<double>(sums.centre);
        drift += d;
        squares += d * d;
      }
      sums.meet(lanes);
      drift = warp_sum(drift, lanes);
      squares = warp_sum(squares, lanes);
      if (lane != 0 || begin == end) return;
      Moments m = Moments::empty();
      m.count = sums.usable;
      m.nonfinite = sums.valid - sums.usable;
      m.min = static_cast<double>(sums.low);
      m.max = static_cast<double>(sums.high);
      settle(m, static_cast<double>(sums.centre), drift, squares);
      const PoolMoments moments = m.pool(p.propagate);
      Maps<C>(static_cast<C*>(p.affine), p.n * p.groups)
          .set(i * p.groups + group + unit / p.n, affine<C>(p.normalize.each, moments));
      if (is_dead(p.normalize.each, moments)) atomicAdd(shared.dead + i, 1ull);
    });
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
        const Entry<C> e = entry(i, k);
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

  // Every block's Gram matrix, summed behind that of the block that calls it: a slice of the blocks by each set of as
  // many threads as it has entries, in block order, then the slices.
  __device__ __forceinline__ const double* merge_grams() {
    static_assert(kThreads <= kWarps * (kMaxObjectives + 2), "shared.sums has room for the slices");
    const int size = static_cast<int>(gram_size(p.n)), slices = max(1, kThreads / size);
    double *total = block_gram(p, blockIdx.x) + size, *parts = slices > 1 ? shared.sums[0] : total;
    for (int e = threadIdx.x; e < slices * size; e += kThreads) {
      double sum = 0.0;
#pragma unroll 8
      for (int b = e / size; b < gridDim.x; b += slices) sum += block_gram(p, b)[e % size];
      parts[e] = sum;
    }
    __syncthreads();
    if (slices == 1) return total;
    if (threadIdx.x < size) {
      double sum = 0.0;
      for (int s = 0; s < slices; ++s) sum += parts[s * size + threadIdx.x];
      total[threadIdx.x] = sum;
    }
    __syncthreads();
    return total;
  }

  // The min-norm weights of one pool, by the first warp, from the Gram matrix of the block or of all.
  __device__ __forceinline__ void solve_gram(const Moments* moments, bool of_all) {
    const double* gram = of_all ? merge_grams() : block_gram(p, blockIdx.x);
    if (threadIdx.x >= 32) return;
    double* scratch = block_gram(p, blockIdx.x) + 2 * gram_size(p.n);
    const double value = solve_vectors(p, moments, gram, scratch, shared.weights, Lanes<32>());
    if (threadIdx.x == 0) shared.values[0] = value;
    for (int i = threadIdx.x; i < p.n; i += 32) shared.share[i] = static_cast<C>(shared.weights[i]);
  }

  const CombineParams& p;
  Shared<C>& shared;
  const Tile<C> tile;
};

}  // namespace pama
