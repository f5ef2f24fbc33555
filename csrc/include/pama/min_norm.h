// The point of least norm in the convex hull of n vectors, from their Gram matrix: Wolfe, Finding the nearest point in
// a polytope, Mathematical Programming 11 (1976). Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "pama/combine.h"
#include "pama/hd.h"

namespace pama {

// Doubles of scratch memory that a problem of n vectors wants.
PAMA_HD constexpr int64_t min_norm_scratch(int n) { return (2 * static_cast<int64_t>(n) + 6) * n; }

// Who works on a problem: one thread, or lanes of a warp (cuda/warp.cuh).
struct Alone {
  static constexpr bool first = true;  // of the team
  // f(k) for all k of [begin, end), each called by one of the team.
  template <class F>
  PAMA_HD static void each(int begin, int end, F f) {
    for (int k = begin; k < end; ++k) f(k);
  }
  PAMA_HD static void sync() {}
  PAMA_HD static double sum(double x) { return x; }
  PAMA_HD static double least(double x) { return x; }
  PAMA_HD static bool any(bool x) { return x; }
  PAMA_HD static void find_least(double, int&) {}  // `at` of whoever has the least x; of several the least `at`
};

// min c'Gc over the simplex. In the variables u_k = c_k d_k with d_k = sqrt(G_kk), in units of the smallest d, it
// reads: min u'Ru with b'u = 1 and u >= 0, where R has a unit diagonal and b_k = d_min / d_k. So vectors may differ by
// many orders of magnitude. The diagonal is raised by 2^-42: then the minimum is unique even where that of G is not.
//
// What stands in memory is the whole team's: between two syncs each place is left to one of it, or read by all. What
// stands in a variable is the same for all where it decides what comes next.
template <class Team = Alone>
class MinNorm {
 public:
  __host__ __device__ MinNorm(const double* gram_, int n_, double* scratch, Team team_ = {})
      : gram(gram_),
        n(n_),
        r(scratch),
        l(r + n * n),
        b(l + n * n),
        u(b + n),
        y(u + n),
        size(y + n),
        extreme(size + n),
        index(reinterpret_cast<int*>(extreme + n)),
        support(index + n),
        team(team_) {}

  // Weights of all n (0 for those not in `kept`); returns the norm. All NaN if the kept part of G is not finite.
  __host__ __device__ double solve(uint64_t kept, double* weights) {
    int zeros = 0;
    m = 0;
    for (int i = 0; i < n; ++i) {
      if (team.first) weights[i] = 0.0;
      if (!(kept >> i & 1)) continue;
      if (team.first) index[m] = i;
      zeros += entry(i, i) <= 0.0;
      ++m;
    }
    team.sync();
    bool undefined = false;
    team.each(0, m, [&](int k) {
      for (int j = k; j < m; ++j) undefined |= !(entry(index[k], index[j]) - entry(index[k], index[j]) == 0.0);
    });
    if (team.any(undefined)) {
      team.each(0, n, [&](int i) { weights[i] = NAN; });
      team.sync();
      return NAN;
    }
    if (zeros > 0) {
      team.each(0, m, [&](int k) { weights[index[k]] = entry(index[k], index[k]) <= 0.0 ? 1.0 / zeros : 0.0; });
      team.sync();
      return 0.0;
    }
    if (m == 0) return 0.0;
    sort();
    scale();
    iterate();
    share_duplicates();
    double total = 0.0;
    team.each(0, m, [&](int k) { total += u[k] * b[k]; });
    total = team.sum(total);
    team.each(0, m, [&](int k) { weights[index[k]] = u[k] * b[k] / total; });
    team.sync();
    return norm(weights);
  }

 private:
  __host__ __device__ double entry(int i, int j) const { return gram[i < j ? i * n + j : j * n + i]; }

  // An order that does not depend on how the vectors are numbered: permuted problems are the same to the last bit.
  __host__ __device__ void sort() {
    double* const length = y;
    team.each(0, m, [&](int k) {
      double most = -HUGE_VAL, least = HUGE_VAL;
      for (int j = 0; j < m; ++j) {
        if (j == k) continue;
        const double e = entry(index[k], index[j]);
        most = e > most ? e : most;
        least = e < least ? e : least;
      }
      length[k] = entry(index[k], index[k]);
      size[k] = most;
      extreme[k] = least;
    });
    team.sync();
    const auto before = [&](int i, int j) {
      if (length[i] != length[j]) return length[i] < length[j];
      if (size[i] != size[j]) return size[i] > size[j];
      return extreme[i] != extreme[j] ? extreme[i] < extreme[j] : i < j;
    };
    team.each(0, m, [&](int k) {
      int place = 0;
      for (int j = 0; j < m; ++j) place += before(j, k);
      support[place] = index[k];
    });
    team.sync();
    team.each(0, m, [&](int k) { index[k] = support[k]; });
  }

  __host__ __device__ void scale() {
    constexpr double kRidge = 1.0 + 0x1p-42;
    team.each(0, m, [&](int k) { size[k] = sqrt(entry(index[k], index[k])); });
    team.sync();
    team.each(0, m, [&](int k) {
      b[k] = size[0] / size[k];
      u[k] = k == 0 ? 1.0 : 0.0;
      r[k * n + k] = kRidge;
      for (int j = 0; j < k; ++j) r[k * n + j] = r[j * n + k] = entry(index[k], index[j]) / size[k] / size[j];
    });
    team.sync();
  }

  __host__ __device__ void iterate() {
    members = 0;
    append(0);
    double value = r[0];
    int idle = 0;
    for (int round = 0; round < 20 * m + 20; ++round) {
      int worst = -1;
      double steepest = 0.0, sum = 0.0;
      for (int k = 0; k < members; ++k) sum += u[support[k]];
      team.each(0, m, [&](int j) {
        if (u[j] > 0.0) return;
        double slope = -value * b[j];
        for (int k = 0; k < members; ++k) slope += r[j * n + support[k]] * u[support[k]];
        const double rounding = 4.0 * m * 0x1p-53 * (sum + value * b[j]);
        if (slope < -rounding && slope < steepest) steepest = slope, worst = j;
      });
      team.find_least(steepest, worst);
      if (worst < 0 || !append(worst)) return;
      descend();
      double next = 0.0;
      team.each(0, members, [&](int k) {
        for (int j = 0; j < members; ++j) next += u[support[k]] * r[support[k] * n + support[j]] * u[support[j]];
      });
      next = team.sum(next);
      // Long vectors gain less than rounding shows, so standing still ends it only after everyone has had a turn.
      idle = next < value ? 0 : idle + 1;
      if (idle > m) return;
      value = next < value ? next : value;
    }
  }

  // To the least point of the support's affine hull; whoever would be negative leaves on the way.
  __host__ __device__ void descend() {
    while (members > 0) {
      affine_minimum();
      double step = 1.0;
      bool inside = true;
      team.each(0, members, [&](int k) {
        const double from = u[support[k]];
        inside &= y[k] > 0.0;
        if (y[k] <= 0.0 && from / (from - y[k]) < step) step = from / (from - y[k]);
      });
      step = team.least(step);
      if (step >= 1.0 && !team.any(!inside)) {
        team.each(0, members, [&](int k) { u[support[k]] = y[k]; });
        team.sync();
        return;
      }
      team.each(0, members, [&](int k) {
        double& now = u[support[k]];
        const double to = now + step * (y[k] - now);
        const bool leaves = !(y[k] > 0.0) && !(to > 0.0 && now / (now - y[k]) > step);  // NaN, too: it has to end
        now = leaves ? 0.0 : to;
        y[k] = leaves ? 0.0 : 1.0;
      });
      team.sync();
      int kept = 0;
      for (int k = 0; k < members; ++k) {
        if (y[k] == 0.0) continue;
        if (team.first) support[kept] = support[k];
        ++kept;
      }
      team.sync();
      members = 0;
      for (int k = 0; k < kept; ++k) append(support[k]);
    }
  }

  // y = z / b'z with Rz = b on the support.
  __host__ __device__ void affine_minimum() {
    team.each(0, members, [&](int k) { y[k] = b[support[k]]; });
    team.sync();
    for (int k = 0; k < members; ++k) {
      const double known = y[k] * l[k * n + k];
      team.each(k + 1, members, [&](int j) { y[j] -= l[j * n + k] * known; });
      team.sync();
    }
    team.each(0, members, [&](int k) { y[k] *= l[k * n + k]; });
    team.sync();
    double total = 0.0;
    for (int k = members - 1; k >= 0; --k) {
      const double known = y[k] * l[k * n + k];
      total += known * b[support[k]];
      team.each(0, k, [&](int j) { y[j] -= l[k * n + j] * known; });
      team.sync();
    }
    team.each(0, members, [&](int k) { y[k] = y[k] * l[k * n + k] / total; });
  }

  // One more row of the Cholesky factor of R on the support, its diagonal inverted; false if j depends on those that
  // are there.
  __host__ __device__ bool append(int j) {
    const int k = members;
    double* const row = l + k * n;
    team.each(0, k, [&](int i) { row[i] = r[j * n + support[i]]; });
    team.sync();
    double rest = r[j * n + j];
    for (int h = 0; h < k; ++h) {
      const double e = row[h] * l[h * n + h];
      rest -= e * e;
      team.each(h + 1, k, [&](int i) { row[i] -= e * l[i * n + h]; });
      team.sync();
    }
    if (rest < 0x1p-45) return false;
    team.each(0, k, [&](int i) { row[i] *= l[i * n + i]; });
    if (team.first) row[k] = 1.0 / sqrt(rest), support[k] = j;
    team.sync();
    members = k + 1;
    return true;
  }

  // What the Gram matrix cannot tell from each other gets the same.
  __host__ __device__ void share_duplicates() {
    bool some = false;
    team.each(0, m, [&](int k) {
      for (int j = k + 1; j < m; ++j) some |= same(k, j);
    });
    if (!team.any(some)) return;
    team.sync();
    for (int k = 0; k < m && team.first; ++k) y[k] = 0.0;  // 1 once shared
    for (int k = 0; k < m && team.first; ++k) {
      if (y[k] != 0.0) continue;
      int count = 0;
      double total = 0.0;
      for (int j = k; j < m; ++j)
        if (j == k || same(k, j)) total += u[j], ++count;
      for (int j = m - 1; count > 1 && j >= k; --j)
        if (j == k || same(k, j)) u[j] = total / count, y[j] = 1.0;
    }
    team.sync();
  }

  __host__ __device__ bool same(int k, int j) const {
    constexpr double kRounding = 8.0 * 0x1p-52;
    return r[k * n + j] >= 1.0 - kRounding && fabs(b[k] - b[j]) <= kRounding * b[k];
  }

  __host__ __device__ double norm(const double* c) const {
    double square = 0.0;
    team.each(0, n, [&](int i) {
      for (int j = 0; j < n; ++j)
        if (c[i] != 0.0 && c[j] != 0.0) square += c[i] * (entry(i, j) * c[j]);
    });
    square = team.sum(square);
    return square > 0.0 ? sqrt(square) : 0.0;
  }

  const double* gram;  // [n, n], of which the upper triangle is read
  const int n;
  double *r, *l;  // [n, n]: R, and the Cholesky factor of its part on the support
  double *b, *u, *y, *size, *extreme;
  int *index, *support;
  const Team team;
  int m = 0, members = 0;
};

// Problem k of a batch; `scratch` has min_norm_problem(n) doubles.
PAMA_HD constexpr int64_t min_norm_problem(int n) { return min_norm_scratch(n) + (n + 1) * static_cast<int64_t>(n); }

template <class Team = Alone>
__host__ __device__ void solve_min_norm(const MinNormParams& p, int64_t k, double* scratch, Team team = {}) {
  double *gram = scratch + min_norm_scratch(p.n), *weights = gram + p.n * p.n;
  team.each(0, p.n, [&](int j) {
    for (int i = 0; i < p.n; ++i)
      gram[i * p.n + j] = float_at(p.gramian, p.dtype, k * p.strides[0] + i * p.strides[1] + j * p.strides[2]);
  });
  team.sync();
  MinNorm<Team>(gram, p.n, scratch, team).solve(~uint64_t{0} >> (64 - p.n), weights);
  team.each(0, p.n, [&](int i) {
    if (p.dtype == DType::kFloat64)
      static_cast<double*>(p.weights)[k * p.n + i] = weights[i];
    else
      static_cast<float*>(p.weights)[k * p.n + i] = static_cast<float>(weights[i]);
  });
  team.sync();
}

}  // namespace pama
