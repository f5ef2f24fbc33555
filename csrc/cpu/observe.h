// The statistics of one tile. Included once per instruction set.
#pragma once

#include <cmath>

#include "held_sums.h"
#include "isa.h"
#include "lanes.h"
#include "normalize_kernel.h"
#include "pama/indicator.h"
#include "pama/moments.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

// What is left behind of a tile: A_i in `x` and, in `taken`, who takes part. Of a plain one that can wait.
enum class Keep { kNothing, kUnlessPlain };

template <class C>
class Observer {
 protected:
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes, kLine = 64 / static_cast<int>(sizeof(C));
  static constexpr C kInf = std::numeric_limits<C>::infinity();

  static V& vec(C* x) { return *reinterpret_cast<V*>(x); }
  static const V& vec(const C* x) { return *reinterpret_cast<const V*>(x); }
  static M& vec(I* x) { return *reinterpret_cast<M*>(x); }
  static V all(C x) { return V{} + x; }
  static M finite(V x) { return (x - x) == V{}; }
  static V only(M mask, V x) { return (V)((M)x & mask); }  // x where the mask is set, else 0
  static V positive(V x) { return Sums<C>::positive(x); }
  static C centre_of(double mean) { return HeldSums<C>::centre_of(mean); }

  explicit Observer(const CombineParams& params)
      : p(params),
        stride(Tile<C>::stride_for(params.n, in_groups(params) ? kGroupTileBytes : kTileBytes)),
        floor(params.noon ? C{0} : -kInf),
        propagate(M{} - (params.propagate ? 1 : 0)),
        near(prefetches_near(2 * kTileBytes)),
        scaled(load_scale(params)),
        normalizer(params),
        held(params.n, scale, scaled, normalizer.active()) {
    lower_gates = !p.noon || p.propagate || normalizer.active();
    can_be_plain = p.noon;
    for (int i = 0; i < p.n; ++i) {
      lower_gates |= !keeps_sign(i);
      can_be_plain &= keeps_sign(i);
    }
  }
  // Returns whether one is not 1.
  bool load_scale(const CombineParams& params) {
    bool some = false;
    for (int i = 0; i < params.n; ++i) {
      scale[i] = static_cast<C>(params.scale(i));
      some |= scale[i] != 1;
    }
    return some;
  }

  // To be inlined early: GCC 12 takes a function that only prefetches for one without effect, and drops calls of it.
  static constexpr auto near_by = [](const char* x) __attribute__((always_inline)) { __builtin_prefetch(x); };
  static constexpr auto further = [](const char* x) __attribute__((always_inline)) { __builtin_prefetch(x, 0, 2); };

  // At level token the stride is known to the compiler.
  static bool in_groups(const CombineParams& params) {
    return params.normalize.by == Pool::kGroup && params.level != Level::kToken;
  }

  bool keeps_sign(int i) const { return scale[i] > 0 && scale[i] < kInf; }
  V gated_at(V advantage, int k) { return gate(advantage, vec(tile.not_above + k), vec(tile.not_below + k)); }

  // Statistics of all objectives over the tile, merged into m[n]; or `held`, and merged later. Returns
  // those of which all is plain, a bit for each: Noon, a positive scale, and a finite number for every valid token.
  // What is normalised and to be kept at all is kept at once.
  //
  // One pass around a centre near the mean: the sum of the deviations then corrects both moments. The centre is the
  // mean of what came before; how far this tile's mean lies from it is itself spread that the merged m2 contains, so
  // what cancels is small against the result. The first tile has no before and looks once more.
  template <Keep kKeep>
  uint64_t observe(int64_t first, int count, Moments* m) {
    for (int i = 0; i < p.n; ++i) {
      if (held.any(i)) continue;
      if (known(m[i], count)) {
        held.begin(i, m[i].mean, m[i].count);
      } else {
        held.begin(i, mean(tile.x + i * stride, count), 0);
      }
    }
    uint64_t plain = 0;
    for (int i = 0; i < p.n && normalizer.active(); ++i) {
      normalizer.apply(i, first, count, tile.x + i * stride, tile.normal);
      plain |= observe<kKeep, true>(i, 1, count, m) << i;
    }
    for (int i = 0; i < p.n && !normalizer.active(); i += HeldSums<C>::kMost)
      plain |= observe<kKeep, false>(i, smaller(HeldSums<C>::kMost, p.n - i), count, m) << i;
    return plain;
  }

  // A_i of a plain tile, from its entries as they were loaded or normalised.
  void keep(int i, const C* processed, int count) {
    for (int k = 0; k < count; k += kLanes) {
      const Where<V, M> valid(vec(tile.valid + k));
      vec(tile.x + i * stride + k) = valid.only(positive(vec(processed + k))) * scale[i];
      vec(tile.taken + i * stride + k) = vec(tile.valid + k);
    }
  }

  // Whether the mean of what came before is a centre. Entries that are nearly too large may lie too far from it.
  static bool known(const Moments& before, int count) {
    constexpr double kFar = std::numeric_limits<C>::max() / 4;
    return 4 * before.count >= count && before.max < kFar && before.min > -kFar;
  }

  // Of the valid finite entries; if all are finite, without comparisons.
  double mean(const C* x, int count) {
    lanes.spill(total(count, [&](V sum, int k) { return Where<V, M>(vec(tile.valid + k)).add(sum, vec(x + k)); }));
    if (const double sum = lanes.sum(); sum - sum == 0) return tile.valid_count > 0 ? sum / tile.valid_count : 0.0;
    M counted{};
    const V of_finite = total(count, [&](V sum, int k) {
      const V entry = vec(x + k);
      const M usable = vec(tile.valid + k) & finite(entry);
      counted -= usable;
      return sum + (usable ? entry : V{});
    });
    lanes.spill(counted, of_finite);
    const int64_t n = lanes.count(0);
    return n > 0 ? lanes.sum(1) / static_cast<double>(n) : 0.0;
  }
  // Two sums, as one would wait for its own additions. add(sum, k) returns the sum with vector k.
  template <class F>
  static inline __attribute__((always_inline)) V total(int count, F add) {
    V even{}, odd{};
    int k = 0;
    for (; k + kLanes < count; k += 2 * kLanes) even = add(even, k), odd = add(odd, k + kLanes);
    if (k < count) even = add(even, k);
    return even + odd;
  }

  // Whether all valid entries are finite; then `here` has their moments, and nothing of what follows from them.
  bool observe_samples(const C* x, int count, C centre, Moments& here) {
    V deviation{}, squares{}, low = all(kInf), high = all(-kInf);
    for (int k = 0; k < count; k += kLanes) {
      const Where<V, M> valid(vec(tile.valid + k));
      const V entry = vec(x + k), d = valid.only(entry - centre);
      deviation += d;
      squares += d * d;
      low = valid.lower(entry, low);
      high = valid.higher(entry, high);
    }
    lanes.spill(deviation, squares, low, high, V{});
    here = Moments::empty();
    here.count = tile.valid_count;
    const double drift = lanes.sum(0);
    conclude(here, centre);
    return drift - drift == 0;
  }

 private:
  // As many as there are registers for.
  static constexpr int kTogether = PAMA_VECTOR_BYTES == 64 ? 3 : PAMA_VECTOR_BYTES == 32 ? 2 : 1;

  // Of `many` objectives from i on, which are folded at once. kNormal: what goes on from here is tile.normal, which
  // holds one; else it is `x` itself.
  template <Keep kKeep, bool kNormal>
  uint64_t observe(int i, int many, int count, Moments* m) {
    uint64_t fit = 0;
    for (int j = 0; j < many; ++j) fit |= uint64_t{p.noon && keeps_sign(i + j)} << j;
    for (int j = 0; j < many && fit != 0; j += kTogether) {
      const int now = smaller(kTogether, many - j);
      [&]<int... kMany>(std::integer_sequence<int, kMany...>) {
        static_cast<void>(((now == kMany + 1 && (scaled ? add_up<kNormal, kMany + 1, true>(i, j, count)
                                                        : add_up<kNormal, kMany + 1, false>(i, j, count),
                                                 true)) ||
                           ...));
      }(std::make_integer_sequence<int, kNormal ? 1 : kTogether>());
    }
    const uint64_t plain = fit == 0 ? 0 : held.fold(i, many, tile.valid_count, fit, false, m);
    for (int j = 0; j < many; ++j) {
      C* const x = tile.x + (i + j) * stride;
      if (!(plain >> j & 1)) {
        observe_carefully<kKeep, kNormal>(i + j, x, count, m);
      } else if (kKeep == Keep::kUnlessPlain && kNormal) {
        keep(i + j, tile.normal, count);
      }
    }
    return plain;
  }

  template <Keep kKeep, bool kNormal>
  void observe_carefully(int i, C* x, int count, Moments* m) {
    const C centre = held.centre[i];
    I* taken = tile.taken + i * stride;

    V deviation{}, squares{}, active{}, low = all(kInf), high = all(-kInf);
    M counted{}, nonfinite{}, positive{}, nonzero{}, clipped{};
    for (int k = 0; k < count; k += kLanes) {
      const V entry = vec(x + k);
      const M valid = vec(tile.valid + k), is_finite = finite(entry), usable = valid & is_finite;
      const M take = valid & (is_finite | propagate);
      counted -= usable;
      nonfinite -= valid & ~is_finite;
      const V d = usable ? entry - centre : V{};
      deviation += d;
      squares += d * d;
      const V or_high = usable ? entry : all(kInf), or_low = usable ? entry : all(-kInf);
      low = or_high < low ? or_high : low;
      high = or_low > high ? or_low : high;
      const V processed = kNormal ? vec(tile.normal + k) : entry;
      positive -= usable & (processed > V{});

      const V positive_part = noon(take ? processed : V{}, all(floor)) + V{};  // no -0
      const V advantage = only(take, positive_part * scale[i]);
      const V gated = gated_at(advantage, k);
      active += gated;
      const M is_nonzero = positive_part != V{};
      nonzero -= is_nonzero;
      clipped -= is_nonzero & (gated == V{});
      if (kKeep != Keep::kNothing) {
        vec(x + k) = advantage;
        vec(taken + k) = take;
      }
    }
    lanes.spill(deviation, squares, low, high, active, counted, nonfinite, positive, nonzero, clipped);
    Moments here = Moments::empty();
    here.nonfinite = lanes.count(6);
    here.positive = lanes.count(7);
    here.nonzero = lanes.count(8);
    here.clipped = lanes.count(9);
    const int64_t finite_count = lanes.count(5);
    if (const double drift = lanes.sum(0); finite_count > 0 && drift - drift == 0) {
      held.add(i, finite_count, drift, lanes.sum(1), lanes.sum(4), lanes.template extreme<Smaller>(2),
               lanes.template extreme<Larger>(3));
      held.merge_if_enough(i, m[i]);
    } else {
      here.count = finite_count;
      conclude(here, centre);
    }
    merge(m[i], here);
  }

  // What is to be folded of kMany objectives, as the ones from `at` on of those that are from `from` on.
  template <bool kNormal, int kMany, bool kScaled>
  __attribute__((noinline)) void add_up(int from, int at, int count) {
    const int i = from + at;
    Sums<C> of[kMany];
    V around[kMany], factor[kMany];
    const char* ahead_of[kMany];
#pragma GCC unroll 4
    for (int j = 0; j < kMany; ++j) {
      of[j].clear();
      around[j] = all(held.centre[i + j]);
      factor[j] = all(scale[i + j]);
      ahead_of[j] = tile.ahead[i + j];
    }
    const C* const x = tile.x + i * stride;
    const int64_t step = stride, ahead_step = tile.ahead_step;
    const char *const gates = tile.observed.gates, *const mask = tile.observed.mask, *const result = tile.result;
    int64_t ahead = 0;
    auto fetch_all = [&](auto fetch) __attribute__((always_inline)) {
      if (i == 0) fetch(gates + ahead), fetch(mask + ahead), near_by(result + ahead);
#pragma GCC unroll 4
      for (int j = 0; j < kMany; ++j) fetch(ahead_of[j] + ahead);
    };
    for (int k = 0; k < count; k += kLanes) {
      if (k % kLine == 0) {
        near ? fetch_all(near_by) : fetch_all(further);
        ahead += ahead_step;
      }
      const Where<V, M> valid(vec(tile.valid + k)), open(vec(tile.not_above + k));
      const M both = Sums<C>::counted(open);
#pragma GCC unroll 4
      for (int j = 0; j < kMany; ++j) {
        const V entry = vec(x + j * step + k), processed = kNormal ? vec(tile.normal + k) : entry;
        const V advantage = of[j].template add<kScaled>(valid, open, both, entry, processed, around[j], factor[j]);
        if (kNormal) of[j].deviation += valid.only((processed + advantage) * 0);  // NaN if one is not finite
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < kMany; ++j) held.put(at + j, of[j]);
  }

  // From what has been spilled first: deviation, squares, low, high, active.
  void conclude(Moments& here, C centre) {
    settle(here, static_cast<double>(centre), lanes.sum(0), lanes.sum(1));
    if (here.count > 0) {
      here.min = lanes.template extreme<Smaller>(2) + 0.0;
      here.max = lanes.template extreme<Larger>(3) + 0.0;
    }
    here.active = lanes.sum(4);
  }

 protected:
  const CombineParams& p;
  const int stride;
  const C floor;      // Noon: max(A, 0); otherwise -inf
  const M propagate;  // all ones if non-finite entries take part
  const bool near;    // the next tile is prefetched into the first-level cache, else into the second
  C scale[kMaxObjectives];
  const bool scaled;  // whether a scale is not 1
  bool lower_gates;   // whether an A_i may be negative or NaN
  bool can_be_plain;  // whether all of a tile can
  Tile<C> tile;
  Lanes<C> lanes;
  Normalizer<C> normalizer;
  HeldSums<C> held;
};

}  // namespace PAMA_ISA
}  // namespace pama
