// The CPU kernel of `combine`, compiled once per instruction set (csrc/cpu/isa_*.cpp).
//
// A tile of tokens is loaded objective by objective into cache-sized scratch, whatever its dtype and layout; everything
// after that is one arithmetic on unit-stride vectors. Each objective goes through the same operations in the same
// order wherever it stands, so duplicated objectives tie exactly and permuting objectives permutes bits.
#include <cmath>
#include <cstring>

#include "isa.h"
#include "pama/indicator.h"
#include "pama/moments.h"
#include "pama/solve.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

struct Add {
  template <class V>
  static V apply(V a, V b) {
    return a + b;
  }
};
struct Smaller {
  template <class V>
  static V apply(V a, V b) {
    return b < a ? b : a;
  }
};
struct Larger {
  template <class V>
  static V apply(V a, V b) {
    return b > a ? b : a;
  }
};

// The lanes combined by halving: a fixed tree.
template <class T, int kLanes, class Op = Add>
inline __attribute__((always_inline)) T fold(const void* lanes) {
  if constexpr (kLanes == 1) {
    return *static_cast<const T*>(lanes);
  } else {
    typedef T Half __attribute__((vector_size(sizeof(T) * kLanes / 2)));
    Half low, high;
    memcpy(&low, lanes, sizeof(Half));
    memcpy(&high, static_cast<const char*>(lanes) + sizeof(Half), sizeof(Half));
    low = Op::apply(low, high);
    return fold<T, kLanes / 2, Op>(&low);
  }
}

template <class C>
class Kernel {
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes;
  static constexpr C kInf = std::numeric_limits<C>::infinity();

  static V& vec(C* x) { return *reinterpret_cast<V*>(x); }
  static M& vec(I* x) { return *reinterpret_cast<M*>(x); }
  static V all(C x) { return V{} + x; }
  static M finite(V x) { return (x - x) == V{}; }
  // A vector on its way to a scalar goes through memory, hidden from the optimiser: GCC keeps a vector whose halves it
  // sees taken on the stack, and the loop that accumulates it then waits for a store and a load each time round.
  template <class... Vectors>
  void spill(Vectors... vectors) {
    C* to = tile.lanes;
    ((memcpy(to, &vectors, sizeof vectors), to += kLanes), ...);
    asm volatile("" : : "r"(tile.lanes) : "memory");
  }
  double sum(int spilled = 0) const { return static_cast<double>(fold<C, kLanes>(tile.lanes + spilled * kLanes)); }
  int64_t count_of(int spilled) const { return fold<I, kLanes>(tile.lanes + spilled * kLanes); }

 public:
  explicit Kernel(const CombineParams& params)
      : p(params),
        stride(Tile<C>::stride_for(params.n)),
        adjacent(interleaved(params)),
        floor(params.noon ? C{0} : -kInf),
        propagate(M{} - (params.propagate ? 1 : 0)) {
    for (int i = 0; i < p.n; ++i) scale[i] = static_cast<C>(p.scale(i));
  }

  // Statistics of the tokens [first, last), merged into moments[n].
  template <class S>
  void scan(int64_t first, int64_t last, Moments* moments) {
    for (int64_t t = first; t < last; t += stride) {
      const int count = static_cast<int>(smaller<int64_t>(stride, last - t));
      load<S>(t, count);
      for (int i = 0; i < p.n; ++i) observe<false>(i, count, moments[i]);
    }
  }

  // The combination of the tokens [first, last) under fixed weights[n].
  template <class S>
  void weigh(int64_t first, int64_t last, const double* weights) {
    for (int64_t t = first; t < last; t += stride) {
      const int count = static_cast<int>(smaller<int64_t>(stride, last - t));
      load_valid(p, t, count, tile);
      fill(tile.out, 0, count + kLanes - 1, C{0});
      for (int i = 0; i < p.n; ++i) {
        const C weight = static_cast<C>(weights[i]);
        C* x = tile.x;
        if (weight != 0) load_plane<S>(p, p.advantages[i], t, count, x);  // weight 0: not even read
        for (int k = 0; k < count; k += kLanes) {
          V share{};
          if (weight != 0) {
            const V raw = vec(x + k), advantage = noon(raw, all(floor)) * scale[i];
            share = (vec(tile.valid + k) & (finite(raw) | propagate)) ? all(weight) * advantage : V{};
            vec(tile.out + k) += share;
          }
          if (p.in_place) vec(x + k) = share;
        }
        if (p.in_place) store_plane<S>(p, p.advantages[i], t, count, x);
      }
      if (!p.in_place) store_plane<S>(p, p.out, t, count, tile.out);
    }
  }

  // Level token: statistics, solve and combination of the tokens [first, last).
  template <class S>
  void tokens(int64_t first, int64_t last, Moments* moments, TokenShares& shares) {
    for (int64_t t = first; t < last; t += stride) {
      const int count = static_cast<int>(smaller<int64_t>(stride, last - t));
      load<S>(t, count);
      for (int i = 0; i < p.n; ++i) observe<true>(i, count, moments[i]);
      solve_tokens(t, count, shares);
      if (p.in_place) {
        for (int i = 0; i < p.n; ++i) store_plane<S>(p, p.advantages[i], t, count, tile.x + i * stride);
      } else {
        store_plane<S>(p, p.out, t, count, tile.out);
      }
    }
  }

 private:
  template <class S>
  void load(int64_t t, int count) {
    load_valid(p, t, count, tile);
    load_gates(p, t, count, tile);
    load_objectives<S>(p, adjacent, t, count, tile.x, stride);
  }

  // Statistics of objective i over the tile, merged into `m`. kKeep: leaves A_i in x and, in `taken`, who takes part.
  //
  // One pass around a centre near the mean: the sum of the deviations then corrects both moments. The centre is the
  // mean of what came before; how far this tile's mean lies from it is itself spread that the merged m2 contains, so
  // what cancels is small against the result. The first tile has no before and looks once more.
  template <bool kKeep>
  void observe(int i, int count, Moments& m) {
    C* x = tile.x + i * stride;
    I* taken = tile.taken + i * stride;
    C centre = static_cast<C>(m.count >= count ? m.mean : mean(x, count));
    if (!(centre - centre == 0)) centre = 0;  // the sum of huge entries has overflowed

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
      positive -= usable & (entry > V{});

      const V positive_part = noon(take ? entry : V{}, all(floor)), advantage = positive_part * scale[i];
      const V gated = gated_at(advantage, k);
      active += gated;
      const M is_nonzero = positive_part != V{};
      nonzero -= is_nonzero;
      clipped -= is_nonzero & (gated == V{});
      if (kKeep) {
        vec(x + k) = advantage;
        vec(taken + k) = take;
      }
    }
    Moments here = Moments::empty();
    spill(counted, nonfinite, positive, nonzero, clipped, active, deviation, squares, low, high);
    here.count = count_of(0);
    here.nonfinite = count_of(1);
    here.positive = count_of(2);
    here.nonzero = count_of(3);
    here.clipped = count_of(4);
    here.active = sum(5);
    const double n = static_cast<double>(here.count > 0 ? here.count : 1);
    const double drift = sum(6), spread = sum(7), m2 = spread - drift * (drift / n);
    here.mean = static_cast<double>(centre) + drift / n;
    here.m2 = spread == HUGE_VAL ? spread : m2 < 0.0 ? 0.0 : m2;  // squares may overflow: inf, not inf - inf
    if (here.count > 0) {
      here.min = fold<C, kLanes, Smaller>(tile.lanes + 8 * kLanes);
      here.max = fold<C, kLanes, Larger>(tile.lanes + 9 * kLanes);
    }
    merge(m, here);
  }

  double mean(C* x, int count) {
    V total{};
    M counted{};
    for (int k = 0; k < count; k += kLanes) {
      const V entry = vec(x + k);
      const M usable = vec(tile.valid + k) & finite(entry);
      counted -= usable;
      total += usable ? entry : V{};
    }
    spill(counted, total);
    const int64_t n = count_of(0);
    return n > 0 ? sum(1) / static_cast<double>(n) : 0.0;
  }

  V gated_at(V advantage, int k) { return gate(advantage, vec(tile.not_above + k), vec(tile.not_below + k)); }

  // Theorem 1 for kLanes tokens at a time; `x` holds A_i on entry and, in place, c_i A_i on return.
  void solve_tokens(int64_t first, int count, TokenShares& shares) {
    V share_sum[kMaxObjectives] = {};
    V value_sum{};
    M used_count{};
    for (int k = 0; k < count; k += kLanes) {
      V low = all(kInf), high = all(-kInf), at_low{}, at_high{};
      M used{}, kept_any{}, undefined{};
      for (int i = 0; i < p.n; ++i) {
        const M take = vec(tile.taken + i * stride + k);
        const V a = gated_at(vec(tile.x + i * stride + k), k);
        const M kept = p.skip_inactive ? take & (a != V{}) : take;
        at_low = (kept & (a < low)) ? all(1) : at_low + ((kept & (a == low)) ? all(1) : V{});
        at_high = (kept & (a > high)) ? all(1) : at_high + ((kept & (a == high)) ? all(1) : V{});
        low = (kept & (a < low)) ? a : low;
        high = (kept & (a > high)) ? a : high;
        undefined |= take & (a != a);
        used |= take;
        kept_any |= kept;
      }
      if (p.skip_inactive) {  // nobody active: all that have data, each with a_i = 0
        V present{};
        for (int i = 0; i < p.n; ++i) present += vec(tile.taken + i * stride + k) ? all(1) : V{};
        low = kept_any ? low : V{};
        high = kept_any ? high : V{};
        at_low = kept_any ? at_low : present;
      }
      const Split<V> total = split(low, high);
      const V low_share = total.low / at_low, high_share = total.high / at_high;
      V combined{}, value = project(low, high);
      if (p.solver == Solver::kFixed) value = V{};
      for (int i = 0; i < p.n; ++i) {
        const M take = vec(tile.taken + i * stride + k);
        const V advantage = vec(tile.x + i * stride + k), a = gated_at(advantage, k);
        V c;
        if (p.solver == Solver::kFixed) {
          c = all(static_cast<C>(p.fixed_weight(i)));
          value += (take & (c != V{})) ? c * a : V{};
        } else {
          const M kept = p.skip_inactive ? take & ((a != V{}) | ~kept_any) : take;
          c = ((kept & (a == low)) ? low_share : V{}) + ((kept & (a == high) & (total.high != V{})) ? high_share : V{});
          c = undefined ? all(std::numeric_limits<C>::quiet_NaN()) : c;
          share_sum[i] += used ? c : V{};
        }
        const V contribution = (take & (c != V{})) ? c * advantage : V{};
        combined += contribution;
        if (p.in_place) vec(tile.x + i * stride + k) = contribution;
        if (p.per_token) write_weights(first + k, smaller(kLanes, count - k), i, c, used);
      }
      if (p.solver == Solver::kClosedForm) value = undefined ? all(std::numeric_limits<C>::quiet_NaN()) : value;
      value = used ? value : V{};
      vec(tile.out + k) = combined;
      value_sum += value;
      used_count -= used;
      if (p.per_token) {
        C* values = static_cast<C*>(p.packed) + (kStatistics + p.tokens()) * p.n + first + k;
        for (int l = 0; l < smaller(kLanes, count - k); ++l) values[l] = value[l];
      }
    }
    for (int i = 0; i < p.n; ++i) {
      spill(share_sum[i]);
      shares.weights[i] += sum();
    }
    spill(value_sum, used_count);
    shares.value += sum(0);
    shares.used += count_of(1);
  }

  void write_weights(int64_t token, int m, int i, V c, M used) const {
    C* weights = static_cast<C*>(p.packed) + (kStatistics + token) * p.n + i;
    const bool fixed = p.solver == Solver::kFixed;
    for (int l = 0; l < m; ++l) weights[l * p.n] = fixed || used[l] ? c[l] : static_cast<C>(1.0 / p.n);
  }

  const CombineParams& p;
  const int stride;
  const bool adjacent;
  const C floor;      // Noon: max(A, 0); otherwise -inf
  const M propagate;  // all ones if non-finite entries take part
  C scale[kMaxObjectives];
  Tile<C> tile;
};

namespace {

void scan(const CombineParams& p, int64_t first, int64_t last, Moments* moments) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    Kernel<typename Storage<S>::Compute>(p).template scan<S>(first, last, moments);
  });
}

void weigh(const CombineParams& p, int64_t first, int64_t last, const double* weights) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    Kernel<typename Storage<S>::Compute>(p).template weigh<S>(first, last, weights);
  });
}

void tokens(const CombineParams& p, int64_t first, int64_t last, Moments* moments, TokenShares& shares) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    Kernel<typename Storage<S>::Compute>(p).template tokens<S>(first, last, moments, shares);
  });
}

// Level sequence: one solve per row, combined while the row is in cache.
void sequences(const CombineParams& p, int64_t first, int64_t last, Moments* moments) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = typename Storage<S>::Compute;
    Kernel<C> kernel(p);
    C* weights_out = static_cast<C*>(p.packed) + kStatistics * p.n;
    C* values_out = weights_out + p.rows * p.n;
    for (int64_t row = first; row < last; ++row) {
      Moments of_row[kMaxObjectives];
      double weights[kMaxObjectives];
      fill(of_row, 0, p.n, Moments::empty());
      kernel.template scan<S>(row * p.cols, (row + 1) * p.cols, of_row);
      values_out[row] = static_cast<C>(solve(p, of_row, weights));
      for (int i = 0; i < p.n; ++i) weights_out[row * p.n + i] = static_cast<C>(weights[i]);
      kernel.template weigh<S>(row * p.cols, (row + 1) * p.cols, weights);
      for (int i = 0; i < p.n; ++i) merge(moments[i], of_row[i]);
    }
  });
}

}  // namespace

#define PAMA_STRING(x) #x
#define PAMA_NAME(x) PAMA_STRING(x)

const CpuKernels kernels = {PAMA_NAME(PAMA_ISA), scan, weigh, tokens, sequences};

}  // namespace PAMA_ISA
}  // namespace pama
