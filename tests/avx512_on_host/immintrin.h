// AVX-512 for machines without it: the instructions that csrc/cpu/simd.h names, made of those of AVX2.
//
// Found before the compiler's header of this name, whose functions these hide in the kernels' namespace. Only results
// are imitated: what a mask leaves out is computed too.
#pragma once

#include_next <immintrin.h>

#undef _mm512_mask_cmp_ps_mask  // macros, with some compilers
#undef _mm512_mask_cmp_pd_mask

namespace pama {
namespace PAMA_ISA {

typedef int I32 __attribute__((vector_size(64)));
typedef long I64 __attribute__((vector_size(64)));
typedef unsigned char U8 __attribute__((vector_size(16)));

// A mask's bits as lanes, and back.
inline I32 lanes_of(__mmask16 bits) {
  return ((I32{} + bits) & I32{1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768}) != 0;
}
inline I64 lanes_of(__mmask8 bits) { return ((I64{} + bits) & I64{1, 2, 4, 8, 16, 32, 64, 128}) != 0; }
inline __mmask16 bits_of(I32 lanes) {
  const __m256* half = reinterpret_cast<const __m256*>(&lanes);
  return static_cast<__mmask16>(_mm256_movemask_ps(half[0]) | _mm256_movemask_ps(half[1]) << 8);
}
inline __mmask8 bits_of(I64 lanes) {
  const __m256d* half = reinterpret_cast<const __m256d*>(&lanes);
  return static_cast<__mmask8>(_mm256_movemask_pd(half[0]) | _mm256_movemask_pd(half[1]) << 4);
}

// A result under a mask, otherwise w or 0, of vectors given as V and taken as T.
#define PAMA_IMITATED(name, V, T, MASK, RESULT)           \
  inline V _mm512_mask_##name(V w, MASK mask, V a, V b) { \
    const T x = (T)a, y = (T)b;                           \
    return (V)(lanes_of(mask) ? (T)(RESULT) : (T)w);      \
  }                                                       \
  inline V _mm512_maskz_##name(MASK mask, V a, V b) { return _mm512_mask_##name(V{}, mask, a, b); }
PAMA_IMITATED(add_ps, __m512, __m512, __mmask16, x + y)
PAMA_IMITATED(min_ps, __m512, __m512, __mmask16, x < y ? x : y)
PAMA_IMITATED(max_ps, __m512, __m512, __mmask16, x > y ? x : y)
PAMA_IMITATED(add_pd, __m512d, __m512d, __mmask8, x + y)
PAMA_IMITATED(min_pd, __m512d, __m512d, __mmask8, x < y ? x : y)
PAMA_IMITATED(max_pd, __m512d, __m512d, __mmask8, x > y ? x : y)
PAMA_IMITATED(add_epi32, __m512i, I32, __mmask16, x + y)
PAMA_IMITATED(min_epi32, __m512i, I32, __mmask16, x < y ? x : y)
PAMA_IMITATED(max_epi32, __m512i, I32, __mmask16, x > y ? x : y)
PAMA_IMITATED(add_epi64, __m512i, I64, __mmask8, x + y)
PAMA_IMITATED(min_epi64, __m512i, I64, __mmask8, x < y ? x : y)
PAMA_IMITATED(max_epi64, __m512i, I64, __mmask8, x > y ? x : y)
#undef PAMA_IMITATED

inline __m512 _mm512_mask_blend_ps(__mmask16 mask, __m512 a, __m512 b) { return lanes_of(mask) ? b : a; }
inline __m512d _mm512_mask_blend_pd(__mmask8 mask, __m512d a, __m512d b) { return lanes_of(mask) ? b : a; }
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 a) { return lanes_of(mask) ? a : __m512{}; }
inline __m512d _mm512_maskz_mov_pd(__mmask8 mask, __m512d a) { return lanes_of(mask) ? a : __m512d{}; }

template <class I, class V>
inline I compared(V a, V b, int how) {
  if (how != _CMP_EQ_OQ && how != _CMP_LE_OQ) __builtin_trap();
  return how == _CMP_EQ_OQ ? (I)(a == b) : (I)(a <= b);
}
inline __mmask16 _mm512_mask_cmp_ps_mask(__mmask16 mask, __m512 a, __m512 b, int how) {
  return mask & bits_of(compared<I32>(a, b, how));
}
inline __mmask8 _mm512_mask_cmp_pd_mask(__mmask8 mask, __m512d a, __m512d b, int how) {
  return mask & bits_of(compared<I64>(a, b, how));
}
inline __mmask16 _mm512_test_epi32_mask(__m512i a, __m512i b) { return bits_of(((I32)a & (I32)b) != 0); }
inline __mmask8 _mm512_test_epi64_mask(__m512i a, __m512i b) { return bits_of(((I64)a & (I64)b) != 0); }
inline __mmask16 _mm512_mask_test_epi32_mask(__mmask16 mask, __m512i a, __m512i b) {
  return mask & _mm512_test_epi32_mask(a, b);
}
inline __mmask8 _mm512_mask_test_epi64_mask(__mmask8 mask, __m512i a, __m512i b) {
  return mask & _mm512_test_epi64_mask(a, b);
}
inline __mmask16 _mm_test_epi8_mask(__m128i a, __m128i b) {
  return static_cast<__mmask16>(_mm_movemask_epi8((__m128i)(((U8)a & (U8)b) != 0)));
}

inline __m512 _mm512_maskz_permutexvar_ps(__mmask16 mask, __m512i at, __m512 from) {
  __m512 found;
  for (int l = 0; l < 16; ++l) found[l] = from[((I32)at)[l] & 15];
  return _mm512_maskz_mov_ps(mask, found);
}
inline __m512i _mm512_maskz_cvtepu8_epi32(__mmask16 mask, __m128i bytes) {
  return (__m512i)(__builtin_convertvector((U8)bytes, I32) & lanes_of(mask));
}

}  // namespace PAMA_ISA
}  // namespace pama
