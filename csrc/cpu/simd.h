// SIMD vectors of the instruction set a file is compiled for. Included once per instruction set.
//
// They are those of GCC and Clang, whose operators do nearly everything. The instructions named below are the ones GCC
// does not find: it spells a minimum of vectors as a comparison and a selection. On AVX-512 comparisons make mask
// registers. What is done under one costs nothing more, but making it takes one of two ports (Zen 5), and GCC moves
// masks to general registers and back where it combines them: so hot loops make few and use them often.
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

// Unsigned numbers, one to a lane.
template <class M, class U>
inline M widened(const U* from) {
  M x;
  for (unsigned l = 0; l < sizeof(M) / sizeof x[0]; ++l) x[l] = from[l];
  return x;
}

template <class M>
inline int set_lanes(M mask) {
  int set = 0;
  for (unsigned l = 0; l < sizeof(M) / sizeof mask[0]; ++l) set -= static_cast<int>(mask[l]);
  return set;
}

// x where `of`, which is not negative, is not 0 either.
template <class M>
inline M if_positive(M of, M x) {
  return x & (of > M{});
}

// What a loop needs of a mask: where it is set x, else 0 (only) or y (either); the smaller or larger of x and y, or y +
// x, or y + 1, else y; the mask of what is set where a comparison holds, too; and how many lanes are. A product that is
// added is rounded first.
template <class V, class M>
struct Where {
  M mask;

  explicit Where(M m) : mask(m) {}
  V only(V x) const { return (V)((M)x & mask); }
  V either(V x, V y) const { return mask < M{} ? x : y; }
  V lower(V x, V y) const { return smaller((V)((M)x | ~mask), y); }  // NaN where it is not set
  V higher(V x, V y) const { return larger((V)((M)x | ~mask), y); }
  V add(V y, V x) const { return y + only(x); }
  M add(M y, M x) const { return y + (x & mask); }
  M add_one(M y) const { return y - mask; }
  M add_if_positive(M y, M x, M of) const { return y + if_positive(of, x & mask); }  // `of` is not negative
  Where equal(V x, V y) const { return Where(mask & (x == y)); }
  Where at_most(V x, V y) const { return Where(mask & (x <= y)); }
  static Where nonzero(const uint8_t* bytes) { return Where(widened<M>(bytes) > M{}); }
  Where without(Where other) const { return Where(mask & ~other.mask); }
  int count() const { return set_lanes(mask); }
};

// 1 / count, of counts from 1 to kMost, which is at most 16.
template <int kMost, class M>
inline auto inverse(M count) {
  using V = std::conditional_t<sizeof(count[0]) == 4, Floats, Doubles>;
  return 1 / __builtin_convertvector(count, V);
}

#if PAMA_VECTOR_BYTES == 64

// As a table, whose index has four bits.
template <int kMost>
inline Floats inverse(Ints count) {
  constexpr Floats table{1 / 16.f, 1,       1 / 2.f,  1 / 3.f,  1 / 4.f,  1 / 5.f,  1 / 6.f,  1 / 7.f,
                         1 / 8.f,  1 / 9.f, 1 / 10.f, 1 / 11.f, 1 / 12.f, 1 / 13.f, 1 / 14.f, 1 / 15.f};
  return _mm512_maskz_permutexvar_ps(-1, (__m512i)count, table);
}

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
inline Ints larger(Ints a, Ints b) { return (Ints)_mm512_maskz_max_epi32(-1, (__m512i)a, (__m512i)b); }
inline Longs smaller(Longs a, Longs b) { return (Longs)_mm512_maskz_min_epi64(-1, (__m512i)a, (__m512i)b); }
inline Longs larger(Longs a, Longs b) { return (Longs)_mm512_maskz_max_epi64(-1, (__m512i)a, (__m512i)b); }

template <>
struct Where<Floats, Ints> {
  __mmask16 mask;

  explicit Where(__mmask16 m) : mask(m) {}
  explicit Where(Ints m) : mask(_mm512_test_epi32_mask((__m512i)m, (__m512i)m)) {}
  Floats only(Floats x) const { return _mm512_maskz_mov_ps(mask, x); }
  Floats either(Floats x, Floats y) const { return _mm512_mask_blend_ps(mask, y, x); }
  Floats lower(Floats x, Floats y) const { return _mm512_mask_min_ps(y, mask, x, y); }
  Floats higher(Floats x, Floats y) const { return _mm512_mask_max_ps(y, mask, x, y); }
  Floats add(Floats y, Floats x) const { return _mm512_mask_add_ps(y, mask, y, x); }
  Ints add(Ints y, Ints x) const { return (Ints)_mm512_mask_add_epi32((__m512i)y, mask, (__m512i)y, (__m512i)x); }
  Where equal(Floats x, Floats y) const { return Where(_mm512_mask_cmp_ps_mask(mask, x, y, _CMP_EQ_OQ)); }
  Where at_most(Floats x, Floats y) const { return Where(_mm512_mask_cmp_ps_mask(mask, x, y, _CMP_LE_OQ)); }
  Ints add_one(Ints y) const { return add(y, Ints{} + 1); }
  Ints add_if_positive(Ints y, Ints x, Ints of) const {
    return Where(_mm512_mask_test_epi32_mask(mask, (__m512i)of, (__m512i)of)).add(y, x);
  }
  static Where nonzero(const uint8_t* bytes) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return Where(static_cast<__mmask16>(_mm_test_epi8_mask(x, x)));
  }
  Where without(Where other) const { return Where(static_cast<__mmask16>(mask & ~other.mask)); }
  int count() const { return __builtin_popcount(mask); }
};
template <>
struct Where<Doubles, Longs> {
  __mmask8 mask;

  explicit Where(__mmask8 m) : mask(m) {}
  explicit Where(Longs m) : mask(_mm512_test_epi64_mask((__m512i)m, (__m512i)m)) {}
  Doubles only(Doubles x) const { return _mm512_maskz_mov_pd(mask, x); }
  Doubles either(Doubles x, Doubles y) const { return _mm512_mask_blend_pd(mask, y, x); }
  Doubles lower(Doubles x, Doubles y) const { return _mm512_mask_min_pd(y, mask, x, y); }
  Doubles higher(Doubles x, Doubles y) const { return _mm512_mask_max_pd(y, mask, x, y); }
  Doubles add(Doubles y, Doubles x) const { return _mm512_mask_add_pd(y, mask, y, x); }
  Longs add(Longs y, Longs x) const { return (Longs)_mm512_mask_add_epi64((__m512i)y, mask, (__m512i)y, (__m512i)x); }
  Where equal(Doubles x, Doubles y) const { return Where(_mm512_mask_cmp_pd_mask(mask, x, y, _CMP_EQ_OQ)); }
  Where at_most(Doubles x, Doubles y) const { return Where(_mm512_mask_cmp_pd_mask(mask, x, y, _CMP_LE_OQ)); }
  Longs add_one(Longs y) const { return add(y, Longs{} + 1); }
  Longs add_if_positive(Longs y, Longs x, Longs of) const {
    return Where(_mm512_mask_test_epi64_mask(mask, (__m512i)of, (__m512i)of)).add(y, x);
  }
  static Where nonzero(const uint8_t* bytes) {
    const __m128i x = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return Where(static_cast<__mmask8>(_mm_test_epi8_mask(x, x)));
  }
  Where without(Where other) const { return Where(static_cast<__mmask8>(mask & ~other.mask)); }
  int count() const { return __builtin_popcount(mask); }
};

#elif PAMA_VECTOR_BYTES == 32

// As tables, whose index has three bits; the fourth chooses among two.
template <int kMost>
inline Floats inverse(Ints count) {
  constexpr Floats few{1 / (kMost > 8 ? 16.f : 8.f), 1, 1 / 2.f, 1 / 3.f, 1 / 4.f, 1 / 5.f, 1 / 6.f, 1 / 7.f};
  constexpr Floats many{1 / 8.f, 1 / 9.f, 1 / 10.f, 1 / 11.f, 1 / 12.f, 1 / 13.f, 1 / 14.f, 1 / 15.f};
  const Floats found = _mm256_permutevar8x32_ps(few, (__m256i)count);
  if constexpr (kMost <= 8) return found;
  return count << 28 < Ints{} ? (Floats)_mm256_permutevar8x32_ps(many, (__m256i)count) : found;
}

template <>
inline Ints widened<Ints>(const uint8_t* from) {
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
template <>
inline Ints if_positive(Ints of, Ints x) {
  return (Ints)_mm256_sign_epi32((__m256i)x, (__m256i)of);
}
template <>
inline int set_lanes(Ints mask) {
  return __builtin_popcount(_mm256_movemask_ps((__m256)mask));
}
template <>
inline int set_lanes(Longs mask) {
  return __builtin_popcount(_mm256_movemask_pd((__m256d)mask));
}

// Two halves, of which GCC would not take the second from memory.
inline Floats joined(__m128 low, __m128 high) { return _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1); }
inline Doubles joined(__m128d low, __m128d high) { return _mm256_insertf128_pd(_mm256_castpd128_pd256(low), high, 1); }

inline Floats smaller(Floats a, Floats b) { return _mm256_min_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm256_max_ps(a, b); }
inline Doubles smaller(Doubles a, Doubles b) { return _mm256_min_pd(a, b); }
inline Doubles larger(Doubles a, Doubles b) { return _mm256_max_pd(a, b); }
inline Ints smaller(Ints a, Ints b) { return (Ints)_mm256_min_epi32((__m256i)a, (__m256i)b); }
inline Ints larger(Ints a, Ints b) { return (Ints)_mm256_max_epi32((__m256i)a, (__m256i)b); }

#endif

}  // namespace PAMA_ISA
}  // namespace pama
