// The combination of one tile, whose objectives have been loaded and observed. Included once per instruction set.
#pragma once

#include "isa.h"
#include "observe.h"
#include "pama/solve.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
class Combiner : protected Observer<C> {
 protected:
  using typename Observer<C>::V;
  using typename Observer<C>::M;
  using typename Observer<C>::I;
  using Observer<C>::all;
  using Observer<C>::finite;
  using Observer<C>::floor;
  using Observer<C>::further;
  using Observer<C>::gated_at;
  using Observer<C>::kInf;
  using Observer<C>::kLanes;
  using Observer<C>::kLine;
  using Observer<C>::lanes;
  using Observer<C>::near_by;
  using Observer<C>::normalizer;
  using Observer<C>::only;
  using Observer<C>::p;
  using Observer<C>::positive;
  using Observer<C>::propagate;
  using Observer<C>::scale;
  using Observer<C>::stride;
  using Observer<C>::tile;
  using Observer<C>::vec;

  using Observer<C>::Observer;

  // A vector that need not be aligned. (Clang forgets the alignment of a type that depends on C.)
  static void put(C* x, int k, V value) { memcpy(x + k, &value, sizeof value); }

  // c_i A_i, of entries as they were loaded.
  static V weighed(V entry, V lowest, V factor, V weight) { return weight * (larger(lowest, entry) * factor); }

  // Whether each token stands `step` elements behind the one before, in whatever row.
  bool gapless(const Plane& q, int step) const { return q.col == step && (p.rows == 1 || q.row == p.cols * step); }

  // Where the combination of a tile goes: to its place if that is whole vectors of C side by side, else to scratch
  // first.
  template <class S>
  C* destination(int64_t t, int count) {
    const bool straight = std::is_same_v<S, C> && !p.in_place && !p.order && gapless(p.out, 1);
    return straight && count % kLanes == 0 ? reinterpret_cast<C*>(p.out.data) + t : tile.out;
  }

  int many = 0, wanted[kMaxObjectives];  // the objectives that are combined

  // The objectives that a combination under these weights has to see.
  void want(const double* weights) {
    many = 0;
    for (int i = 0; i < p.n; ++i) {
      weight[many] = static_cast<C>(weights[i]);
      if (p.marks() || weight[many] != 0) wanted[many++] = i;
    }
  }

  // The combination of a tile in `x`, as loaded, under the weights wanted. `moments` have seen it.
  template <class S>
  void combine_tile(int64_t t, int count, const Moments* moments) {
    for (int j = 0; j < many && normalizer.active(); ++j) {
      C* x = tile.x + wanted[j] * stride;
      normalizer.apply(wanted[j], t, count, x, x);
    }
    C* const out = destination<S>(t, count);
    bool first = true;
    for (int j = 0; j < many; ++j) {
      if (weight[j] == 0) continue;  // 0 * inf would be NaN
      if (p.in_place) {
        add_share<true, false>(j, first, count, out);
      } else if (!normalizer.active() && moments[wanted[j]].nonfinite == 0) {
        add_share<false, true>(j, first, count, out);
      } else {
        add_share<false, false>(j, first, count, out);
      }
      first = false;
    }
    if (first) fill(out, 0, count, C{0});
    for (int k = 0; k < count && p.marks(); k += kLanes) {
      M any{};
      for (int i = 0; i < p.n; ++i) any |= vec(tile.valid + k) & (finite(vec(tile.x + i * stride + k)) | propagate);
      put(out, k, marked(load_vector<C>(out + k), any));
    }
    if (out != tile.out) return;
    if (!p.in_place) return store_plane<S>(p, p.out, t, count, out);
    for (int i = 0, j = 0; i < p.n; ++i) {
      C* x = tile.x + i * stride;
      if (j < many && wanted[j] == i) {
        ++j;
      } else {
        fill(x, 0, count, C{0});
      }
      store_plane<S>(p, p.advantages[i], t, count, x);
    }
  }

  // Theorem 1 where no a_i is negative, or missing at a valid token. `x` holds what was loaded or, if that is
  // normalised, A_i.
  void solve_plain_tokens(int count, TokenShares& shares, C* out) {
    [&]<int... kN>(std::integer_sequence<int, kN...>) {
      const bool known = ((p.n == kN + 1 && (solve_plain_tokens<kN + 1>(count, shares, out), true)) || ...);
      if (!known) solve_plain_tokens<0>(count, shares, out);
    }(std::make_integer_sequence<int, 16>());
  }

  // Theorem 1, or fixed weights, for kLanes tokens at a time; `x` holds A_i on entry and, in place, c_i A_i on return.
  template <class S>
  void solve_tokens(int64_t first, int count, TokenShares& shares, C* out) {
    // Copies: for all the compiler knows, stores may change the originals.
    const int n = p.n;
    const int64_t step = stride;
    const bool fixed = p.solver == Solver::kFixed, skip_inactive = p.skip_inactive, in_place = p.in_place,
               per_token = p.per_token, mark = p.marks();
    C* const x = tile.x;
    I* const taken = tile.taken;
    V share_sum[kMaxObjectives] = {}, fixed_weight[kMaxObjectives];
    for (int i = 0; i < n && fixed; ++i) fixed_weight[i] = all(static_cast<C>(p.fixed_weight(i)));
    V value_sum{};
    M used_count{};
    for (int k = 0; k < count; k += kLanes) {
      V a[kMaxObjectives], low = all(kInf), high = all(-kInf);
      M kept[kMaxObjectives], used{}, kept_any{}, undefined{};
      for (int i = 0; i < n; ++i) {
        const M take = vec(taken + i * step + k);
        a[i] = gated_at(vec(x + i * step + k), k);
        kept[i] = skip_inactive ? take & (a[i] != V{}) : take;
        low = smaller((V)((M)a[i] | ~kept[i]), low);  // NaN where it is not kept
        high = larger((V)((M)a[i] | ~kept[i]), high);
        undefined |= take & (a[i] != a[i]);
        used |= take;
        kept_any |= kept[i];
      }
      if (skip_inactive) {  // nobody active: all that have data, each with a_i = 0
        for (int i = 0; i < n; ++i) kept[i] |= vec(taken + i * step + k) & ~kept_any;
        low = kept_any ? low : V{};
        high = kept_any ? high : V{};
      }
      M at_low{}, at_high{};
      for (int i = 0; i < n && !fixed; ++i) {
        at_low -= kept[i] & (a[i] == low);
        at_high -= kept[i] & (a[i] == high);
      }
      const Split<V> total = split(low, high);
      const V low_share = total.low / __builtin_convertvector(at_low, V);
      const V high_share = total.high != V{} ? total.high / __builtin_convertvector(at_high, V) : V{};
      V combined{}, value = fixed ? V{} : project(low, high);
      for (int i = 0; i < n; ++i) {
        V c;
        if (fixed) {
          c = fixed_weight[i];
          value += only(vec(taken + i * step + k) & (c != V{}), c * a[i]);
        } else {
          c = only(kept[i] & (a[i] == low), low_share) + only(kept[i] & (a[i] == high), high_share);
          c = undefined ? all(std::numeric_limits<C>::quiet_NaN()) : c;
          share_sum[i] += c;
        }
        const V contribution = only(vec(taken + i * step + k) & (c != V{}), c * vec(x + i * step + k));
        combined += contribution;
        if (in_place) vec(x + i * step + k) = contribution;
        if (per_token) write_weights(first + k, smaller(kLanes, count - k), i, c, used);
      }
      // If no extreme is 0, all that have a weight are active, and what they share is s* itself: without their
      // rounding.
      const M exact = used & ~undefined & (low != V{}) & (high != V{}) & (total.low == total.low);
      if (!fixed) combined = exact ? value : combined;
      if (p.solver == Solver::kMinNorm) value = value < V{} ? -value : value;  // of one token: the closed form
      if (!fixed) value = undefined ? all(std::numeric_limits<C>::quiet_NaN()) : value;
      value = used ? value : V{};
      put(out, k, mark ? marked(combined, used) : combined);
      value_sum += value;
      used_count -= used;
      if (per_token) {
        C* values = static_cast<C*>(p.packed) + (kStatistics + p.tokens()) * p.n;
        for (int l = 0; l < smaller(kLanes, count - k); ++l) values[p.row_at(first + k + l)] = value[l];
      }
    }
    add_shares(share_sum, value_sum, shares);
    lanes.spill(used_count);
    shares.used += lanes.count(0);
  }

  // What theorem 1 adds up of tokens of which all is plain. s* is the smallest A_i of an active token, and what its
  // objectives are combined to, whoever shares it; at an idle one all a_i are 0 and tie. kN: how many objectives, known
  // to the compiler; 0: any number.
  template <int kN>
  struct TokenSums {
    static constexpr int kMost = kN ? kN : kMaxObjectives;
    V share[kMost], value;
    V low, each;  // of the tokens added last: s*, and the share of it of one that is as small

    void clear() {
#pragma GCC unroll 16
      for (int i = 0; i < kMost; ++i) share[i] = V{};
      value = V{};
    }
    // Returns the combination: 0 where nothing is valid.
    inline __attribute__((always_inline)) V add(int n, const V* a, Where<V, M> valid, Where<V, M> open, V even) {
      V combined{};
      M at_low{};
      low = all(kInf);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) {
        low = (V)smaller((M)a[i], (M)low);            // of numbers that are not negative, as integers
        combined = valid.add(combined, a[i] * even);  // chosen after it is rounded, as in solve_tokens: no FMA
      }
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) at_low = open.equal(a[i], low).add_one(at_low);
      each = kN ? inverse<kMost>(at_low) : 1 / __builtin_convertvector(at_low, V);
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) share[i] = open.equal(a[i], low).add(share[i], each);
      value = open.add(value, low);
      return valid.only(open.either(low, combined));
    }
  };

  // Of `used` tokens those that are not active share evenly. The sums are known to the compiler here, so that they may
  // stay in registers until now.
  template <int kN>
  inline __attribute__((always_inline)) void add_shares(int n, const TokenSums<kN>& sums, int64_t used, int64_t active,
                                                        TokenShares& shares) {
    const double idle_share = static_cast<double>(used - active) / n;
    lanes.spill(sums.value);
    shares.value += lanes.sum();
    shares.used += used;
    if constexpr (kN > 0) {
      double of[kN];
      lanes.template sums<kN>(sums.share, of);
      for (int i = 0; i < kN; ++i) shares.weights[i] += of[i] + idle_share;
    }
    for (int i = 0; i < n && kN == 0; ++i) {
      lanes.spill(sums.share[i]);
      shares.weights[i] += lanes.sum() + idle_share;
    }
  }

  C weight[kMaxObjectives];  // of each of the objectives wanted

 private:
  template <int kN>
  void solve_plain_tokens(int count, TokenShares& shares, C* out) {
    constexpr int kMost = TokenSums<kN>::kMost;
    const int n = kN ? kN : p.n;
    const bool in_place = p.in_place, mark = p.marks();
    TokenSums<kN> sums;
    sums.clear();
    M active{};
    V factor[kMost];
    for (int i = 0; i < n; ++i) factor[i] = all(normalizer.active() ? C{1} : scale[i]);
    const V even = all(C{1} / static_cast<C>(n));
    const int64_t step = kN ? Tile<C>::stride_for(kMost) : stride;
    const char *gates = tile.solved.gates, *mask = tile.solved.mask, *next = tile.late;
    const int64_t ahead_step = tile.ahead_step;  // copies: for all the compiler knows, stores may change the originals
    const int late_many = tile.late_many;
    const bool near = this->near;
    auto fetch_all = [&](auto fetch) __attribute__((always_inline)) {
      fetch(gates), fetch(mask);
      for (int j = 0; j < late_many; ++j) fetch(next + j * ahead_step);
    };
    for (int k = 0; k < count; k += kLanes) {
      if (k % kLine == 0) {
        near ? fetch_all(near_by) : fetch_all(further);
        gates += ahead_step, mask += ahead_step, next += late_many * ahead_step;
      }
      const Where<V, M> valid(vec(tile.valid + k)), open(vec(tile.not_above + k));
      V a[kMost];
#pragma GCC unroll 16
      for (int i = 0; i < n; ++i) a[i] = positive(vec(tile.x + i * step + k)) * factor[i];
      const V combined = sums.add(n, a, valid, open, even);
      for (int i = 0; i < n && in_place; ++i) {
        const V idle = valid.without(open).only(a[i] * even);
        vec(tile.x + i * step + k) = idle + open.equal(a[i], sums.low).only(sums.each * a[i]);
      }
      put(out, k, mark ? marked(combined, vec(tile.valid + k)) : combined);
      active -= vec(tile.not_above + k);
    }
    lanes.spill(active);
    add_shares<kN>(n, sums, tile.valid_count, lanes.count(0), shares);
  }

  // c_i A_i of the j-th of the objectives wanted, added to those before it. kKeep: kept in `x`. kPlain: all are finite.
  template <bool kKeep, bool kPlain>
  void add_share(int j, bool first, int count, C* out) {
    C* const x = tile.x + wanted[j] * stride;
    const V factor = all(scale[wanted[j]]), share_of = all(weight[j]), lowest = all(floor);
    for (int k = 0; k < count; k += kLanes) {
      const M valid = vec(tile.valid + k), take = kPlain ? valid : valid & (finite(vec(x + k)) | propagate);
      const V share = only(take, weighed(vec(x + k), lowest, factor, share_of));
      put(out, k, (first ? V{} : load_vector<C>(out + k)) + share);
      if (kKeep) vec(x + k) = share;
    }
  }

  // S rounds what lies within +-tiny to 0, which must not become -0 where there is data.
  V marked(V x, M taken) const {
    const bool half = p.dtype == DType::kFloat16, bfloat = p.dtype == DType::kBFloat16;
    const V tiny = all(half ? C(0x1p-25) : bfloat ? C(0x1p-134) : C{0});
    const V some = ((x <= tiny) & (x >= -tiny)) ? V{} : x;
    return taken ? some : -V{};
  }

  void add_shares(const V* share_sum, V value_sum, TokenShares& shares) {
    for (int i = 0; i < p.n; ++i) {
      lanes.spill(share_sum[i]);
      shares.weights[i] += lanes.sum();
    }
    lanes.spill(value_sum);
    shares.value += lanes.sum();
  }

  void write_weights(int64_t token, int m, int i, V c, M used) const {
    C* weights = static_cast<C*>(p.packed) + kStatistics * p.n + i;
    const bool fixed = p.solver == Solver::kFixed;
    for (int l = 0; l < m; ++l)
      weights[p.row_at(token + l) * p.n] = fixed || used[l] ? c[l] : static_cast<C>(1.0 / p.n);
  }
};

}  // namespace PAMA_ISA
}  // namespace pama
