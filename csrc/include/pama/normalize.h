// How samples are normalised over a pool of them: the rules, and the affine map that a pool's moments give. Host and
// device.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include "pama/hd.h"

namespace pama {

enum class Pool : uint8_t { kNone, kBatch, kGroup };
enum class Groups : uint8_t { kNone, kSize, kIds, kOffsets };

// (x - mean) / (std + eps), or / sqrt(std^2 + eps); see pama_ext.Normalize.
struct MomentRules {
  bool center = true, scale = true, eps_in_variance = false, raw_singleton = false;
  double correction = 1.0, eps = 0.0;
};

struct NormalizeOptions {
  Pool by = Pool::kNone, combined = Pool::kNone;
  Groups groups = Groups::kNone;
  int64_t group_size = 0;
  bool row_sums = false;   // a row's samples are one: the sum of its valid tokens
  MomentRules each, last;  // for `by` and for `combined`

  NormalizeOptions() = default;
  explicit NormalizeOptions(const std::string& spelled);  // Normalize._spec, or empty
};

// x -> (x - high - low) * factor. The mean is split in two so that what is left of 1000.005 - 1000 keeps its digits.
template <class C>
struct Affine {
  C high, low, factor;

  PAMA_HD C operator()(C x) const { return (x - high - low) * factor; }
};

// Many of them, each member on its own.
template <class C>
struct Maps {
  C *high = nullptr, *low = nullptr, *factor = nullptr;

  PAMA_HD Maps(C* memory, int64_t count)
      : high(memory), low(memory ? memory + count : nullptr), factor(memory ? memory + 2 * count : nullptr) {}
  PAMA_HD Affine<C> operator[](int64_t k) const { return {high[k], low[k], factor[k]}; }
  PAMA_HD void set(int64_t k, const Affine<C>& f) const { high[k] = f.high, low[k] = f.low, factor[k] = f.factor; }
};

struct PoolMoments {
  double count, mean, m2, min, max;
  bool broken;  // a non-finite sample takes part
};

PAMA_HD bool is_dead(const MomentRules& rules, const PoolMoments& m) {
  if (m.broken || !(rules.center || rules.scale)) return false;
  return (m.count == 1.0 && !rules.raw_singleton) || (m.count > 1.0 && m.min == m.max);
}

template <class C>
PAMA_HD Affine<C> affine(const MomentRules& rules, const PoolMoments& m) {
  if (!(rules.center || rules.scale)) return {C{0}, C{0}, C{1}};
  if (m.broken) return {static_cast<C>(NAN), C{0}, C{0}};
  if (is_dead(rules, m)) return {static_cast<C>(m.min), C{0}, C{0}};
  const bool raw = m.count == 1.0;
  const double mean = rules.center && !raw ? m.mean : 0.0;
  const double divisor = m.count > rules.correction ? m.count - rules.correction : 1.0;
  const double variance = raw ? 1.0 : m.m2 / divisor;
  const double deviation = rules.eps_in_variance ? sqrt(variance + rules.eps) : sqrt(variance) + rules.eps;
  const C high = static_cast<C>(mean);
  return {high, static_cast<C>(mean - static_cast<double>(high)), static_cast<C>(rules.scale ? 1.0 / deviation : 1.0)};
}

}  // namespace pama
