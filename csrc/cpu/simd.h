// SIMD vectors of the instruction set a file is compiled for. Included once per instruction set.
//
// They are those of GCC and Clang, whose operators do nearly everything. The instructions named below are the ones GCC
// does not find: it spells a minimum of vectors as a comparison and a selection. On AVX-512 a comparison makes a mask
// register, which costs a core (Zen 5) more than the operations on integers or bits that can do the same; so hot loops
// compare little, and keep their masks in memory as vectors of -1 and 0.
#pragma once

#include <cstdint>
#include <type_traits>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace pama {
namespace PAMA_ISA {

// Lanes of C; integers I of the same width, as numbers or as masks.
template <class C>
struct Simd {
  static constexpr int lanes = PAMA_VECTOR_BYTES / static_cast<int>(sizeof(C));
  using I = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  typedef C V __attribute__((vector_size(PAMA_VECTOR_BYTES), may_alias));
  typedef I M __attribute__((vector_size(PAMA_VECTOR_BYTES), may_alias));
};
using Floats = Simd<float>::V;
using Doubles = Simd<double>::V;
using Ints = Simd<float>::M;
using Longs = Simd<double>::M;

// smaller(a, b) is a < b ? a : b, larger(a, b) is a > b ? a : b: b where one of them is NaN.
template <class T>
inline T smaller(T a, T b) {
  return a < b ? a : b;
}
template <class T>
inline T larger(T a, T b) {
  return a > b ? a : b;
}

// What a loop needs of a mask: where it is set x, or the larger of x and 0, else 0; the smaller or larger of x and y,
// else y. positive() compares integers, of which a core makes twice as many in a cycle as of floats: NaN may pass.
template <class V, class M>
struct Where {
  M mask;

  explicit Where(M m) : mask(m) {}
  V only(V x) const { return (V)((M)x & mask); }
  V positive(V x) const { return only((V)larger((M)x, M{})); }
  V lower(V x, V y) const { return smaller(mask ? x : y, y); }
  V higher(V x, V y) const { return larger(mask ? x : y, y); }
};

// Unsigned numbers, one to a lane.
template <class M, class U>
inline M widened(const U* from) {
  M x;
  for (unsigned l = 0; l < sizeof(M) / sizeof x[0]; ++l) x[l] = from[l];
  return x;
}

#if PAMA_VECTOR_BYTES == 64

template <>
inline Ints widened<Ints>(const uint8_t* from) {
  return (Ints)_mm512_maskz_cvtepu8_epi32(-1, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

// Written with a mask of all lanes, as GCC 12 warns of its own definitions of the forms without one.
inline Floats smaller(Floats a, Floats b) { return _mm512_maskz_min_ps(-1, a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_maskz_max_ps(-1, a, b); }
inline Doubles smaller(Doubles a, Doubles b) { return _mm512_maskz_min_pd(-1, a, b); }
inline Doubles larger(Doubles a, Doubles b) { return _mm512_maskz_max_pd(-1, a, b); }
inline Ints smaller(Ints a, Ints b) { return (Ints)_mm512_maskz_min_epi32(-1, (__m512i)a, (__m512i)b); }
inline Longs smaller(Longs a, Longs b) { return (Longs)_mm512_maskz_min_epi64(-1, (__m512i)a, (__m512i)b); }

template <>
struct Where<Floats, Ints> {
  __mmask16 mask;

  explicit Where(Ints m) : mask(_mm512_test_epi32_mask((__m512i)m, (__m512i)m)) {}
  Floats only(Floats x) const { return _mm512_maskz_mov_ps(mask, x); }
  Floats positive(Floats x) const { return (Floats)_mm512_maskz_max_epi32(mask, (__m512i)x, __m512i{}); }
  Floats lower(Floats x, Floats y) const { return _mm512_mask_min_ps(y, mask, x, y); }
  Floats higher(Floats x, Floats y) const { return _mm512_mask_max_ps(y, mask, x, y); }
};
template <>
struct Where<Doubles, Longs> {
  __mmask8 mask;

  explicit Where(Longs m) : mask(_mm512_test_epi64_mask((__m512i)m, (__m512i)m)) {}
  Doubles only(Doubles x) const { return _mm512_maskz_mov_pd(mask, x); }
  Doubles positive(Doubles x) const { return (Doubles)_mm512_maskz_max_epi64(mask, (__m512i)x, __m512i{}); }
  Doubles lower(Doubles x, Doubles y) const { return _mm512_mask_min_pd(y, mask, x, y); }
  Doubles higher(Doubles x, Doubles y) const { return _mm512_mask_max_pd(y, mask, x, y); }
};

#elif PAMA_VECTOR_BYTES == 32

template <>
inline Ints widened<Ints>(const uint8_t* from) {
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}

inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Doubles smaller(Doubles a, Doubles b) { return _mm256_min_pd(a, b); }
inline Doubles larger(Doubles a, Doubles b) { return _mm256_max_pd(a, b); }
inline Ints smaller(Ints a, Ints b) { return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }

#endif

}  // namespace PAMA_ISA
}  // namespace pama
