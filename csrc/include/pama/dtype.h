// Storage types and their conversion to and from the type of the arithmetic; shared by host and device.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "pama/hd.h"
#include "pama/tensor.h"

namespace pama {

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
PAMA_HD To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

PAMA_HD float to_float(Half h) {
#ifdef __CUDA_ARCH__
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
#endif
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and normalises subnormals; inf and NaN keep an all-ones exponent.
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return bit_cast<float>(sign | scaled | special);
}

PAMA_HD float to_float(BFloat16 h) { return bit_cast<float>(static_cast<uint32_t>(h.bits) << 16); }

// Round to nearest, ties to even, in both directions of the next two.
PAMA_HD Half to_half(float x) {
#ifdef __CUDA_ARCH__
  Half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
#endif
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits & 0x80000000u, magnitude = bits ^ sign;
  uint32_t out;
  if (magnitude >= 0x47800000u) {  // 65536 and above, inf, NaN
    out = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal in half: adding 0.5 aligns the last place to 2^-24
    out = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    out = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(out | (sign >> 16))};
}

PAMA_HD BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((bits >> 16) | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// Arithmetic type of a storage type, and the two conversions.
template <class S>
struct Storage {
  using Compute = S;
  static PAMA_HD S load(S x) { return x; }
  static PAMA_HD S store(S x) { return x; }
};
template <>
struct Storage<Half> {
  using Compute = float;
  static PAMA_HD float load(Half x) { return to_float(x); }
  static PAMA_HD Half store(float x) { return to_half(x); }
};
template <>
struct Storage<BFloat16> {
  using Compute = float;
  static PAMA_HD float load(BFloat16 x) { return to_float(x); }
  static PAMA_HD BFloat16 store(float x) { return to_bfloat16(x); }
};

// The largest number of type C that is <= x, and the smallest that is >= x: comparing with them is comparing with x.
template <class C>
PAMA_HD C at_most(double x) {
  const C rounded = static_cast<C>(x);
  return static_cast<double>(rounded) > x ? static_cast<C>(nextafterf(static_cast<float>(rounded), -HUGE_VALF))
                                          : rounded;
}
template <class C>
PAMA_HD C at_least(double x) {
  return -at_most<C>(-x);
}

// As store, but what is finite stays finite: Half has no number beyond 65504.
template <class S, class C>
PAMA_HD S store_finite(C x) {
  using A = typename Storage<S>::Compute;
  A y = static_cast<A>(x);
  if constexpr (std::is_same_v<S, Half>) {
    constexpr A kMost = 65504;
    if (y - y == A{0}) y = y > kMost ? kMost : y < -kMost ? -kMost : y;
  }
  return Storage<S>::store(y);
}

// Entry `at` of a floating array.
PAMA_HD double float_at(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat64: return static_cast<const double*>(data)[at];
    case DType::kFloat32: return static_cast<const float*>(data)[at];
    case DType::kFloat16: return to_float(static_cast<const Half*>(data)[at]);
    default: return to_float(static_cast<const BFloat16*>(data)[at]);
  }
}

// Entry `at` of an array of integers; the unsigned ones as their bits read when signed.
PAMA_HD int64_t integer_at(const void* data, DType dtype, int64_t at) {
  switch (size_of(dtype)) {
    case 1: return static_cast<const int8_t*>(data)[at];
    case 2: return static_cast<const int16_t*>(data)[at];
    case 4: return static_cast<const int32_t*>(data)[at];
    default: return static_cast<const int64_t*>(data)[at];
  }
}

// Whether entry `at` of a mask is valid: any bit is set, the sign of a floating zero apart.
PAMA_HD bool is_set(const void* data, DType dtype, int64_t at) {
  const bool sign = is_float(dtype);
  switch (size_of(dtype)) {
    case 1: return static_cast<const uint8_t*>(data)[at] != 0;
    case 2: return (static_cast<const uint16_t*>(data)[at] & (sign ? 0x7fff : 0xffff)) != 0;
    case 4: return (static_cast<const uint32_t*>(data)[at] & (sign ? 0x7fffffffu : 0xffffffffu)) != 0;
    default: return (static_cast<const uint64_t*>(data)[at] & (sign ? ~(uint64_t{1} << 63) : ~uint64_t{0})) != 0;
  }
}

// f(S{}) for the storage type S of a floating dtype. Always inlined: callers are compiled for different machines.
template <class F>
inline __attribute__((always_inline)) auto with_dtype(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32: return f(float{});
    case DType::kFloat64: return f(double{});
    case DType::kFloat16: return f(Half{});
    default: return f(BFloat16{});
  }
}

}  // namespace pama
