// The clipped surrogate of one token, for scalars and for the CPU kernel's SIMD vectors alike. Host and device.
#pragma once

#include <type_traits>

#include "pama/hd.h"
#include "pama/loss.h"

namespace pama {

// The bounds of the ratio u, and of its logarithm, as numbers of type C or vectors of them. What log_ratio is compared
// with is rounded so that comparing is exact.
template <class C, class V = C>
struct PolicyBounds {
  V log_low, log_high, log_dual, log_max, low, high, dual, max_weight;

  PAMA_HD explicit PolicyBounds(const PolicyParams& p)
      : log_low(all(at_least<C>(p.log_low))),
        log_high(all(at_most<C>(p.log_high))),
        log_dual(all(at_most<C>(p.log_dual))),
        log_max(all(at_most<C>(p.log_max))),
        low(all(static_cast<C>(p.low))),
        high(all(static_cast<C>(p.high))),
        dual(all(static_cast<C>(p.dual))),
        max_weight(all(static_cast<C>(p.max_weight))) {}

  static PAMA_HD V all(C x) {
    if constexpr (std::is_same_v<V, C>) {
      return x;
    } else {
      return V{} + x;
    }
  }
};

template <class V, class M>
struct PolicyTerm {
  V loss, factor, slope;  // slope: the derivative by log_prob, factor * advantage
  M high, low, dual;
};

template <class C>
PAMA_HD C to_limit(C x) {  // NaN stays NaN
  constexpr C kLimit = static_cast<C>(kLogRatioLimit);
  return x > kLimit ? kLimit : x < -kLimit ? -kLimit : x;
}

// `u` is exp of `held`, which is log_ratio within its limit. Truncated: u is a weight of log_prob, else what is
// clipped.
template <bool kTruncated, class M, class C, class V>
PAMA_HD PolicyTerm<V, M> policy_term(const PolicyBounds<C, V>& b, V log_prob, V log_ratio, V held, V u, V advantage) {
  const V zero{};
  if constexpr (kTruncated) {
    const M high = held > b.log_max;
    const V weight = high ? b.max_weight : u;
    return {-(weight * advantage * log_prob), -weight, -(weight * advantage), high, M{}, M{}};
  } else {
    const M positive = advantage > zero, negative = advantage < zero;
    const M high = positive & (held > b.log_high), low = negative & (held < b.log_low);
    const M dual = negative & (held > b.log_dual);
    const V bounded = high ? b.high : low ? b.low : dual ? b.dual : u;
    const M flat = high | low | dual, moves = held == log_ratio;
    const V factor = flat ? zero : moves ? -u : zero;
    return {-(bounded * advantage), factor, flat ? zero : factor * advantage, high, low, dual};
  }
}

// e^x - 1 - x without the cancellation, of scalars.
template <class C>
PAMA_HD C exp_beyond(C x) {
  if (x > C(0.35) || x < C(-0.35)) return expm1(x) - x;
  C q{0}, factorial{1};
  constexpr int kTerms = sizeof(C) == 4 ? 8 : 14;
  C inverse[kTerms + 1];
  for (int k = 2; k <= kTerms; ++k) inverse[k] = C{1} / (factorial *= static_cast<C>(k));
  for (int k = kTerms; k >= 2; --k) q = q * x + inverse[k];
  return x * x * q;
}

}  // namespace pama
