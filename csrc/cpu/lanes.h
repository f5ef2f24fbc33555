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

// Of each run of 2 * kHalf lanes the first or the second half, of a and b by turns.
template <int kHalf, bool kSecond, class V, int... kLane>
inline __attribute__((always_inline)) auto halves(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int all = sizeof a / sizeof a[0], run = 2 * kHalf;
  return __builtin_shufflevector(a, b,
                                 (kLane / kHalf % 2 * all + kLane / run * run + kSecond * kHalf + kLane % kHalf)...);
}

// What fold() makes of each of kRows vectors, all at once: lane r is that of row r. kRun: lanes of a row that stand
// together, at first all; powers of two.
template <class Op, int kRun, int kRows, class V>
inline __attribute__((always_inline)) auto fold_rows(const V* rows) {
  if constexpr (kRun == 1) {
    return rows[0];
  } else {
    // What is left of a row gets a vector of half the length, or shares one with another row.
    constexpr bool alone = kRun > kRows;
    constexpr int half = kRun / 2, left = alone ? kRows : half, other = alone ? 0 : half;
    constexpr std::make_integer_sequence<int, alone ? half : sizeof rows[0] / sizeof rows[0][0]> lanes{};
    decltype(halves<half, false>(rows[0], rows[0], lanes)) folded[left];
#pragma GCC unroll 16
    for (int r = 0; r < left; ++r)
      folded[r] = Op::apply(halves<half, false>(rows[r], rows[r + other], lanes),
                            halves<half, true>(rows[r], rows[r + other], lanes));
    return fold_rows<Op, half, left>(folded);
  }
}

constexpr int next_power(int n) { return n > 1 ? 2 * next_power((n + 1) / 2) : 1; }

// A vector on its way to a scalar goes through memory, hidden from the optimiser: GCC keeps a vector whose halves it
// sees taken on the stack, and the loop that accumulates it then waits for a store and a load each time round.
template <class C>
struct Lanes {
  using V = typename Simd<C>::V;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes, kMost = 16;
  alignas(64) C at[kMost * kLanes];

  template <class... Vectors>
  void spill(Vectors... vectors) {
    C* to = at;
    ((memcpy(to, &vectors, sizeof vectors), to += kLanes), ...);
    asm volatile("" : : "r"(at) : "memory");
  }
  // Of kMany vectors, at most kMost.
  template <int kMany>
  void sums(const V* vectors, double* to) {
    constexpr int rows = next_power(kMany < kLanes ? kMany : kLanes);
    static_assert((kMany + rows - 1) / rows * rows <= kMost);
#pragma GCC unroll 16
    for (int j = 0; j < kMany; ++j) memcpy(at + j * kLanes, &vectors[j], sizeof(V));  // one by one, as by spill()
    asm volatile("" : : "r"(at) : "memory");
    C of[kMost];
    for (int j = 0; j < kMany; j += rows) {
      const auto folded = fold_rows<Add, kLanes, rows>(reinterpret_cast<const V*>(at) + j);
      memcpy(of + j, &folded, sizeof folded);
    }
    for (int j = 0; j < kMany; ++j) to[j] = static_cast<double>(of[j]);
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
