// The point of least norm in the convex hull of n vectors, from their Gram matrix: Wolfe, Finding the nearest point in
// a polytope, Mathematical Programming 11 (1976). Host and device.
#pragma once

#include <cmath>
#include <cstdint>

#include "pama/combine.h"
#include "pama/hd.h"

namespace pama {

// Doubles of scratch memory that a problem of n vectors wants.
PAMA_HD constexpr int64_t min_norm_scratch(int n) { return (2 * static_cast<int64_t>(n) + 5) * n; }

// min c'Gc over the simplex. In the variables u_k = c_k d_k with d_k = sqrt(G_kk), in units of the smallest d, it
// reads: min u'Ru with b'u = 1 and u >= 0, where R has a unit diagonal and b_k = d_min / d_k. So vectors may differ by
// many orders of magnitude. The diagonal is raised by 2^-42: then the minimum is unique even where that of G is not.
class MinNorm {
 public:
  __host__ __device__ MinNorm(const double* gram_, int n_, double* scratch)
      : gram(gram_),
        n(n_),
        r(scratch),
        l(r + n * n),
        b(l + n * n),
        u(b + n),
        y(u + n),
        size(y + n),
        extreme(size + n) {}

  // Weights of all n (0 for those not in `kept`); returns the norm. All NaN if the kept part of G is not finite.
  __host__ __device__ double solve(uint64_t kept, double* weights) {
    m = 0;
    bool undefined = false;
    int zeros = 0;
    for (int i = 0; i < n; ++i) {
      weights[i] = 0.0;
      if (!(kept >> i & 1)) continue;
      index[m++] = static_cast<uint8_t>(i);
      zeros += entry(i, i) <= 0.0;
    }
    for (int k = 0; k < m; ++k)
      for (int j = k; j < m; ++j) undefined |= !(entry(index[k], index[j]) - entry(index[k], index[j]) == 0.0);
    if (undefined) {
      for (int i = 0; i < n; ++i) weights[i] = NAN;
      return NAN;
    }
    if (zeros > 0) {
      for (int k = 0; k < m; ++k) weights[index[k]] = entry(index[k], index[k]) <= 0.0 ? 1.0 / zeros : 0.0;
      return 0.0;
    }
    if (m == 0) return 0.0;
    sort();
    scale();
    iterate();
    share_duplicates();
    double total = 0.0;
    for (int k = 0; k < m; ++k) total += u[k] * b[k];
    for (int k = 0; k < m; ++k) weights[index[k]] = u[k] * b[k] / total;
    return norm(weights);
  }

 private:
  __host__ __device__ double entry(int i, int j) const { return gram[i < j ? i * n + j : j * n + i]; }

  // An order that does not depend on how the vectors are numbered: permuted problems are the same to the last bit.
  __host__ __device__ void sort() {
    for (int k = 0; k < m; ++k) {
      double most = -HUGE_VAL, least = HUGE_VAL;
      for (int j = 0; j < m; ++j) {
        if (j == k) continue;
        const double e = entry(index[k], index[j]);
        most = e > most ? e : most;
        least = e < least ? e : least;
      }
      size[index[k]] = most;
      extreme[index[k]] = least;
    }
    for (int k = 1; k < m; ++k) {
      const uint8_t now = index[k];
      int j = k;
      for (; j > 0 && before(now, index[j - 1]); --j) index[j] = index[j - 1];
      index[j] = now;
    }
  }

  __host__ __device__ bool before(int i, int j) const {
    const double a = entry(i, i), c = entry(j, j);
    if (a != c) return a < c;
    return size[i] != size[j] ? size[i] > size[j] : extreme[i] < extreme[j];
  }

  __host__ __device__ void scale() {
    constexpr double kRidge = 1.0 + 0x1p-42;
    const double least = sqrt(entry(index[0], index[0]));
    for (int k = 0; k < m; ++k) size[k] = sqrt(entry(index[k], index[k]));
    for (int k = 0; k < m; ++k) {
      b[k] = least / size[k];
      u[k] = 0.0;
      r[k * n + k] = kRidge;
      for (int j = 0; j < k; ++j) r[k * n + j] = r[j * n + k] = entry(index[k], index[j]) / size[k] / size[j];
    }
  }

  __host__ __device__ void iterate() {
    u[0] = 1.0;
    members = 0;
    append(0);
    double value = r[0];
    int idle = 0;
    for (int round = 0; round < 20 * m + 20; ++round) {
      int worst = -1;
      double steepest = 0.0, sum = 0.0;
      for (int k = 0; k < members; ++k) sum += u[support[k]];
      for (int j = 0; j < m; ++j) {
        if (u[j] > 0.0) continue;
        double slope = -value * b[j];
        for (int k = 0; k < members; ++k) slope += r[j * n + support[k]] * u[support[k]];
        const double rounding = 4.0 * m * 0x1p-53 * (sum + value * b[j]);
        if (slope < -rounding && slope < steepest) steepest = slope, worst = j;
      }
      if (worst < 0 || !append(worst)) return;
      descend();
      double next = 0.0;
      for (int k = 0; k < members; ++k)
        for (int j = 0; j < members; ++j) next += u[support[k]] * r[support[k] * n + support[j]] * u[support[j]];
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
      for (int k = 0; k < members; ++k) {
        const double from = u[support[k]];
        if (y[k] <= 0.0 && from / (from - y[k]) < step) step = from / (from - y[k]);
      }
      if (step >= 1.0) {
        bool all = true;
        for (int k = 0; k < members; ++k) all &= y[k] > 0.0;
        if (all) {
          for (int k = 0; k < members; ++k) u[support[k]] = y[k];
          return;
        }
      }
      int left = 0;
      for (int k = 0; k < members; ++k) {
        const int j = support[k];
        const double to = u[j] + step * (y[k] - u[j]);
        const bool leaves = y[k] <= 0.0 && (to <= 0.0 || u[j] / (u[j] - y[k]) <= step);
        u[j] = leaves ? 0.0 : to;
        if (!leaves) support[left++] = support[k];
      }
      const int kept = left;
      members = 0;
      for (int k = 0; k < kept; ++k) append(support[k]);
    }
  }

  // y = z / b'z with Rz = b on the support.
  __host__ __device__ void affine_minimum() {
    for (int k = 0; k < members; ++k) {
      double rest = b[support[k]];
      for (int j = 0; j < k; ++j) rest -= l[k * n + j] * y[j];
      y[k] = rest / l[k * n + k];
    }
    double total = 0.0;
    for (int k = members - 1; k >= 0; --k) {
      for (int j = k + 1; j < members; ++j) y[k] -= l[j * n + k] * y[j];
      y[k] /= l[k * n + k];
      total += y[k] * b[support[k]];
    }
    for (int k = 0; k < members; ++k) y[k] /= total;
  }

  // One more row of the Cholesky factor of R on the support; false if j depends on those that are there.
  __host__ __device__ bool append(int j) {
    const int k = members;
    double rest = r[j * n + j];
    for (int i = 0; i < k; ++i) {
      double e = r[j * n + support[i]];
      for (int h = 0; h < i; ++h) e -= l[k * n + h] * l[i * n + h];
      e /= l[i * n + i];
      l[k * n + i] = e;
      rest -= e * e;
    }
    if (rest < 0x1p-45) return false;
    l[k * n + k] = sqrt(rest);
    support[k] = static_cast<uint8_t>(j);
    members = k + 1;
    return true;
  }

  // What the Gram matrix cannot tell from each other gets the same.
  __host__ __device__ void share_duplicates() {
    for (int k = 0; k < m; ++k) y[k] = 0.0;  // 1 once shared
    for (int k = 0; k < m; ++k) {
      if (y[k] != 0.0) continue;
      int count = 0;
      double total = 0.0;
      for (int j = k; j < m; ++j)
        if (j == k || same(k, j)) total += u[j], ++count;
      for (int j = m - 1; count > 1 && j >= k; --j)
        if (j == k || same(k, j)) u[j] = total / count, y[j] = 1.0;
    }
  }

  __host__ __device__ bool same(int k, int j) const {
    constexpr double kRounding = 8.0 * 0x1p-52;
    return r[k * n + j] >= 1.0 - kRounding && fabs(b[k] - b[j]) <= kRounding * b[k];
  }

  __host__ __device__ double norm(const double* c) const {
    double square = 0.0;
    for (int i = 0; i < n; ++i)
      for (int j = 0; j < n; ++j)
        if (c[i] != 0.0 && c[j] != 0.0) square += c[i] * (entry(i, j) * c[j]);
    return square > 0.0 ? sqrt(square) : 0.0;
  }

  const double* gram;  // [n, n], of which the upper triangle is read
  const int n;
  double *r, *l;  // [n, n]: R, and the Cholesky factor of its part on the support
  double *b, *u, *y, *size, *extreme;
  int m = 0, members = 0;
  uint8_t index[64], support[64];
};

// Problem k of a batch; `scratch` has min_norm_scratch(n) + n * n + n doubles.
__host__ __device__ inline void solve_min_norm(const MinNormParams& p, int64_t k, double* scratch) {
  double *gram = scratch + min_norm_scratch(p.n), *weights = gram + p.n * p.n;
  for (int i = 0; i < p.n; ++i) {
    for (int j = 0; j < p.n; ++j) {
      const int64_t at = k * p.strides[0] + i * p.strides[1] + j * p.strides[2];
      gram[i * p.n + j] = float_at(p.gramian, p.dtype, at);
    }
  }
  MinNorm(gram, p.n, scratch).solve(~uint64_t{0} >> (64 - p.n), weights);
  for (int i = 0; i < p.n; ++i) {
    if (p.dtype == DType::kFloat64)
      static_cast<double*>(p.weights)[k * p.n + i] = weights[i];
    else
      static_cast<float*>(p.weights)[k * p.n + i] = static_cast<float>(weights[i]);
  }
}

}  // namespace pama
