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
    for (int i = 0; i < p.n; ++i) scale[i] = static_cast<C>(p.scale(i));
  }

  V gated_at(V advantage, int k) { return gate(advantage, vec(tile.not_above + k), vec(tile.not_below + k)); }

  // Statistics of objective i over the tile, merged into `m`. Returns whether all that is plain: Noon, a positive
  // scale, and a finite number for every valid token. What is normalised and to be kept at all is kept at once.
  //
  // One pass around a centre near the mean: the sum of the deviations then corrects both moments. The centre is the
  // mean of what came before; how far this tile's mean lies from it is itself spread that the merged m2 contains, so
  // what cancels is small against the result. The first tile has no before and looks once more.
  template <Keep kKeep>
  bool observe(int i, int64_t first, int count, Moments& m) {
    C* x = tile.x + i * stride;
    if (!normalizer.active()) return observe<kKeep, false>(i, x, count, m);
    normalizer.apply(i, first, count, x, tile.normal);
    return observe<kKeep, true>(i, x, count, m);
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
  // kNormal: what goes on from here is tile.normal; else it is x itself.
  template <Keep kKeep, bool kNormal>
  bool observe(int i, C* x, int count, Moments& m) {
    // Entries that are nearly too large may lie too far from those before.
    constexpr double kFar = std::numeric_limits<C>::max() / 4;
    const bool known = 4 * m.count >= count && m.max < kFar && m.min > -kFar;
    const C centre = centre_of(known ? m.mean : mean(x, count));
    if (p.noon && scale[i] > 0 && scale[i] < kInf && observe_plain<kNormal>(i, x, count, centre, m)) {
      if (kKeep == Keep::kAll || (kKeep == Keep::kUnlessPlain && kNormal)) keep(i, kNormal ? tile.normal : x, count);
      return true;
    }
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

      const V positive_part = noon(take ? processed : V{}, all(floor));
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
    return false;
  }

  // The same under Noon, where all valid entries and A_i are finite: false, with nothing done, if one is not.
  // Comparisons are what takes the time above: here a maximum, a bitwise and or a minimum of integers does their work.
  template <bool kNormal>
  bool observe_plain(int i, C* x, int count, C centre, Moments& m) {
    V deviation{}, squares{}, active{}, low = all(kInf), high = all(-kInf), undefined{};
    M nonzero{}, open{};
    const V factor = all(scale[i]);
    Ahead ahead = tile.ahead[i], beside = i < 2 ? tile.beside[i] : ahead;
    for (int k = 0; k < count; k += kLanes, ahead.at += ahead.step, beside.at += beside.step) {
      __builtin_prefetch(ahead.at);
      __builtin_prefetch(beside.at);
      const Where<V, M> valid(vec(tile.valid + k));
      const V entry = vec(x + k), d = valid.only(entry - centre);
      deviation += d;
      squares += d * d;
      low = valid.lower(entry, low);
      high = valid.higher(entry, high);
      const V processed = valid.only(kNormal ? vec(tile.normal + k) : entry), positive = larger(processed, V{}),
              advantage = positive * factor;
      if (kNormal) undefined += (processed + advantage) * 0;
      const V gated = only(vec(tile.not_above + k), advantage);
      active += gated;
      nonzero += not_zero(positive);
      open += not_zero(gated);
    }
    lanes.spill(deviation, squares, low, high, active, undefined, nonzero, open);
    const C largest = static_cast<C>(lanes.template extreme<Larger>(3)) * scale[i];  // of A_i, if that is x; -inf: none
    const double wrong = lanes.sum(0) + lanes.sum(5);
    if (!(wrong - wrong == 0) || (!kNormal && largest == kInf)) return false;
    Moments here = Moments::empty();
    here.count = tile.valid_count;
    here.positive = here.nonzero = lanes.count(6);
    here.clipped = here.nonzero - lanes.count(7);
    conclude(here, centre, m);
    return true;
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
  Tile<C> tile;
  Lanes<C> lanes;
  Normalizer<C> normalizer;
};

}  // namespace PAMA_ISA
}  // namespace pama
