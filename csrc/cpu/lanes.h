// Vectors on their way to scalars. Included once per instruction set, inside namespace pama::PAMA_ISA.
#pragma once

#include <cstdint>
#include <cstring>

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

// A vector on its way to a scalar goes through memory, hidden from the optimiser: GCC keeps a vector whose halves it
// sees taken on the stack, and the loop that accumulates it then waits for a store and a load each time round.
template <class C>
struct Lanes {
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes;
  alignas(64) C at[16 * 10];

  template <class... Vectors>
  void spill(Vectors... vectors) {
    C* to = at;
    ((memcpy(to, &vectors, sizeof vectors), to += kLanes), ...);
    asm volatile("" : : "r"(at) : "memory");
  }
  double sum(int spilled = 0) const { return static_cast<double>(fold<C, kLanes>(at + spilled * kLanes)); }
  int64_t count(int spilled) const { return fold<I, kLanes>(at + spilled * kLanes); }
  template <class Op>
  double extreme(int spilled) const {
    return static_cast<double>(fold<C, kLanes, Op>(at + spilled * kLanes));
  }
};

}  // namespace PAMA_ISA
}  // namespace pama
