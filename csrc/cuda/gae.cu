// launch_gae_cuda: one launch per call, no workspace, no atomics: the same input gives the same bits.
//
// The recursion is a scan of x -> b + a x over the valid tokens of a sequence, from its end. Within a warp (scan_warp)
// a lane holds a token; what is behind the 32 tokens enters at the last valid one as
//
//   carry = gamma v + gamma lam A   of the next valid token; behind the last, gamma bootstrap (+ the outcome score).
//
// Short sequences: a warp for each, 32 tokens at a time, objective after objective. Long ones: a block for each (and
// for each 16 objectives); a chunk of tokens is read into shared memory, warps scan segments of 32 tokens, one thread
// per objective walks over the segments, and all write the results. Either way an input is read from memory once.
#include "check.h"
#include "pama/gae.h"

namespace pama {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr int64_t kWarpTokens = 128;  // mean length up to which a warp takes a whole sequence
constexpr int kBlockObjectives = 16;
constexpr int kSharedBytes = 8 * 1024;  // of each array

struct At {
  int64_t row, col;
  __device__ At(const GaeParams& p, int64_t token) : row(p.rows == 1 ? 0 : token / p.cols), col(token - row * p.cols) {}
  __device__ At(int64_t row_, int64_t col_) : row(row_), col(col_) {}
  __device__ At behind(int64_t tokens) const { return At(row, col + tokens); }  // in the same sequence, so the same row
  __device__ int64_t in(const Plane& q) const { return row * q.row + col * q.col; }
};

template <class C>
__device__ C load(const void* data, DType dtype, int64_t at) {
  switch (dtype) {
    case DType::kFloat32: return static_cast<C>(static_cast<const float*>(data)[at]);
    case DType::kFloat64: return static_cast<C>(static_cast<const double*>(data)[at]);
    case DType::kFloat16: return static_cast<C>(to_float(static_cast<const Half*>(data)[at]));
    default: return static_cast<C>(to_float(static_cast<const BFloat16*>(data)[at]));
  }
}

template <class C>
__device__ void store(const GaeParams& p, const Planes& to, const At& at, int i, C x) {
  const int64_t k = at.row * to.row + at.col * to.col + i * to.objective;
  switch (p.dtype) {
    case DType::kFloat32: reinterpret_cast<float*>(to.data)[k] = static_cast<float>(x); return;
    case DType::kFloat64: reinterpret_cast<double*>(to.data)[k] = x; return;
    case DType::kFloat16: reinterpret_cast<Half*>(to.data)[k] = to_half(static_cast<float>(x)); return;
    default: reinterpret_cast<BFloat16*>(to.data)[k] = to_bfloat16(static_cast<float>(x));
  }
}

__device__ bool is_valid(const GaeParams& p, const At& at) {
  return !p.mask.data || is_set(p.mask.data, p.mask_dtype, at.in(p.mask));
}

// Reward, less the penalty, and value of objective i at a valid token.
template <class C>
__device__ void load_token(const GaeParams& p, const At& at, int i, C& reward, C& value) {
  value = load<C>(p.values[i].data, p.values_dtype, at.in(p.values[i]));
  reward = p.outcome ? C{0} : load<C>(p.rewards[i].data, p.rewards_dtype, at.in(p.rewards[i]));
  if (p.kl.data) reward -= load<C>(p.kl.data, p.kl_dtype, at.in(p.kl));
}

// Of the tokens of a warp, a lane each: A = b + a carry at the valid ones, and at the others that of the next valid
// one. `reward` and `value` are 0 where not valid. Returns which lanes are valid.
template <class C>
__device__ unsigned scan_warp(bool valid, C reward, C value, C gamma, C decay, C& a, C& b) {
  const int lane = threadIdx.x % 32;
  const unsigned valids = __ballot_sync(kAll, valid), above = valids & ~((2u << lane) - 1u);
  const C following = __shfl_sync(kAll, value, above ? __ffs(above) - 1 : lane);
  a = valid && above ? decay : C{1};  // the last valid token takes the carry as it is
  b = above ? reward + gamma * following - value : reward - value;
  if (!valid) b = C{0};
  for (int step = 1; step < 32; step *= 2) {
    const C a_further = __shfl_down_sync(kAll, a, step), b_further = __shfl_down_sync(kAll, b, step);
    if (lane + step < 32) {
      b += a * b_further;
      a *= a_further;
    }
  }
  return valids;
}

template <class C>
__global__ void __launch_bounds__(kThreads, 4) gae_warp_kernel(const __grid_constant__ GaeParams p) {
  const int64_t sequence = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (sequence >= p.sequences) return;
  const int lane = threadIdx.x % 32;
  const int64_t begin = p.start(sequence), end = p.start(sequence + 1);
  const At start(p, begin);
  for (int i = 0; i < p.n; ++i) {
    const C gamma = static_cast<C>(p.gamma[i]), decay = static_cast<C>(p.gamma[i] * p.lam[i]);
    C carry = static_cast<C>(p.last_term(i, sequence));
    for (int64_t to = end; to > begin; to -= 32) {
      const int64_t token = to - 32 + lane;
      const bool inside = token >= begin;
      const At at = start.behind(inside ? token - begin : 0);
      const bool valid = inside && is_valid(p, at);
      C reward{0}, value{0}, a, b;
      if (valid) load_token(p, at, i, reward, value);
      const unsigned valids = scan_warp(valid, reward, value, gamma, decay, a, b);
      const C advantage = b + a * carry;
      if (inside) {
        store(p, p.advantages, at, i, valid ? advantage : C{0});
        store(p, p.returns, at, i, valid ? advantage + value : C{0});
      }
      const int first = valids ? __ffs(valids) - 1 : 0;
      const C next_value = __shfl_sync(kAll, value, first), next_advantage = __shfl_sync(kAll, advantage, first);
      if (valids) carry = gamma * next_value + decay * next_advantage;
    }
  }
}

// Walks over a table row by row, kThreads entries at a time, without a division for each.
struct Walk {
  int row, column;
  const int columns, rows_apart, columns_apart;
  __device__ explicit Walk(int columns_)
      : row(threadIdx.x / columns_),
        column(threadIdx.x % columns_),
        columns(columns_),
        rows_apart(kThreads / columns_),
        columns_apart(kThreads % columns_) {}
  __device__ void advance() {
    row += rows_apart;
    column += columns_apart;
    if (column >= columns) column -= columns, ++row;
  }
};

// Flat: all is float32, and the entries of a sequence follow each other in memory, objectives taking turns.
template <class C, bool kFlat>
__global__ void __launch_bounds__(kThreads, 4) gae_block_kernel(const __grid_constant__ GaeParams p) {
  constexpr int kSlots = kSharedBytes / static_cast<int>(sizeof(C)), kSegments = kSlots / 32;
  __shared__ C rewards[kSlots], values[kSlots], factors[kSlots];  // rewards become b, factors are a
  __shared__ bool valid[kSlots], any[kSegments];
  __shared__ C segment_a[kSegments], segment_b[kSegments], segment_value[kSegments], carries[kSegments];
  __shared__ C carry[kBlockObjectives];

  const int blocks = (p.n + kBlockObjectives - 1) / kBlockObjectives;  // for each sequence
  const int64_t sequence = blockIdx.x / blocks;
  const int first = static_cast<int>(blockIdx.x % blocks) * kBlockObjectives;
  const int n = p.n - first < kBlockObjectives ? p.n - first : kBlockObjectives;
  const int chunk = (kSlots / n - 1) / 32 * 32, stride = chunk + 1;  // odd: no bank conflicts across objectives
  const int lane = threadIdx.x % 32;
  const int64_t begin = p.start(sequence), end = p.start(sequence + 1);
  const At start(p, begin);
  const bool objectives_adjacent = kFlat || p.advantages.objective == 1;
  if (threadIdx.x < n) carry[threadIdx.x] = static_cast<C>(p.last_term(first + threadIdx.x, sequence));

  for (int64_t to = end; to > begin; to -= chunk) {
    const int64_t from = to - chunk > begin ? to - chunk : begin;
    const int count = static_cast<int>(to - from), segments = (count + 31) / 32, padded = segments * 32;
    __syncthreads();  // the chunk before is still being written
    for (int k = threadIdx.x; k < padded; k += kThreads)
      valid[k] = k < count && is_valid(p, start.behind(from - begin + k));
    __syncthreads();
    const At origin = start.behind(from - begin);
    const C* const flat_rewards = reinterpret_cast<const C*>(p.rewards[0].data) + origin.in(p.rewards[0]);
    const C* const flat_values = reinterpret_cast<const C*>(p.values[0].data) + origin.in(p.values[0]);
    Walk in(objectives_adjacent ? n : padded);
#pragma unroll 4
    for (int e = threadIdx.x; e < padded * n; e += kThreads, in.advance()) {
      const int k = objectives_adjacent ? in.row : in.column, i = objectives_adjacent ? in.column : in.row;
      C reward{0}, value{0};
      if (kFlat && valid[k]) {
        reward = flat_rewards[e];
        value = flat_values[e];
        if (p.kl.data) reward -= load<C>(p.kl.data, p.kl_dtype, origin.behind(k).in(p.kl));
      } else if (valid[k]) {
        load_token(p, origin.behind(k), first + i, reward, value);
      }
      rewards[i * stride + k] = reward;
      values[i * stride + k] = value;
    }
    __syncthreads();
    for (int task = threadIdx.x / 32; task < n * segments; task += kWarps) {
      const int i = task % n, segment = task / n, k = segment * 32 + lane, at = i * stride + k;
      const C gamma = static_cast<C>(p.gamma[first + i]), decay = static_cast<C>(p.gamma[first + i] * p.lam[first + i]);
      C a, b;
      const unsigned valids = scan_warp(valid[k], rewards[at], values[at], gamma, decay, a, b);
      rewards[at] = b;
      factors[at] = a;
      if (lane == 0) {
        const int s = i * segments + segment;
        segment_a[s] = a;
        segment_b[s] = b;
        any[s] = valids != 0;
        segment_value[s] = values[i * stride + segment * 32 + (valids ? __ffs(valids) - 1 : 0)];
      }
    }
    __syncthreads();
    if (threadIdx.x < n) {
      const int i = threadIdx.x;
      const C gamma = static_cast<C>(p.gamma[first + i]), decay = static_cast<C>(p.gamma[first + i] * p.lam[first + i]);
      C own = carry[i];
      for (int s = (i + 1) * segments; s-- > i * segments;) {
        carries[s] = own;
        if (any[s]) own = gamma * segment_value[s] + decay * (segment_b[s] + segment_a[s] * own);
      }
      carry[i] = own;
    }
    __syncthreads();
    C* const flat_advantages =
        reinterpret_cast<C*>(p.advantages.data) + origin.row * p.advantages.row + origin.col * p.advantages.col;
    C* const flat_returns =
        reinterpret_cast<C*>(p.returns.data) + origin.row * p.returns.row + origin.col * p.returns.col;
    Walk out(objectives_adjacent ? n : count);
    for (int e = threadIdx.x; e < count * n; e += kThreads, out.advance()) {
      const int k = objectives_adjacent ? out.row : out.column, i = objectives_adjacent ? out.column : out.row;
      const int at = i * stride + k;
      const C carried = rewards[at] + factors[at] * carries[i * segments + k / 32];
      const C advantage = valid[k] ? carried : C{0}, result = valid[k] ? carried + values[at] : C{0};
      if (kFlat) {
        flat_advantages[e] = advantage;
        flat_returns[e] = result;
      } else {
        store(p, p.advantages, origin.behind(k), first + i, advantage);
        store(p, p.returns, origin.behind(k), first + i, result);
      }
    }
  }
}

// Whether the objectives of a token stand side by side, and the tokens of a sequence after each other.
bool in_turns(const Plane* planes, int n) { return n == 1 ? planes[0].col == 1 : adjacent(planes, n, DType::kFloat32); }
bool in_turns(const Planes& out, int n) { return out.col == n && (n == 1 || out.objective == 1); }

bool is_flat(const GaeParams& p) {
  constexpr DType kFloat = DType::kFloat32;
  return p.dtype == kFloat && p.rewards_dtype == kFloat && p.values_dtype == kFloat && !p.outcome &&
         p.n <= kBlockObjectives && in_turns(p.rewards, p.n) && in_turns(p.values, p.n) &&
         in_turns(p.advantages, p.n) && in_turns(p.returns, p.n);
}

const void* kernel_for(const GaeParams& p, bool warps) {
  const bool wide = p.dtype == DType::kFloat64;
  const auto any = [](auto* kernel) { return reinterpret_cast<const void*>(kernel); };
  if (warps) return wide ? any(gae_warp_kernel<double>) : any(gae_warp_kernel<float>);
  if (is_flat(p)) return any(gae_block_kernel<float, true>);
  return wide ? any(gae_block_kernel<double, false>) : any(gae_block_kernel<float, false>);
}

}  // namespace

void launch_gae_cuda(const GaeParams& params, void* stream) {
  if (params.tokens() == 0) return;
  const DeviceGuard guard(params.device.index);
  GaeParams copy = params;
  void* arguments[] = {&copy};
  const bool warps = params.tokens() <= kWarpTokens * params.sequences;
  const int64_t each = (params.n + kBlockObjectives - 1) / kBlockObjectives;
  const int64_t blocks = warps ? (params.sequences + kWarps - 1) / kWarps : params.sequences * each;
  check_cuda(cudaLaunchKernel(kernel_for(params, warps), dim3(static_cast<unsigned>(blocks)), kThreads, arguments, 0,
                              static_cast<cudaStream_t>(stream)),
             "launching the kernel of gae");
  check_cuda(cudaGetLastError(), "after launching the kernel of gae");
}

}  // namespace pama
