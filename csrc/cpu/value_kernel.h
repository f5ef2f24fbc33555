// The CPU kernel of `value_loss`, and the scaling of a kept gradient; compiled once per instruction set.
#include "isa.h"
#include "lanes.h"
#include "loss_tile.h"

namespace pama {
namespace PAMA_ISA {

// A tile of tokens is loaded objective by objective; what is kept for backward goes back the same way.
template <class C>
class ValueKernel : LossTile<C> {
  using typename LossTile<C>::V;
  using typename LossTile<C>::M;
  using LossTile<C>::kLanes;
  using LossTile<C>::kTokens;
  using LossTile<C>::part_of;

 public:
  ValueKernel(const ValueParams& params, ValueSums& sums)
      : p(params), to(sums), stride(smaller(kTokens, kElements / p.n / 16 * 16)) {}

  // The tokens [first, last), or where rows count the rows [first, last).
  void run(int64_t first, int64_t last) {
    this->segments(
        p, first, last, stride, [&](int64_t t, int count) { return tile(t, count); },
        [&](double scale, int64_t counted) {
          to.tokens += counted;
          to.sequences += counted > 0;
          for (int i = 0; i < p.n; ++i) to.losses[i] += losses[i] * scale, losses[i] = 0.0;
        });
  }

 private:
  int64_t tile(int64_t first, int count) {
    this->load_valid(p, first, count);
    load(p.values, p.value_dtype, first, count, values);
    load(p.returns, p.return_dtype, first, count, returns);
    if (p.clipped) load(p.old_values, p.old_dtype, first, count, olds);
    int64_t counted = 0;
    for (int i = 0; i < p.n; ++i) {
      const int at = i * stride;
      counted = p.clipped ? terms<true>(i, count, values + at, returns + at, olds + at)
                          : terms<false>(i, count, values + at, returns + at, olds + at);
    }
    if (p.gradient) put_back(first, count);
    return counted;
  }

  void load(const Plane* planes, DType dtype, int64_t first, int count, C* dst) const {
    const bool adjacent = pama::adjacent(planes, p.n, dtype);
    with_dtype(dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(S) <= sizeof(C)) load_objectives<S>(p, planes, adjacent, first, count, dst, stride);
    });
  }

  // Half the squared error, of the clipped value where that is the larger; its derivative takes the place of the value.
  template <bool kClipped>
  int64_t terms(int i, int count, C* value, const C* target, const C* old) {
    const V clip = V{} + static_cast<C>(p.clip);
    V total{}, sum{};
    M counted{}, flats{};
    for (int k = 0; k < count; k += kLanes) {
      const M take = this->mask_at(k);
      const V v = part_of(value + k), error = v - part_of(target + k);
      V larger = error * error;
      M flat{};
      if constexpr (kClipped) {
        const V low = part_of(old + k) - clip, high = part_of(old + k) + clip;
        const V bounded = v < low ? low : v > high ? high : v, other = bounded - part_of(target + k);
        flat = other * other > larger;
        larger = flat ? other * other : larger;
      }
      total += take ? larger : V{};
      sum += take ? v : V{};
      counted -= take;
      flats -= take & flat;
      const V slope = take & ~flat ? error : V{};
      memcpy(value + k, &slope, sizeof slope);
    }
    lanes.spill(total, sum, counted, flats);
    losses[i] += 0.5 * lanes.sum(0);
    to.values[i] += lanes.sum(1);
    to.clipped[i] += static_cast<double>(lanes.count(3));
    return lanes.count(2);
  }

  void put_back(int64_t first, int count) const {
    with_dtype(p.value_dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(S) <= sizeof(C)) {
        S* const out = reinterpret_cast<S*>(p.gradient);
        switch (p.gradient_col == p.n ? p.n : 0) {
          case 2: return interleave<2>(first, count, out);
          case 3: return interleave<3>(first, count, out);
          case 4: return interleave<4>(first, count, out);
          default: break;
        }
        for (int i = 0; i < p.n; ++i) {
          S* __restrict dst = out + first * p.gradient_col + i * p.gradient_objective;
          const C* __restrict src = values + i * stride;
          for (int k = 0; k < count; ++k) dst[k * p.gradient_col] = store_finite<S>(src[k]);
        }
      }
    });
  }

  template <int N, class S>
  void interleave(int64_t first, int count, S* out) const {
    S* __restrict dst = out + first * N;
    for (int k = 0; k < count; ++k)
      for (int i = 0; i < N; ++i) dst[k * N + i] = store_finite<S>(values[i * stride + k]);
  }

  const ValueParams& p;
  ValueSums& to;
  const int stride;                    // tokens of a tile
  double losses[kMaxObjectives] = {};  // of the segment
  Lanes<C> lanes;

  static constexpr int kElements = 4096;
  alignas(64) C values[kElements], returns[kElements], olds[kElements];
};

namespace {

void value_loss(const ValueParams& p, int64_t first, int64_t last, ValueSums& sums) {
  if (p.wide) {
    ValueKernel<double>(p, sums).run(first, last);
  } else {
    ValueKernel<float>(p, sums).run(first, last);
  }
}

// The elements [first, last) of a kept gradient, times the incoming one.
void scale(const ScaleParams& p, int64_t first, int64_t last) {
  with_dtype(p.dtype, [&](auto s) {
    using S = decltype(s);
    using C = typename Storage<S>::Compute;
    const S* const from = static_cast<const S*>(p.gradient);
    S* const to = static_cast<S*>(p.out);
    const double all = p.factor();
    for (int64_t row = p.row_scales ? first / p.cols : 0, k = first; k < last; ++row) {
      const int64_t end = p.row_scales ? smaller(last, (row + 1) * p.cols) : last;
      const C factor = static_cast<C>(all * p.row_factor(row));
      // `to` is `from`, or shares nothing with it: no element waits for another.
#ifdef __clang__
#pragma clang loop vectorize(assume_safety)
#else
#pragma GCC ivdep
#endif
      for (; k < end; ++k) {  // 0 stays 0, whatever the factor is
        const C x = Storage<S>::load(from[k]);
        to[k] = Storage<S>::store(x == C{0} ? x : x * factor);
      }
    }
  });
}

}  // namespace

}  // namespace PAMA_ISA
}  // namespace pama
