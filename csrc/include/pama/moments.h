// Statistics of one objective over a set of tokens, and how those of two disjoint sets merge. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "pama/combine.h"
#include "pama/hd.h"

namespace pama {

// All sums in float64. `count` is over valid finite entries, and so are mean, m2, min, max and positive; `nonzero` and
// `clipped` are over the entries that take part in the combination (the same ones unless nan = "propagate").
struct Moments {
  int64_t count, nonfinite, positive, nonzero, clipped;
  int64_t dead;     // pools of Normalize.by that give only 0
  double mean, m2;  // mean, and sum of squared deviations from it
  double active;    // sum of I(A)
  double min, max;

  static PAMA_HD Moments empty() { return {0, 0, 0, 0, 0, 0, 0.0, 0.0, 0.0, HUGE_VAL, -HUGE_VAL}; }

  PAMA_HD int64_t taken(bool propagate) const { return propagate ? count + nonfinite : count; }
  PAMA_HD PoolMoments pool(bool propagate) const {
    return {static_cast<double>(count), mean, m2, min, max, propagate && nonfinite > 0};
  }
  PAMA_HD double scalar() const { return active / static_cast<double>(count > 0 ? count : 1); }  // a_i
};

// One more finite entry of the raw input (Welford).
PAMA_HD void add(Moments& m, double x) {
  const double delta = x - m.mean;
  m.mean += delta / static_cast<double>(++m.count);
  m.m2 += delta * (x - m.mean);
  m.min = x < m.min ? x : m.min;
  m.max = x > m.max ? x : m.max;
}

// The mean and m2 of m.count entries from the sums of their deviations from a centre near the mean, and of the squares.
PAMA_HD void settle(Moments& m, double centre, double drift, double spread) {
  const double n = static_cast<double>(m.count > 0 ? m.count : 1), m2 = spread - drift * (drift / n);
  m.mean = centre + drift / n;
  m.m2 = spread == HUGE_VAL ? spread : m2 < 0.0 ? 0.0 : m2;  // squares may overflow: inf, not inf - inf
}

PAMA_HD void add_counts(Moments& into, const Moments& from) {
  into.min = from.min < into.min ? from.min : into.min;
  into.max = from.max > into.max ? from.max : into.max;
  into.count += from.count;
  into.nonfinite += from.nonfinite;
  into.positive += from.positive;
  into.nonzero += from.nonzero;
  into.clipped += from.clipped;
  into.dead += from.dead;
  into.active += from.active;
}

// Chan, Golub, LeVeque 1983: never E[x^2] - E[x]^2.
PAMA_HD void merge(Moments& into, const Moments& from) {
  if (from.count > 0) {
    const double na = static_cast<double>(into.count), nb = static_cast<double>(from.count), n = na + nb;
    const double delta = from.mean - into.mean;
    if (delta - delta == 0.0) {
      into.mean += delta * (nb / n);
      into.m2 += from.m2 + delta * (delta * (na * nb / n));  // in this order 0 where na is 0, even if delta^2 overflows
    } else {                                                 // a mean has overflowed: it stays infinite
      into.mean = into.mean - into.mean == 0.0 ? from.mean : into.mean;
      into.m2 = HUGE_VAL;
    }
  }
  add_counts(into, from);
}

// The same of many without a division for each: sums of deviations from a centre in place of the mean, of which
// gathered() makes moments.
PAMA_HD void gather(Moments& into, const Moments& from, double centre) {
  const double n = static_cast<double>(from.count), apart = from.count > 0 ? from.mean - centre : 0.0;
  into.mean += n * apart;
  into.m2 += from.m2 + n * apart * apart;
  add_counts(into, from);
}
PAMA_HD void add_gathered(Moments& into, const Moments& from) {
  into.mean += from.mean;
  into.m2 += from.m2;
  add_counts(into, from);
}

// False where squares have overflowed or the centre, the mean of `at_centre`, is too far from that of all: then
// merge().
PAMA_HD bool gathered(Moments& m, const Moments& at_centre) {
  const double spread = m.m2;
  if (at_centre.count == 0 || !(spread - spread == 0.0)) return m.count == 0;
  settle(m, at_centre.mean, m.mean, spread);
  return 4.0 * m.m2 >= spread;
}

// Writes the column of objective `i` of the packed [kStatistics, n] statistics.
template <class C>
PAMA_HD void write_statistics(const Moments& m, int i, int n, C* packed) {
  const double count = static_cast<double>(m.count);
  const double divisor = m.count > 0 ? count : 1.0;
  const double column[kStatistics] = {
      count,
      m.mean,
      m.count > 1 ? sqrt(m.m2 / (count - 1.0)) : 0.0,
      m.count > 0 ? m.min : 0.0,
      m.count > 0 ? m.max : 0.0,
      static_cast<double>(m.positive) / divisor,
      static_cast<double>(m.clipped) / static_cast<double>(m.nonzero > 0 ? m.nonzero : 1),
      m.scalar(),
      static_cast<double>(m.nonfinite),
      static_cast<double>(m.dead),
  };
  for (int k = 0; k < kStatistics; ++k) packed[k * n + i] = static_cast<C>(column[k]);
}

}  // namespace pama
