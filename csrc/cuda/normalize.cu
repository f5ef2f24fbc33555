// Groups, the moments of every pool as an affine map each, and the combination normalised at the end.
//
// A kernel for each step, one behind the other on the stream: deterministic, since what is added up is added up in a
// fixed order; only counts go through atomics. Ids are sorted by CUB, stable.
#include <algorithm>
#include <cub/device/device_radix_sort.cuh>

#include "check.h"
#include "entry.cuh"
#include "normalize.h"

namespace pama {
namespace {

constexpr int kPartials = 128;  // blocks that share one pool

// Rows by id: what is to be sorted, ids and rows, in the place of what is found in the end.
__global__ void __launch_bounds__(kThreads, 2) number_rows(const __grid_constant__ CombineParams p) {
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < p.batch;
       k += static_cast<int64_t>(gridDim.x) * kThreads) {
    const_cast<int64_t*>(p.starts)[k] = p.group_value(k);
    const_cast<int64_t*>(p.ends)[k] = k;
  }
}

// For each place in the sorted ids, at `workspace`, the first place of its group and the one behind its last.
__global__ void __launch_bounds__(kThreads, 2) find_groups(const __grid_constant__ CombineParams p) {
  const auto* ids = static_cast<const int64_t*>(p.workspace);
  const auto first_above = [&](int64_t id, bool equal) {  // or the first that is equal
    int64_t low = 0, high = p.batch;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (ids[middle] < id || (!equal && ids[middle] == id)) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < p.batch;
       k += static_cast<int64_t>(gridDim.x) * kThreads) {
    const_cast<int64_t*>(p.starts)[k] = first_above(ids[k], true);
    const_cast<int64_t*>(p.ends)[k] = first_above(ids[k], false);
  }
}

// The score of each row, a warp to a row: the sum of its valid entries, whatever they are; -0 if there are none.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) sum_rows(const __grid_constant__ CombineParams p) {
  using C = typename Storage<S>::Compute;
  const int lane = threadIdx.x % 32;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; row < p.batch;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    for (int i = 0; i < p.n; ++i) {
      double sum = 0.0, valid = 0.0;
      for (int64_t k = lane; k < p.row_tokens; k += 32) {
        const Token t = token_at(p, row * p.row_tokens + k);
        if (!t.valid) continue;
        valid += 1.0;
        sum += static_cast<double>(Storage<S>::load(element<S>(p.advantages[i], t)));
      }
      for (int offset = 16; offset > 0; offset /= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, offset);
        valid += __shfl_xor_sync(0xffffffffu, valid, offset);
      }
      if (lane == 0) static_cast<C*>(p.workspace)[row * p.n + i] = valid > 0.0 ? static_cast<C>(sum) : -C{0};
    }
  }
}

// One more sample, if it is there.
template <class S>
__device__ void add_sample(const CombineParams& p, int i, int64_t token, Moments& m) {
  using C = typename Storage<S>::Compute;
  const Token t = token_at(p, token);
  if (!t.valid) return;
  const C x = Storage<S>::load(element<S>(p.advantages[i], t));
  if (p.absent_zero && x == C{0} && signbit(x)) return;
  if (x - x == C{0}) {
    add(m, static_cast<double>(x));
  } else {
    ++m.nonfinite;
  }
}

template <class S>
__device__ void keep(const CombineParams& p, int i, int64_t pool, int64_t pools, const Moments& m) {
  using C = typename Storage<S>::Compute;
  const PoolMoments moments = m.pool(p.propagate);
  Maps<C>(static_cast<C*>(p.affine), p.n * pools).set(i * pools + pool, affine<C>(p.normalize.each, moments));
  if (is_dead(p.normalize.each, moments)) atomicAdd(reinterpret_cast<unsigned long long*>(p.dead + i), 1ull);
}

// Groups, a warp to a group.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) measure_groups(const __grid_constant__ CombineParams p) {
  const int lane = threadIdx.x % 32;
  for (int64_t group = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; group < p.groups;
       group += static_cast<int64_t>(gridDim.x) * kWarps) {
    const Rows rows = rows_of(p, group);
    for (int i = 0; i < p.n && rows.first < rows.last; ++i) {
      Moments m = Moments::empty();
      for (int64_t k = rows.first * p.row_tokens + lane; k < rows.last * p.row_tokens; k += 32)
        add_sample<S>(p, i, k, m);
      for (int offset = 16; offset > 0; offset /= 2) {
        Moments other = Moments::empty();
        other.count = static_cast<int64_t>(__shfl_xor_sync(0xffffffffu, static_cast<double>(m.count), offset));
        other.nonfinite = static_cast<int64_t>(__shfl_xor_sync(0xffffffffu, static_cast<double>(m.nonfinite), offset));
        other.mean = __shfl_xor_sync(0xffffffffu, m.mean, offset);
        other.m2 = __shfl_xor_sync(0xffffffffu, m.m2, offset);
        other.min = __shfl_xor_sync(0xffffffffu, m.min, offset);
        other.max = __shfl_xor_sync(0xffffffffu, m.max, offset);
        merge(m, other);
      }
      if (lane == 0) keep<S>(p, i, group, p.groups, m);
    }
  }
}

// The whole batch, in two steps: each of kPartials blocks its share, then one block all shares in their order.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) measure_part(const __grid_constant__ CombineParams p) {
  __shared__ Moments tree[kThreads];
  for (int i = 0; i < p.n; ++i) {
    Moments m = Moments::empty();
    for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < p.tokens();
         k += static_cast<int64_t>(gridDim.x) * kThreads)
      add_sample<S>(p, i, k, m);
    tree[threadIdx.x] = m;
    __syncthreads();
    merge_parts(tree, kThreads, 1);
    if (threadIdx.x == 0) static_cast<Moments*>(p.workspace)[blockIdx.x * p.n + i] = tree[0];
    __syncthreads();
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads, 2) measure_whole(const __grid_constant__ CombineParams p) {
  if (threadIdx.x >= p.n) return;
  Moments m = Moments::empty();
  for (int b = 0; b < kPartials; ++b) merge(m, static_cast<const Moments*>(p.workspace)[b * p.n + threadIdx.x]);
  keep<S>(p, threadIdx.x, 0, 1, m);
}

// Normalises the one objective in place; what is not there becomes 0.
template <class S>
__global__ void __launch_bounds__(kThreads, 2) rewrite(const __grid_constant__ CombineParams p) {
  using C = typename Storage<S>::Compute;
  for (int64_t k = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; k < p.tokens();
       k += static_cast<int64_t>(gridDim.x) * kThreads) {
    const Token t = token_at(p, k);
    const C x = Storage<S>::load(element<S>(p.advantages[0], t));
    const int64_t pools = p.normalize.by == Pool::kGroup ? p.groups : 1;
    const C y = Maps<C>(static_cast<C*>(p.affine), pools)[t.pool](x);
    store<S>(p.advantages[0], t, x == C{0} && signbit(x) ? C{0} : y);
  }
}

template <class Kernel>
void launch(Kernel kernel, int64_t blocks, const CombineParams& p, void* stream) {
  CombineParams copy = p;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(std::clamp<int64_t>(blocks, 1, 1 << 16)));
  check_cuda(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, kThreads, arguments, 0,
                              static_cast<cudaStream_t>(stream)),
             "launching a kernel of the normalisation");
  check_cuda(cudaGetLastError(), "after launching a kernel of the normalisation");
}

bool uses_groups(const CombineParams& p) {
  return p.normalize.by == Pool::kGroup || p.normalize.combined == Pool::kGroup || p.level == Level::kGroup;
}

// Sorts the ids at p.starts and the rows at p.ends, into `ids` and p.order; without memory, says how much it needs.
size_t sort_rows(const CombineParams& p, int64_t* ids, void* memory, size_t bytes, void* stream) {
  check_cuda(cub::DeviceRadixSort::SortPairs(memory, bytes, p.starts, ids, p.ends, const_cast<int64_t*>(p.order),
                                             p.batch, 0, 64, static_cast<cudaStream_t>(stream)),
             "sorting group_ids");
  return bytes;
}

// What sort_rows() needs, asked once for a device and a number of rows.
int64_t sort_bytes(const CombineParams& p) {
  static thread_local int64_t rows = -1, bytes = 0;
  static thread_local int device = -1;
  if (p.batch != rows || p.device.index != device) {
    const DeviceGuard guard(p.device.index);
    bytes = static_cast<int64_t>((sort_rows(p, nullptr, nullptr, 0, nullptr) + 15) / 16 * 16);
    rows = p.batch;
    device = p.device.index;
  }
  return bytes;
}

// Where everything stands, in bytes from the start.
struct Layout {
  int64_t order, starts, ends, sorted, sort, dead, partials, affine, sums, end;

  explicit Layout(const CombineParams& p) {
    const int64_t wide = p.dtype == DType::kFloat64 ? 8 : 4, groups = std::max<int64_t>(p.groups, 1);
    const int64_t ids = uses_groups(p) && p.normalize.groups == Groups::kIds ? p.batch * 8 : 0;
    const int64_t by = p.normalize.by == Pool::kNone ? 0 : p.n * (p.normalize.by == Pool::kGroup ? groups : 1);
    const int64_t combined = p.normalize.combined == Pool::kGroup ? groups : 1;
    const bool any = p.normalizes();
    order = 0;
    starts = order + ids;
    ends = starts + ids;
    sorted = ends + ids;
    sort = sorted + ids;
    dead = sort + (ids > 0 ? sort_bytes(p) : 0);
    partials = dead + (any ? kMaxObjectives * 8 : 0);
    affine = partials + (any ? kPartials * p.n * static_cast<int64_t>(sizeof(Moments)) : 0);
    sums = affine + (any ? (3 * std::max(by, combined) * wide + 7) / 8 * 8 : 0);
    end = sums + (p.normalize.row_sums ? (p.batch * p.n * wide + 7) / 8 * 8 : 0);
  }
};

// The maps of q's pools.
void measure(const CombineParams& q, void* stream) {
  with_dtype(q.dtype, [&](auto s) {
    using S = decltype(s);
    if (q.normalize.by == Pool::kGroup) return launch(measure_groups<S>, (q.groups + kWarps - 1) / kWarps, q, stream);
    launch(measure_part<S>, kPartials, q, stream);
    launch(measure_whole<S>, 1, q, stream);
  });
}

// A view of the problem whose samples are the scores of the rows, or the combined advantage.
CombineParams samples_of(const CombineParams& p, int n, const MomentRules& rules, Pool by) {
  CombineParams q = p;
  q.n = n;
  q.mask = q.log_ratio = Plane{};
  q.absent_zero = true;
  q.sums = nullptr;
  q.normalize.by = by;
  q.normalize.each = rules;
  return q;
}

}  // namespace

int64_t normalize_cuda_workspace(const CombineParams& p) { return Layout(p).end; }

void normalize_cuda(CombineParams& p, void* memory, void* stream) {
  const Layout at(p);
  char* base = static_cast<char*>(memory);
  if (uses_groups(p) && p.normalize.groups == Groups::kIds && p.batch > 0) {
    p.order = reinterpret_cast<int64_t*>(base + at.order);
    p.starts = reinterpret_cast<int64_t*>(base + at.starts);
    p.ends = reinterpret_cast<int64_t*>(base + at.ends);
    CombineParams q = p;
    q.workspace = base + at.sorted;
    const int64_t blocks = (p.batch + kThreads - 1) / kThreads;
    launch(number_rows, blocks, q, stream);
    sort_rows(q, static_cast<int64_t*>(q.workspace), base + at.sort, static_cast<size_t>(sort_bytes(p)), stream);
    launch(find_groups, blocks, q, stream);
  }
  void* sums = p.normalize.row_sums ? base + at.sums : nullptr;
  if (sums) {
    CombineParams q = p;
    q.order = nullptr;
    q.workspace = sums;
    with_dtype(p.dtype, [&](auto s) { launch(sum_rows<decltype(s)>, (p.batch + kWarps - 1) / kWarps, q, stream); });
  }
  if (p.normalizes()) {  // p.dead says where this memory is, too
    p.dead = reinterpret_cast<int64_t*>(base + at.dead);
    if (!p.measures || p.marks())
      check_cuda(cudaMemsetAsync(p.dead, 0, kMaxObjectives * 8, static_cast<cudaStream_t>(stream)), "cudaMemsetAsync");
  }
  if (p.normalize.by != Pool::kNone) {
    CombineParams q = p;
    if (sums) {
      q = samples_of(p, p.n, p.normalize.each, p.normalize.by);
      q.dtype = p.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
      q.rows = q.row_tokens = 1;
      q.cols = p.batch;
      const int64_t wide = size_of(q.dtype);
      for (int i = 0; i < p.n; ++i) q.advantages[i] = {static_cast<char*>(sums) + i * wide, 0, p.n};
    }
    q.workspace = base + at.partials;
    q.affine = base + at.affine;
    if (!p.measures) measure(q, stream);
    p.affine = base + at.affine;
  }
  p.sums = sums;
}

void normalize_combined_cuda(const CombineParams& p, void* stream) {
  if (p.normalize.combined == Pool::kNone || p.tokens() == 0) return;
  CombineParams q = samples_of(p, 1, p.normalize.last, p.normalize.combined);
  char* base = reinterpret_cast<char*>(p.dead) - Layout(p).dead;
  q.advantages[0] = p.out;
  q.workspace = base + Layout(p).partials;
  q.affine = base + Layout(p).affine;
  measure(q, stream);
  with_dtype(q.dtype, [&](auto s) { launch(rewrite<decltype(s)>, (q.tokens() + 1023) / 1024, q, stream); });
}

}  // namespace pama
