// The kernel of small calls at level batch: one block, a warp to each slice of each objective, no tile. A call of a few
// hundred numbers takes as long as its longest chain of instructions, so this one is short: what a lane needs it loads
// itself, a second and a third time from the first-level cache.
#pragma once

#include "pama/solve.h"
#include "scan.cuh"

namespace pama {

constexpr int kSmallElements = 1 << 13;
constexpr int kSmallWarps = 32;   // of a block; as many objectives at most: where all meet, a lane has one of them
constexpr int kSmallSlices = 8;   // of an objective: whoever needs the whole adds them up
constexpr int kSmallSlice = 128;  // tokens that are worth a warp
constexpr int kSmallLoads = 4;    // of a lane, from each tensor, under way

// What a warp has found in its slice of an objective, or all slices together.
template <class C>
struct Found {
  C sum{0}, active{0}, low = static_cast<C>(HUGE_VAL), high = -static_cast<C>(HUGE_VAL);
  C drift{0}, squares{0};  // around the mean of all slices
  unsigned usable = 0, valid = 0, positive = 0, clipped = 0;

  __device__ __forceinline__ void add(const Found& x) {
    sum += x.sum;
    active += x.active;
    low = static_cast<C>(fmin(low, x.low));
    high = static_cast<C>(fmax(high, x.high));
    drift += x.drift;
    squares += x.squares;
    usable += x.usable;
    valid += x.valid;
    positive += x.positive;
    clipped += x.clipped;
  }
  // The mean, nearly: the sum of huge entries may overflow.
  __device__ __forceinline__ C centre() const {
    const C mean = sum / static_cast<C>(usable > 0 ? usable : 1);
    return is_finite(mean) ? mean : C{0};
  }
};

template <class S>
class Small {
  using C = typename Storage<S>::Compute;

 public:
  __device__ __forceinline__ Small(const CombineParams& params, Found<C>* memory)
      : p(params),
        found(memory),
        mask(reinterpret_cast<const uint8_t*>(params.mask.data)),
        log_ratio(reinterpret_cast<const float*>(params.log_ratio.data)),
        tokens(static_cast<int>(params.rows) * static_cast<int>(params.cols)),
        lane(static_cast<int>(threadIdx.x) % 32) {}

  __device__ __forceinline__ void run() {
    Found<C>& mine = found[threadIdx.x / 32];
    const int step = 32 * p.tile_slices, first = static_cast<int>(threadIdx.x) & (step - 1);  // a power of two
    const int objective = static_cast<int>(threadIdx.x) >> (__ffs(step) - 1);
    {
      const Found<C> here = look(objective, first, step);
      if (lane == 0) mine = here;
    }
    __syncthreads();
    spread(objective, first, step, all_slices(objective).centre(), mine);
    __syncthreads();
    Found<C> total;  // of lane i: of objective i
    if (lane < p.n) total = all_slices(lane);
    C value;
    const C weight = solve(total, value);
    if (threadIdx.x + 32 >= blockDim.x) write(total, weight, value);
    combine(weight);
  }

 private:
  // Calls each(raw, valid, not_above) for the entries first, first + step, ... of an objective, loads of some at once.
  template <bool kGates, class F>
  __device__ __forceinline__ void entries(int objective, int first, int step, F each) const {
    const S* x = reinterpret_cast<const S*>(p.advantages[objective].data);
    const int apart = static_cast<int>(p.advantages[objective].col);
#pragma unroll 1
    for (int k = first; k < tokens; k += kSmallLoads * step) {
      S raw[kSmallLoads];
      bool valid[kSmallLoads];
      float log_u[kSmallLoads];
      int at[kSmallLoads];
#pragma unroll
      for (int d = 0; d < kSmallLoads; ++d) {
        valid[d] = k + d * step < tokens;
        at[d] = min(k + d * step, tokens - 1);
        raw[d] = x[at[d] * apart];
        log_u[d] = -HUGE_VALF;
      }
#pragma unroll
      for (int d = 0; d < kSmallLoads && kGates && log_ratio; ++d) log_u[d] = log_ratio[at[d]];
#pragma unroll
      for (int d = 0; d < kSmallLoads && mask; ++d) valid[d] &= mask[at[d]] != 0;
#pragma unroll
      for (int d = 0; d < kSmallLoads; ++d) each(Storage<S>::load(raw[d]), valid[d], log_u[d] <= p.gate_high);
    }
  }

  // Everything but the spread.
  __device__ __forceinline__ Found<C> look(int objective, int first, int step) const {
    Found<C> f;
    entries<true>(objective, first, step, [&](C raw, bool valid, bool not_above) {
      const Entry<C> e = plain_entry(raw, valid, not_above);
      f.valid += valid;
      if (e.finite) {
        f.sum += raw;
        f.low = static_cast<C>(fmin(f.low, raw));
        f.high = static_cast<C>(fmax(f.high, raw));
      }
      f.usable += e.finite;
      f.active += e.gated;
      f.positive += e.positive;
      f.clipped += e.clipped;
    });
    for (int offset = 16; offset > 0; offset /= 2) {
      f.sum += __shfl_xor_sync(0xffffffffu, f.sum, offset);
      f.active += __shfl_xor_sync(0xffffffffu, f.active, offset);
      f.low = static_cast<C>(fmin(f.low, __shfl_xor_sync(0xffffffffu, f.low, offset)));
      f.high = static_cast<C>(fmax(f.high, __shfl_xor_sync(0xffffffffu, f.high, offset)));
    }
    f.usable = warp_sum(f.usable, 32);
    f.valid = warp_sum(f.valid, 32);
    f.positive = warp_sum(f.positive, 32);
    f.clipped = warp_sum(f.clipped, 32);
    return f;
  }

  __device__ __forceinline__ void spread(int objective, int first, int step, C centre, Found<C>& mine) const {
    C drift{0}, squares{0};
    entries<false>(objective, first, step, [&](C raw, bool valid, bool) {
      const C d = valid & is_finite(raw) ? raw - centre : C{0};
      drift += d;
      squares += d * d;
    });
    drift = warp_sum(drift);
    squares = warp_sum(squares);
    if (lane == 0) mine.drift = drift, mine.squares = squares;
  }

  __device__ __forceinline__ Found<C> all_slices(int objective) const {
    Found<C> f = found[objective * p.tile_slices];
#pragma unroll 1
    for (int s = 1; s < p.tile_slices; ++s) f.add(found[objective * p.tile_slices + s]);
    return f;
  }

  // The weight of objective `lane`, in each warp. No a_i is below 0, so the smallest ones share it: see solve.h.
  __device__ __forceinline__ C solve(const Found<C>& total, C& value) const {
    const bool mine = lane < p.n;
    const C a = total.active / static_cast<C>(total.usable > 0 ? total.usable : 1);
    if (p.solver == Solver::kFixed) {
      const C weight = mine ? static_cast<C>(p.fixed_weight(lane)) : C{0};
      value = warp_sum(weight != C{0} ? weight * a : C{0});
      return weight;
    }
    const unsigned has_data = __ballot_sync(0xffffffffu, mine && total.usable > 0);
    const unsigned active = __ballot_sync(0xffffffffu, mine && total.positive > total.clipped);
    const bool kept = participants(has_data, active, p.skip_inactive, p.n) >> lane & 1;
    value = kept ? a : static_cast<C>(HUGE_VAL);
    for (int offset = 16; offset > 0; offset /= 2)
      value = static_cast<C>(fmin(value, __shfl_xor_sync(0xffffffffu, value, offset)));
    const unsigned smallest = __ballot_sync(0xffffffffu, kept && a == value);
    return smallest >> lane & 1 ? C{1} / static_cast<C>(__popc(smallest)) : C{0};
  }

  // The packed results, by one warp.
  __device__ __forceinline__ void write(const Found<C>& f, C weight, C value) const {
    C* packed = static_cast<C*>(p.packed);
    if (lane == 0) packed[(kStatistics + 1) * p.n] = value;
    if (lane >= p.n) return;
    const C inf = static_cast<C>(HUGE_VAL), count = static_cast<C>(f.usable);
    const C divisor = f.usable > 0 ? count : C{1}, shift = f.drift / divisor;
    const C m2 = f.squares == inf ? inf : static_cast<C>(fmax(C{0}, f.squares - f.drift * shift));
    const C column[kStatistics + 1] = {
        count,
        f.centre() + shift,
        f.usable > 1 ? static_cast<C>(sqrt(m2 / (count - C{1}))) : C{0},
        f.usable > 0 ? f.low : C{0},
        f.usable > 0 ? f.high : C{0},
        static_cast<C>(f.positive) / divisor,
        static_cast<C>(f.clipped) / static_cast<C>(f.positive > 0 ? f.positive : 1),
        f.active / divisor,
        static_cast<C>(f.valid - f.usable),
        C{0},
        weight,
    };
#pragma unroll
    for (int k = 0; k <= kStatistics; ++k) packed[k * p.n + lane] = column[k];
  }

  // The combination, a thread to a token.
  __device__ __forceinline__ void combine(C weight) const {
    const unsigned weighted = __ballot_sync(0xffffffffu, weight != C{0});
#pragma unroll 1
    for (int base = static_cast<int>(threadIdx.x) - lane; base < tokens; base += static_cast<int>(blockDim.x)) {
      const int k = base + lane;
      const bool valid = k < tokens && (!mask || mask[k] != 0);
      C combined{0};
      for (unsigned left = weighted; left != 0; left &= left - 1) {
        const int i = __ffs(static_cast<int>(left)) - 1;
        const C share = __shfl_sync(0xffffffffu, weight, i);
        if (!valid) continue;
        const S* x = reinterpret_cast<const S*>(p.advantages[i].data);
        const Entry<C> e = plain_entry(Storage<S>::load(x[k * static_cast<int>(p.advantages[i].col)]), true, true);
        if (e.taken) combined += share * e.advantage;
      }
      if (k < tokens) reinterpret_cast<S*>(p.out.data)[k * static_cast<int>(p.out.col)] = Storage<S>::store(combined);
    }
  }

  const CombineParams& p;
  Found<C>* const found;
  const uint8_t* const mask;
  const float* const log_ratio;
  const int tokens, lane;
};

template <class S>
__global__ void __launch_bounds__(32 * kSmallWarps) combine_small_kernel(const __grid_constant__ CombineParams p) {
  __shared__ Found<typename Storage<S>::Compute> found[kSmallWarps];
  Small<S>(p, found).run();
}

}  // namespace pama
