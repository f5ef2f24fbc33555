// Theorem 1 of arXiv 2508.07768: the projection of 0 onto [min a, max a], and weights that attain it. Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "pama/combine.h"
#include "pama/hd.h"
#include "pama/min_norm.h"
#include "pama/moments.h"

namespace pama {

// What the minimal and the maximal objectives get in total. `V` is a scalar or, in the CPU kernel, a SIMD vector.
template <class V>
struct Split {
  V low, high;
};

template <class V>
PAMA_HD Split<V> split(V low, V high) {
  const V zero{}, one = zero + 1;
  const V scale = high > -low ? high : -low;
  const V width = high / scale - low / scale;  // scaled first: high - low may overflow
  const auto bottom = (low > zero) | (low == high);
  const auto top = high < zero;
  return {bottom ? one : (top ? zero : high / scale / width), bottom ? zero : (top ? one : -low / scale / width)};
}

template <class V>
PAMA_HD V project(V low, V high) {
  const V zero{};
  return low > zero ? low : (high < zero ? high : zero);
}

// Which objectives take part: those with data; with skip_inactive only the active ones among them; all if none is left.
PAMA_HD uint64_t participants(uint64_t has_data, uint64_t active, bool skip_inactive, int n) {
  const uint64_t kept = skip_inactive ? has_data & active : has_data;
  if (kept) return kept;
  return has_data ? has_data : (~uint64_t{0} >> (64 - n));
}

// Replaces the scalars a[0..n) by the weights and returns s*; NaN if one of the objectives in `kept` has a NaN.
PAMA_HD double solve_closed_form(double* a, uint64_t kept, int n) {
  double low = HUGE_VAL, high = -HUGE_VAL;
  int at_low = 0, at_high = 0;
  bool undefined = false;
  for (int i = 0; i < n; ++i) {
    if (!(kept >> i & 1)) continue;
    undefined |= a[i] != a[i];
    at_low = a[i] < low ? 1 : at_low + (a[i] == low);
    at_high = a[i] > high ? 1 : at_high + (a[i] == high);
    low = a[i] < low ? a[i] : low;
    high = a[i] > high ? a[i] : high;
  }
  Split<double> share{1.0, 0.0};  // as split() says, without its divisions
  if (!(low > 0.0 || low == high)) share = high < 0.0 ? Split<double>{0.0, 1.0} : split(low, high);
  if (at_low > 1) share.low /= at_low;
  if (at_high > 1) share.high /= at_high;
  for (int i = 0; i < n; ++i) {
    const bool is_low = (kept >> i & 1) && a[i] == low, is_high = (kept >> i & 1) && a[i] == high;
    a[i] = undefined ? NAN : (is_low ? share.low : 0.0) + (is_high ? share.high : 0.0);
  }
  return undefined ? NAN : project(low, high);
}

// The same of a pool of tokens: the batch, a row, a group.
PAMA_HD uint64_t participants(const CombineParams& p, const Moments* m) {
  uint64_t has_data = 0, active = 0;
  for (int i = 0; i < p.n; ++i) {
    has_data |= uint64_t{m[i].taken(p.propagate) > 0} << i;
    active |= uint64_t{m[i].nonzero > m[i].clipped} << i;
  }
  return participants(has_data, active, p.skip_inactive, p.n);
}

// Replaces the scalars a_i of a pool by its weights, closed form or fixed, and returns s*.
PAMA_HD double solve_scalars(const CombineParams& p, const Moments* m, double* weights) {
  if (p.solver != Solver::kFixed) return solve_closed_form(weights, participants(p, m), p.n);
  double value = 0.0;
  for (int i = 0; i < p.n; ++i) {
    const double scalar = weights[i];
    weights[i] = p.fixed_weight(i);
    value += weights[i] != 0.0 ? weights[i] * scalar : 0.0;
  }
  return value;
}

// The min-norm weights of a pool from `gram`, the sums of I(A_i) I(A_j) and at [n * n] the number of tokens with data.
// Returns the norm, a root mean square.
template <class Team = Alone>
PAMA_HD double solve_vectors(const CombineParams& p, const Moments* m, const double* gram, double* scratch,
                             double* weights, Team team = {}) {
  const double tokens = gram[p.n * p.n];
  return MinNorm<Team>(gram, p.n, scratch, team).solve(participants(p, m), weights) / sqrt(tokens > 0.0 ? tokens : 1.0);
}

// As solve_scalars, from the moments alone.
PAMA_HD double solve(const CombineParams& p, const Moments* m, double* weights) {
  for (int i = 0; i < p.n; ++i) weights[i] = m[i].scalar();
  return solve_scalars(p, m, weights);
}

}  // namespace pama
