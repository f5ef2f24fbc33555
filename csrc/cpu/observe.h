// The statistics of one tile. Included once per instruction set.
#pragma once

#include <cmath>

#include "lanes.h"
#include "normalize_kernel.h"
#include "pama/indicator.h"
#include "pama/moments.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

// What is left behind of a tile: A_i in `x` and, in `taken`, who takes part. Of a plain one that can wait.
enum class Keep { kNothing, kUnlessPlain, kAll };

template <class C>
class Observer {
 protected:
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes;
  static constexpr C kInf = std::numeric_limits<C>::infinity();

  static V& vec(C* x) { return *reinterpret_cast<V*>(x); }
  static const V& vec(const C* x) { return *reinterpret_cast<const V*>(x); }
  static M& vec(I* x) { return *reinterpret_cast<M*>(x); }
  static V all(C x) { return V{} + x; }
  static M finite(V x) { return (x - x) == V{}; }
  static V only(M mask, V x) { return (V)((M)x & mask); }    // x where the mask is set, else 0
  static M not_zero(V x) { return smaller((M)x, M{} + 1); }  // 1 where x is, of those that are not negative

  explicit Observer(const CombineParams& params)
      : p(params),
        stride(Tile<C>::stride_for(params.n)),
        floor(params.noon ? C{0} : -kInf),
        propagate(M{} - (params.propagate ? 1 : 0)),
        normalizer(params) {
    lower_gates = !p.noon || p.propagate || normalizer.active();
    for (int i = 0; i < p.n; ++i) {
      scale[i] = static_cast<C>(p.scale(i));
      lower_gates |= !keeps_sign(i);
    }
  }

  bool keeps_sign(int i) const { return scale[i] > 0 && scale[i] < kInf; }
  V gated_at(V advantage, int k) { return gate(advantage, vec(tile.not_above + k), vec(tile.not_below + k)); }

  // Statistics of all objectives over the tile, merged into m[n]. Returns those of which all is plain, a bit for each:
  // Noon, a positive scale, and a finite number for every valid token. What is normalised and to be kept at all is kept
  // at once.
  //
  // One pass around a centre near the mean: the sum of the deviations then corrects both moments. The centre is the
  // mean of what came before; how far this tile's mean lies from it is itself spread that the merged m2 contains, so
  // what cancels is small against the result. The first tile has no before and looks once more.
  template <Keep kKeep>
  uint64_t observe(int64_t first, int count, Moments* m) {
    uint64_t plain = 0;
    for (int i = 0; i < p.n; ++i) {
      if (normalizer.active()) {
        normalizer.apply(i, first, count, tile.x + i * stride, tile.normal);
        plain |= observe<kKeep, true, 1>(i, count, m) << i;
      } else if (kTogether > 1 && i + 1 < p.n) {
        plain |= observe<kKeep, false, kTogether>(i, count, m) << i;
        i += kTogether - 1;
      } else {
        plain |= observe<kKeep, false, 1>(i, count, m) << i;
      }
    }
    return plain;
  }

  // A_i of a plain tile, from its entries as they were loaded or normalised.
  void keep(int i, const C* processed, int count) {
    for (int k = 0; k < count; k += kLanes) {
      const Where<V, M> valid(vec(tile.valid + k));
      vec(tile.x + i * stride + k) = larger(valid.only(vec(processed + k)), V{}) * scale[i];
      vec(tile.taken + i * stride + k) = vec(tile.valid + k);
    }
  }

 private:
  // As many as there are registers for.
  static constexpr int kTogether = PAMA_VECTOR_BYTES == 64 ? 2 : 1;

  // Of kMany objectives from i on. kNormal: what goes on from here is tile.normal; else it is `x` itself.
  template <Keep kKeep, bool kNormal, int kMany>
  uint64_t observe(int i, int count, Moments* m) {
    // Entries that are nearly too large may lie too far from those before.
    constexpr double kFar = std::numeric_limits<C>::max() / 4;
    C centre[kMany];
    bool fits = p.noon;
    for (int j = 0; j < kMany; ++j) {
      const Moments& before = m[i + j];
      const bool known = 4 * before.count >= count && before.max < kFar && before.min > -kFar;
      centre[j] = centre_of(known ? before.mean : mean(tile.x + (i + j) * stride, count));
      fits &= keeps_sign(i + j);
    }
    const uint64_t plain = fits ? observe_plain<kNormal, kMany>(i, count, centre, m) : 0;
    for (int j = 0; j < kMany; ++j) {
      C* const x = tile.x + (i + j) * stride;
      if (!(plain >> j & 1)) {
        observe_carefully<kKeep, kNormal>(i + j, x, count, centre[j], m[i + j]);
      } else if (kKeep == Keep::kAll || (kKeep == Keep::kUnlessPlain && kNormal)) {
        keep(i + j, kNormal ? tile.normal : x, count);
      }
    }
    return plain;
  }

  template <Keep kKeep, bool kNormal>
  void observe_carefully(int i, C* x, int count, C centre, Moments& m) {
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
    Moments here = Moments::empty();
    lanes.spill(deviation, squares, low, high, active, counted, nonfinite, positive, nonzero, clipped);
    here.count = lanes.count(5);
    here.nonfinite = lanes.count(6);
    here.positive = lanes.count(7);
    here.nonzero = lanes.count(8);
    here.clipped = lanes.count(9);
    conclude(here, centre, m);
  }

  // The same under Noon, of those whose valid entries and A_i are all finite: a bit for each. For others nothing is
  // done. Comparisons are what takes the time above: here a maximum, a bitwise and or a minimum of integers does their
  // work.
  template <bool kNormal, int kMany>
  uint64_t observe_plain(int i, int count, const C* centre, Moments* m) {
    struct Sums {
      V deviation{}, squares{}, active{}, undefined{}, low = all(kInf), high = all(-kInf);
      M nonzero{}, open{};
    };
    Sums sums[kMany];
    V around[kMany], factor[kMany];
    Ahead ahead[kMany], beside[kMany];
    for (int j = 0; j < kMany; ++j) {
      around[j] = all(centre[j]);
      factor[j] = all(scale[i + j]);
      ahead[j] = tile.ahead[i + j];
      beside[j] = i + j < 2 ? tile.beside[i + j] : ahead[j];
    }
    const C* const x = tile.x + i * stride;
    const int64_t step = stride;
    for (int k = 0; k < count; k += kLanes) {
      const Where<V, M> valid(vec(tile.valid + k));
      const M not_above = vec(tile.not_above + k);
#pragma GCC unroll 2
      for (int j = 0; j < kMany; ++j) {
        __builtin_prefetch(ahead[j].at);
        __builtin_prefetch(beside[j].at);
        ahead[j].at += ahead[j].step;
        beside[j].at += beside[j].step;
        Sums& s = sums[j];
        const V entry = vec(x + j * step + k), d = valid.only(entry - around[j]);
        s.deviation += d;
        s.squares += d * d;
        s.low = valid.lower(entry, s.low);
        s.high = valid.higher(entry, s.high);
        const V processed = kNormal ? vec(tile.normal + k) : entry, positive = valid.positive(processed),
                advantage = positive * factor[j];
        if (kNormal) s.undefined += (valid.only(processed) + advantage) * 0;
        const V gated = only(not_above, advantage);
        s.active += gated;
        s.nonzero += not_zero(positive);
        s.open += not_zero(gated);
      }
    }
    uint64_t plain = 0;
#pragma GCC unroll 2
    for (int j = 0; j < kMany; ++j) {
      const Sums& s = sums[j];
      static_assert(kTileTokens < 1 << 16);
      lanes.spill(s.deviation, s.squares, s.low, s.high, s.active, s.nonzero | s.open << 16, s.undefined);
      const double wrong = lanes.sum(0) + (kNormal ? lanes.sum(6) : 0.0);
      const C largest = static_cast<C>(lanes.template extreme<Larger>(3)) * scale[i + j];  // of A_i, if that is x
      if (!(wrong - wrong == 0) || (!kNormal && largest == kInf)) continue;
      const int64_t counts = lanes.count(5);
      Moments here = Moments::empty();
      here.count = tile.valid_count;
      here.positive = here.nonzero = counts & 0xffff;
      here.clipped = here.nonzero - (counts >> 16);
      conclude(here, centre[j], m[i + j]);
      plain |= uint64_t{1} << j;
    }
    return plain;
  }

  static C centre_of(double mean) {
    const C centre = static_cast<C>(mean);
    return centre - centre == 0 ? centre : C{0};  // the sum of huge entries has overflowed
  }

  // From what has been spilled first: deviation, squares, low, high, active.
  void conclude(Moments& here, C centre, Moments& m) {
    settle(here, static_cast<double>(centre), lanes.sum(0), lanes.sum(1));
    if (here.count > 0) {
      here.min = lanes.template extreme<Smaller>(2);
      here.max = lanes.template extreme<Larger>(3);
    }
    here.active = lanes.sum(4);
    merge(m, here);
  }

  double mean(const C* x, int count) {
    V total{};
    M counted{};
    for (int k = 0; k < count; k += kLanes) {
      const V entry = vec(x + k);
      const M usable = vec(tile.valid + k) & finite(entry);
      counted -= usable;
      total += usable ? entry : V{};
    }
    lanes.spill(counted, total);
    const int64_t n = lanes.count(0);
    return n > 0 ? lanes.sum(1) / static_cast<double>(n) : 0.0;
  }

 protected:
  const CombineParams& p;
  const int stride;
  const C floor;      // Noon: max(A, 0); otherwise -inf
  const M propagate;  // all ones if non-finite entries take part
  C scale[kMaxObjectives];
  bool lower_gates;  // whether an A_i may be negative or NaN
  Tile<C> tile;
  Lanes<C> lanes;
  Normalizer<C> normalizer;
};

}  // namespace PAMA_ISA
}  // namespace pama
