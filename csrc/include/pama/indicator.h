// Noon and the indicator I(A), for scalars and for the CPU kernel's SIMD vectors alike. Host and device.
#pragma once

#include "pama/hd.h"

namespace pama {

// max(A', floor) with floor 0 (Noon) or -inf (signed advantages); NaN stays NaN.
template <class V>
PAMA_HD V noon(V raw, V floor) {
  return raw < floor ? floor : raw;
}

// I(A): A > 0 passes if log_ratio is not above log(1 + clip_high), A < 0 if it is not below log(1 - clip_low). Else 0.
template <class V, class Mask>
PAMA_HD V gate(V advantage, Mask not_above, Mask not_below) {
  const Mask open = advantage > V{} ? not_above : not_below;
  return open ? advantage : V{};
}

}  // namespace pama
