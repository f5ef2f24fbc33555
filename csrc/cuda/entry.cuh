// What the kernels of this folder share: tokens, their groups, and the entries of an objective.
#pragma once

#include "pama/combine.h"
#include "pama/indicator.h"
#include "pama/moments.h"

namespace pama {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Rows {
  int64_t first, last;
};

// Rows of a group, in grouped order. Offsets on a GPU are not looked at beforehand, so they are kept within the batch.
// Groups by ids are numbered by their first row in that order: the other numbers have none.
__device__ inline Rows rows_of(const CombineParams& p, int64_t group) {
  switch (p.normalize.groups) {
    case Groups::kSize: return {group * p.normalize.group_size, (group + 1) * p.normalize.group_size};
    case Groups::kIds: return {group, p.starts[group] == group ? p.ends[group] : group};
    default:
      return {max(int64_t{0}, min(p.batch, p.group_value(group))),
              max(int64_t{0}, min(p.batch, p.group_value(group + 1)))};
  }
}

__device__ inline int64_t group_of(const CombineParams& p, int64_t row) {
  if (p.normalize.groups == Groups::kSize) return row / p.normalize.group_size;
  if (p.normalize.groups == Groups::kIds) return p.starts[row];
  int64_t low = 0, high = p.groups;  // the last group that starts at or before the row
  while (high - low > 1) {
    const int64_t middle = low + (high - low) / 2;
    if (p.group_value(middle) <= row) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

struct Token {
  int64_t row, col;  // in the planes
  int64_t source;    // row of the tensors
  int64_t pool;      // of Normalize.by
  bool valid, not_above, not_below;
};

template <class T>
__device__ T element(const Plane& q, const Token& t) {
  return reinterpret_cast<const T*>(q.data)[t.row * q.row + t.col * q.col];
}

__device__ inline bool is_valid(const CombineParams& p, const Token& t) {
  return !p.mask.data || is_set(p.mask.data, p.mask_dtype, t.row * p.mask.row + t.col * p.mask.col);
}

__device__ inline double log_ratio_at(const CombineParams& p, const Token& t) {
  return float_at(p.log_ratio.data, p.log_ratio_dtype, t.row * p.log_ratio.row + t.col * p.log_ratio.col);
}

// gates: whether anyone asks for not_above and not_below.
__device__ inline Token token_at(const CombineParams& p, int64_t index, bool gates = true) {
  Token t;
  if (p.order || p.affine || p.sums) {
    const int64_t row = index / p.row_tokens, col = index - row * p.row_tokens;
    t.source = p.row_at(row);
    t.row = p.rows == 1 ? 0 : t.source;
    t.col = p.rows == 1 ? t.source * p.row_tokens + col : col;
    t.pool = p.affine && p.normalize.by == Pool::kGroup ? group_of(p, row) : 0;
  } else {
    t.row = p.rows == 1 ? 0 : index / p.cols;
    t.col = index - t.row * p.cols;
  }
  t.valid = is_valid(p, t);
  t.not_above = t.not_below = true;
  if (gates && t.valid && p.log_ratio.data) {
    const double log_u = log_ratio_at(p, t);
    t.not_above = log_u <= p.log_high;
    t.not_below = log_u >= p.log_low;
  }
  return t;
}

template <class S>
__device__ typename Storage<S>::Compute sample_at(const CombineParams& p, int i, const Token& t) {
  using C = typename Storage<S>::Compute;
  if (p.sums) return static_cast<const C*>(p.sums)[t.source * p.n + i];
  return Storage<S>::load(element<S>(p.advantages[i], t));
}

// part[k * n + i] for all k, at most kThreads, merged into part[i] by a fixed tree.
struct Merge {
  __device__ void operator()(Moments& into, const Moments& from) const { merge(into, from); }
};
template <class F = Merge>
__device__ __forceinline__ void merge_parts(Moments* part, int count, int n, F merge_two = {}) {
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (width >= count) continue;
    for (int e = threadIdx.x; e < (count - width) * n; e += kThreads) merge_two(part[e], part[e + width * n]);
    __syncthreads();
    count = width;
  }
}

template <class S, class C>
__device__ void store(const Plane& q, const Token& t, C value) {
  reinterpret_cast<S*>(q.data)[t.row * q.row + t.col * q.col] = Storage<S>::store(value);
}

// -0 marks the tokens without data, so a combination must not round to it.
template <class S, class C>
__device__ void store_marked(const Plane& q, const Token& t, C value, bool present) {
  S rounded = Storage<S>::store(value);
  const C back = Storage<S>::load(rounded);
  if (back == C{0}) rounded = Storage<S>::store(present ? C{0} : -C{0});
  reinterpret_cast<S*>(q.data)[t.row * q.row + t.col * q.col] = rounded;
}

}  // namespace pama
