// exp on SIMD vectors, to a relative error below 1.5 epsilon. Included once per instruction set.
#pragma once

#include "tile.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
struct Exponential {
  using V = typename Simd<C>::V;
  V value, beyond;  // e^x, and e^x - 1 - x without the cancellation
};

// For |x| up to some 80; NaN stays NaN. e^x = 2^k e^r, |r| <= log(2) / 2, by the Taylor polynomial of e^r.
template <class C>
inline __attribute__((always_inline)) Exponential<C> exponential(typename Simd<C>::V x) {
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  constexpr bool kFloat = sizeof(C) == 4;
  constexpr C kInverse = C(1.44269504088896340736);                              // 1 / log(2)
  constexpr C kHigh = kFloat ? C(0.693359375) : C(0.693145751953125);            // log(2), its first bits,
  constexpr C kLow = kFloat ? C(-2.12194440e-4) : C(1.42860682030941723212e-6);  // and the rest
  constexpr C kShift = kFloat ? C(0x1.8p23) : C(0x1.8p52);  // added, it leaves the nearest integer in the last bits
  constexpr int kMantissa = kFloat ? 23 : 52;
  constexpr int kTerms = kFloat ? 7 : 13;

  const V shifted = x * kInverse + kShift, k = shifted - kShift;
  const V r = (x - k * kHigh) - k * kLow;
  V q{};  // e^r = 1 + r + r^2 q
  C factorial[kTerms + 1] = {1};
  for (int i = 1; i <= kTerms; ++i) factorial[i] = factorial[i - 1] * C(i);
  for (int i = kTerms; i >= 2; --i) q = q * r + C{1} / factorial[i];
  const V tail = r * r * q, power = (V)(((M)shifted << kMantissa) + (M)(V{} + C{1}));
  const V value = (C{1} + (r + tail)) * power;
  return {value, k == V{} ? tail : value - C{1} - x};
}

}  // namespace PAMA_ISA
}  // namespace pama
