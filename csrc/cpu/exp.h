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
  C inverse[kTerms + 1] = {1};  // of factorials
  C factorial = 1;
  for (int i = 1; i <= kTerms; ++i) inverse[i] = C{1} / (factorial *= C(i));
  // e^r = 1 + r + r^2 (even + r odd): two chains, as one would be the longest thing that a loop waits for.
  const V square = r * r;
  V odd = V{} + inverse[kTerms], even = V{} + inverse[kTerms - 1];
  for (int i = kTerms - 2; i >= 2; i -= 2) odd = odd * square + inverse[i], even = even * square + inverse[i - 1];
  const V tail = square * (even + r * odd), power = (V)(((M)shifted << kMantissa) + (M)(V{} + C{1}));
  const V value = (C{1} + (r + tail)) * power;
  return {value, k == V{} ? tail : value - C{1} - x};
}

}  // namespace PAMA_ISA
}  // namespace pama
