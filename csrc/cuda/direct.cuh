// The kernel of plain calls at level batch that fit on the chip: no tile, a warp to each slice of an objective, or of a
// few that stand side by side, which loads what it needs itself, a second and a third time from a cache: the first if
// one block does all, the second where blocks have met, as that empties the first. Where a warp cannot read what it
// looks at 16 bytes at a time, objectives are brought to shared memory first, each to a plane of its own. A lane has
// the same tokens however they stand, so no layout changes a bit. A call of a few hundred numbers takes as long as its
// longest chain of instructions, so this one is short.
#pragma once

#include "found.cuh"
#include "meet.cuh"
#include "pama/solve.h"

namespace pama {

// Of a block, at most. `many`: objectives of a warp, up to four, as a lane holds what it finds of each.
constexpr int direct_threads(int many) { return 32 * (many > 1 ? kDirectSlices : kDirectWarps); }

// kMany: objectives of a warp. More than one are all there are, side by side in memory.
template <class S, int kMany>
class Direct {
  using C = typename Storage<S>::Compute;
  static constexpr int kVec = kBytes / sizeof(S), kUnder = 4;  // loads under way, where planes are made

 public:
  __device__ __forceinline__ Direct(const CombineParams& params, DirectShared<C, kMany>& memory)
      : p(params),
        shared(memory),
        published(params.workspace, params.n),
        begin(blockIdx.x * params.run_tokens),
        mask(params.mask.data ? reinterpret_cast<const uint8_t*>(params.mask.data) + begin : nullptr),
        log_ratio(params.log_ratio.data ? reinterpret_cast<const float*>(params.log_ratio.data) + begin : nullptr),
        tokens(static_cast<int>(max(int64_t{0}, min(params.run_tokens, params.tokens() - begin)))),
        whole(tokens / kVec * kVec),
        lane(static_cast<int>(threadIdx.x) % 32),
        step(32 * params.tile_slices),
        first(static_cast<int>(threadIdx.x) & (step - 1)),  // a power of two
        objective(this_over(step)),
        planes(reinterpret_cast<S*>(&memory + 1)),
        pitch(static_cast<int>(direct_pitch<S>(params.run_tokens))),
        made(kMany == 1 && params.access != Access::kPlanes) {}

  __device__ __forceinline__ void run() {
    const bool alone = gridDim.x == 1, writes = threadIdx.x + 32 >= blockDim.x;
    if (made) {
      make_planes();
      __syncthreads();
    }
    keep(look());
    __syncthreads();
    if (!alone) {
      if (first < 32) publish();
      wait_for_all(p.meeting);
      keep(gather());
      if (p.meeting == Meeting::kCluster) cluster().barrier_arrive();
      __syncthreads();
    }
    keep_spread(spread(centre()));
    __syncthreads();
    const Found<C> total = mine();
    C value;
    const C weight = solve(total, value);
    if (writes && alone) write(total, weight, value);
    if (writes && !alone) publish_spread(total);
    combine(weight);
    if (!alone) {
      __syncthreads();
      if (shared.last) keep_spread(gather_spread());
      __syncthreads();
      if (shared.last && writes) write(mine(), weight, value);
    }
    // Nobody leaves while its shared memory may be read.
    if (p.meeting == Meeting::kCluster) cluster().barrier_wait();
  }

 private:
  struct Spread {
    C drift{0}, squares{0};
  };
  template <class T>
  struct Each {  // objective of this warp
    T of[kMany];
  };

  // This thread's number over a power of two.
  static __device__ __forceinline__ int this_over(int power) {
    return static_cast<int>(threadIdx.x) >> (__ffs(power) - 1);
  }

  // Those of all lanes: the objectives take the steps together, as each step waits for the one before.
  static __device__ __forceinline__ void meet(Each<Found<C>>& f) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (Found<C>& x : f.of) {
        x.sum += __shfl_xor_sync(0xffffffffu, x.sum, offset);
        x.active += __shfl_xor_sync(0xffffffffu, x.active, offset);
        x.low = static_cast<C>(fmin(x.low, __shfl_xor_sync(0xffffffffu, x.low, offset)));
        x.high = static_cast<C>(fmax(x.high, __shfl_xor_sync(0xffffffffu, x.high, offset)));
      }
    }
#pragma unroll
    for (Found<C>& x : f.of) {
      x.usable = warp_sum(x.usable, 32);
      x.valid = warp_sum(x.valid, 32);
      x.positive = warp_sum(x.positive, 32);
      x.clipped = warp_sum(x.clipped, 32);
    }
  }
  static __device__ __forceinline__ void meet(Each<Spread>& s) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
#pragma unroll
      for (Spread& x : s.of) {
        x.drift += __shfl_xor_sync(0xffffffffu, x.drift, offset);
        x.squares += __shfl_xor_sync(0xffffffffu, x.squares, offset);
      }
    }
  }

  // Of this warp, where the others look for it.
  __device__ __forceinline__ Found<C>& slot(int j) const {
    return shared.slice[(objective + j) * p.tile_slices + first / 32];
  }
  __device__ __forceinline__ void keep(const Each<Found<C>>& f) const {
#pragma unroll
    for (int j = 0; j < kMany; ++j)
      if (lane == 0) slot(j) = f.of[j];
  }
  __device__ __forceinline__ void keep_spread(const Each<Spread>& s) const {
#pragma unroll
    for (int j = 0; j < kMany; ++j)
      if (lane == 0) slot(j).drift = s.of[j].drift, slot(j).squares = s.of[j].squares;
  }

  // Where token k of this block stands, in elements.
  __device__ __forceinline__ int64_t place(const Plane& q, int k) const {
    const int64_t t = begin + k;
    if (p.rows == 1 || q.row == p.cols * q.col) return t * q.col;
    const unsigned row = static_cast<unsigned>(t) / static_cast<unsigned>(p.cols);
    return row * q.row + (t - static_cast<int64_t>(row) * p.cols) * q.col;
  }

  // The block's objectives, as planes in shared memory: all of them kBytes at a time if they stand side by side, else
  // each by the warps that look at it, entry by entry.
  __device__ __forceinline__ void make_planes() const {
    const int threads = static_cast<int>(blockDim.x), n = p.n, thread = static_cast<int>(threadIdx.x);
    if (p.access == Access::kInterleaved) {
      const auto* x =
          reinterpret_cast<const Pack<S, kVec>*>(reinterpret_cast<const S*>(p.advantages[0].data) + begin * n);
      const int packs = tokens * n / kVec;
#pragma unroll 1
      for (int base = thread; base < packs; base += kUnder * threads) {
        Pack<S, kVec> raw[kUnder];
#pragma unroll
        for (int d = 0; d < kUnder; ++d) raw[d] = x[min(base + d * threads, packs - 1)];
#pragma unroll
        for (int d = 0; d < kUnder; ++d) {
          if (base + d * threads >= packs) break;
          int k = (base + d * threads) * kVec / n, i = (base + d * threads) * kVec - k * n;
#pragma unroll
          for (int e = 0; e < kVec; ++e) {
            planes[i * pitch + k] = raw[d].at[e];
            if (++i == n) i = 0, ++k;
          }
        }
      }
      for (int f = packs * kVec + thread; f < tokens * n; f += threads)
        planes[f % n * pitch + f / n] = reinterpret_cast<const S*>(x)[f];
    } else {
      const Plane& q = p.advantages[objective];
      S* const to = planes + objective * pitch;
#pragma unroll 1
      for (int base = first; base < tokens; base += kUnder * step) {
        S raw[kUnder];
#pragma unroll
        for (int d = 0; d < kUnder; ++d)
          raw[d] = reinterpret_cast<const S*>(q.data)[place(q, min(base + d * step, tokens - 1))];
#pragma unroll
        for (int d = 0; d < kUnder; ++d)
          if (base + d * step < tokens) to[base + d * step] = raw[d];
      }
    }
  }

  // Token k of this block: of objective i, or of the first of those that stand side by side.
  __device__ __forceinline__ const S* at(int i, int k) const {
    return made ? planes + i * pitch + k : reinterpret_cast<const S*>(p.advantages[i].data) + (begin + k) * kMany;
  }
  // From token k on of this block: kVec tokens of objective i, or of all that stand side by side.
  __device__ __forceinline__ Each<Pack<S, kVec>> load_whole(int i, int k) const {
    const auto* x = reinterpret_cast<const Pack<S, kVec>*>(at(i, k));
    Each<Pack<S, kVec>> raw;
#pragma unroll
    for (int j = 0; j < kMany; ++j) raw.of[j] = x[j];
    return raw;
  }
  static __device__ __forceinline__ C entry_of(const Each<Pack<S, kVec>>& raw, int t, int j) {
    return Storage<S>::load(raw.of[(t * kMany + j) / kVec].at[(t * kMany + j) % kVec]);
  }
  // kVec of what stands beside the objectives, whose addresses may be any.
  template <class T>
  static __device__ __forceinline__ Pack<T, kVec> beside(const T* from, T otherwise) {
    Pack<T, kVec> found;
    if (reinterpret_cast<uintptr_t>(from) % alignof(Pack<T, kVec>) == 0 && from) return pack<T, kVec>(from);
#pragma unroll
    for (int t = 0; t < kVec; ++t) found.at[t] = from ? from[t] : otherwise;
    return found;
  }
  __device__ __forceinline__ Pack<uint8_t, kVec> mask_of(int k) const {
    return beside<uint8_t>(mask ? mask + k : nullptr, 1);
  }

  // Calls each(j, raw, valid, not_above) for the entries of this lane: kVec tokens at once, and of those that are left
  // behind them one.
  template <bool kGates, class F>
  __device__ __forceinline__ void entries(F each) const {
#pragma unroll 1
    for (int k = kVec * first; k < whole; k += kVec * step) {
      const Each<Pack<S, kVec>> raw = load_whole(objective, k);
      const Pack<uint8_t, kVec> set = mask_of(k);
      Pack<float, kVec> log_u;
      if (kGates && log_ratio) log_u = beside<float>(log_ratio + k, 0);
#pragma unroll
      for (int t = 0; t < kVec; ++t) {
        const bool not_above = !kGates || !log_ratio || log_u.at[t] <= p.gate_high;
#pragma unroll
        for (int j = 0; j < kMany; ++j) each(j, entry_of(raw, t, j), set.at[t] != 0, not_above);
      }
    }
    const int k = whole + first;
    if (k >= tokens) return;
    const bool valid = !mask || mask[k] != 0, not_above = !kGates || !log_ratio || log_ratio[k] <= p.gate_high;
#pragma unroll
    for (int j = 0; j < kMany; ++j) each(j, Storage<S>::load(at(objective, k)[j]), valid, not_above);
  }

  // Everything but the spread.
  __device__ __forceinline__ Each<Found<C>> look() const {
    Each<Found<C>> all;
    entries<true>([&](int j, C raw, bool valid, bool not_above) {
      const Entry<C> e = plain_entry(raw, valid, not_above);
      Found<C>& f = all.of[j];
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
    meet(all);
    return all;
  }

  // Four of which are read at once, here and below.
  __device__ __forceinline__ Found<C> all_slices(int i) const {
    Found<C> f = shared.slice[i * p.tile_slices];
#pragma unroll 4
    for (int s = 1; s < p.tile_slices; ++s) f.add(shared.slice[i * p.tile_slices + s]);
    return f;
  }

  // Of lane i: of objective i.
  __device__ __forceinline__ Found<C> mine() const {
    Found<C> f;
    if (lane < p.n) f = all_slices(lane);
    return f;
  }

  // The mean of each objective, nearly: the sum of huge entries may overflow.
  __device__ __forceinline__ Each<C> centre() const {
    Each<C> mean;
    C sum[kMany]{};
    unsigned usable[kMany]{};
#pragma unroll 4
    for (int s = 0; s < p.tile_slices; ++s) {
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        const Found<C>& f = shared.slice[(objective + j) * p.tile_slices + s];
        sum[j] += f.sum;
        usable[j] += f.usable;
      }
    }
#pragma unroll
    for (int j = 0; j < kMany; ++j) mean.of[j] = centre_of(sum[j], usable[j]);
    return mean;
  }
  static __device__ __forceinline__ C centre_of(C sum, unsigned usable) {
    const C mean = sum / static_cast<C>(usable > 0 ? usable : 1);
    return is_finite(mean) ? mean : C{0};
  }

  // By the first warp of its objectives: what the block has found, where other blocks look for it.
  __device__ __forceinline__ void publish() {
    if (lane >= kMany) return;
    const int i = objective + lane;
    const Found<C> f = all_slices(i);
    if (p.meeting == Meeting::kCluster) {
      shared.block[i] = f;
    } else {
      published.found[static_cast<int>(blockIdx.x) * p.n + i] = f;
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) *published.count = 0;
  }

  // What some of the blocks have found, the others being those of other slices.
  __device__ __forceinline__ Each<Found<C>> gather() const {
    Each<Found<C>> f;
#pragma unroll 1
    for (int b = first; b < static_cast<int>(gridDim.x); b += step) {
      const Found<C>* of = published.found + b * p.n;
      if (p.meeting == Meeting::kCluster) of = cluster().map_shared_rank(shared.block, b);
#pragma unroll
      for (int j = 0; j < kMany; ++j) f.of[j].add(of[objective + j]);
    }
    meet(f);
    return f;
  }

  __device__ __forceinline__ Each<Spread> spread(const Each<C>& centre) const {
    Each<Spread> s;
    entries<false>([&](int j, C raw, bool valid, bool) {
      const C d = valid & is_finite(raw) ? raw - centre.of[j] : C{0};
      s.of[j].drift += d;
      s.of[j].squares += d * d;
    });
    meet(s);
    return s;
  }

  // By one warp of each block. The last block to do so finds what all the others have published.
  __device__ __forceinline__ void publish_spread(const Found<C>& f) {
    volatile C* to = published.spread + 2 * (static_cast<int>(blockIdx.x) * p.n + lane);
    if (lane < p.n) {
      to[0] = f.drift;
      to[1] = f.squares;
    }
    __syncwarp();
    if (lane != 0) return;
    const bool last = count_in(published.count) == gridDim.x;
    if (last) __threadfence();  // what the others wrote before they counted themselves in is seen from here on
    shared.last = last;
  }

  // As gather().
  __device__ __forceinline__ Each<Spread> gather_spread() const {
    Each<Spread> s;
#pragma unroll 1
    for (int b = first; b < static_cast<int>(gridDim.x); b += step) {
      volatile C* const of = published.spread + 2 * (b * p.n + objective);
#pragma unroll
      for (int j = 0; j < kMany; ++j) {
        s.of[j].drift += of[2 * j];
        s.of[j].squares += of[2 * j + 1];
      }
    }
    meet(s);
    return s;
  }

  // The weight of objective `lane`, in each warp. No a_i is below 0, so the smallest ones share it: see solve.h.
  __device__ __forceinline__ C solve(const Found<C>& total, C& value) const {
    const bool mine = lane < p.n;
    const C a = total.active / static_cast<C>(total.usable > 0 ? total.usable : 1);
    if (p.solver == Solver::kFixed) {
      const double weight = mine ? p.fixed_weight(lane) : 0.0;
      value = static_cast<C>(warp_sum(weight != 0.0 ? weight * static_cast<double>(a) : 0.0));
      return static_cast<C>(weight);
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
    packed += lane;  // row by row in the order of ObjectiveStats, then the weights
    const auto put = [&](int k, C x) { packed[k * p.n] = x; };
    put(0, count);
    put(1, centre_of(f.sum, f.usable) + shift);
    put(2, f.usable > 1 ? static_cast<C>(sqrt(m2 / (count - C{1}))) : C{0});
    put(3, f.usable > 0 ? f.low : C{0});
    put(4, f.usable > 0 ? f.high : C{0});
    put(5, static_cast<C>(f.positive) / divisor);
    put(6, static_cast<C>(f.clipped) / static_cast<C>(f.positive > 0 ? f.positive : 1));
    put(7, f.active / divisor);
    put(8, static_cast<C>(f.valid - f.usable));
    put(9, C{0});
    put(kStatistics, weight);
  }

  // The combination, a thread to kVec tokens, and behind them to one.
  __device__ __forceinline__ void combine(C weight) const {
    const unsigned weighted = __ballot_sync(0xffffffffu, weight != C{0});
    const int threads = static_cast<int>(blockDim.x);
    S* const out = reinterpret_cast<S*>(p.out.data);
    const bool wide = p.out_together && reinterpret_cast<uintptr_t>(out) % kBytes == 0;
#pragma unroll 1
    for (int base = kVec * (static_cast<int>(threadIdx.x) - lane); base < whole; base += kVec * threads) {
      const int k = min(base + kVec * lane, whole - kVec);
      const Pack<uint8_t, kVec> set = mask_of(k);
      C combined[kVec];
#pragma unroll
      for (C& x : combined) x = C{0};
      // Of objective i, the jth of what was loaded.
      const auto add_all = [&](int i, const Each<Pack<S, kVec>>& raw, int j) {
        const C share = __shfl_sync(0xffffffffu, weight, i);
#pragma unroll
        for (int t = 0; t < kVec; ++t) add(combined[t], share, entry_of(raw, t, j), set.at[t] != 0);
      };
      if constexpr (kMany > 1) {
        const Each<Pack<S, kVec>> raw = load_whole(0, k);
#pragma unroll
        for (int j = 0; j < kMany; ++j)
          if (weighted >> j & 1) add_all(j, raw, j);
      } else {
#pragma unroll 1
        for (unsigned left = weighted; left != 0; left &= left - 1) {
          const int i = __ffs(static_cast<int>(left)) - 1;
          add_all(i, load_whole(i, k), 0);
        }
      }
      Pack<S, kVec> rounded;
#pragma unroll
      for (int t = 0; t < kVec; ++t) rounded.at[t] = Storage<S>::store(combined[t]);
      if (base + kVec * lane >= whole) continue;
      if (wide) {
        pack<S, kVec>(out + begin + k) = rounded;
      } else {
#pragma unroll
        for (int t = 0; t < kVec; ++t) out[place(p.out, k + t)] = rounded.at[t];
      }
    }
    // By one warp: shuffles want all its lanes, and fewer than that are left.
    if (threadIdx.x >= 32 || whole == tokens) return;
    const int k = min(whole + lane, tokens - 1);
    const bool valid = !mask || mask[k] != 0;
    C combined{0};
#pragma unroll 1
    for (unsigned left = weighted; left != 0; left &= left - 1) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      const S* const x = kMany > 1 ? at(0, k) + i : at(i, k);
      add(combined, __shfl_sync(0xffffffffu, weight, i), Storage<S>::load(*x), valid);
    }
    if (whole + lane < tokens) out[place(p.out, k)] = Storage<S>::store(combined);
  }
  static __device__ __forceinline__ void add(C& combined, C share, C raw, bool valid) {
    const Entry<C> e = plain_entry(raw, valid, true);
    if (e.taken) combined += share * e.advantage;
  }

  const CombineParams& p;
  DirectShared<C, kMany>& shared;
  const Published<C> published;
  const int64_t begin;  // of the tokens of this block
  const uint8_t* const mask;
  const float* const log_ratio;
  const int tokens, whole;  // of them, as many as are accessed kBytes at a time
  const int lane, step, first, objective;
  S* const planes;  // in shared memory, each `pitch` elements long, if they are made
  const int pitch;
  const bool made;
};

template <class S, int kMany>
__global__ void __launch_bounds__(direct_threads(kMany), 1)
    combine_direct_kernel(const __grid_constant__ CombineParams p) {
  using Shared = DirectShared<typename Storage<S>::Compute, kMany>;
  Direct<S, kMany>(p, *reinterpret_cast<Shared*>(dynamic_shared())).run();
}

}  // namespace pama
