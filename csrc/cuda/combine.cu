// launch_combine_cuda: one launch per call, at every level and size.
//
// Tokens are dealt to blocks in equal runs (level "sequence": rows, round robin), and within a block to threads one
// after the other. Statistics go thread -> block (a tree in shared memory) -> grid (through the workspace and one grid
// barrier, in block order): no atomics, so the same input on the same device gives the same bits. A single block needs
// no grid barrier and is launched as an ordinary kernel, more than one as a cooperative kernel.
#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>

#include "check.h"
#include "pama/indicator.h"
#include "pama/moments.h"
#include "pama/solve.h"

namespace pama {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
static_assert(kThreads >= kMaxObjectives + 2, "one thread per objective, and two for the sums at level token");
constexpr int kTokensPerThread = 4;             // before another block is worth its share of the barrier
constexpr int64_t kSingleBlockElements = 8192;  // up to here one block alone is faster
constexpr int kBlocksPerSM = 2;

// Per block in the workspace: the moments of each objective, then at level "token" the sums of c_i, of s* and of
// tokens.
__host__ __device__ constexpr int64_t block_bytes(int n) {
  return n * static_cast<int64_t>(sizeof(Moments)) + (n + 2) * static_cast<int64_t>(sizeof(double));
}

struct Shared {
  Moments tree[kThreads];
  Moments pool[kMaxObjectives];   // of the batch, or of the row at hand
  Moments total[kMaxObjectives];  // of all rows of this block
  double weights[kMaxObjectives];
  double value;
  double warp_sums[kWarps][kMaxObjectives + 2];
};

struct Token {
  int64_t row, col;
  bool valid, not_above, not_below;
};

template <class T>
__device__ T element(const Plane& q, const Token& t) {
  return reinterpret_cast<const T*>(q.data)[t.row * q.row + t.col * q.col];
}

// The mask as it is: an entry is valid if any bit is set, the sign of a floating zero apart.
__device__ bool is_valid(const CombineParams& p, const Token& t) {
  if (!p.mask.data) return true;
  const bool sign = is_float(p.mask_dtype);
  switch (size_of(p.mask_dtype)) {
    case 1: return element<uint8_t>(p.mask, t) != 0;
    case 2: return (element<uint16_t>(p.mask, t) & (sign ? 0x7fff : 0xffff)) != 0;
    case 4: return (element<uint32_t>(p.mask, t) & (sign ? 0x7fffffffu : 0xffffffffu)) != 0;
    default: return (element<uint64_t>(p.mask, t) & (sign ? ~(uint64_t{1} << 63) : ~uint64_t{0})) != 0;
  }
}

__device__ double log_ratio_at(const CombineParams& p, const Token& t) {
  switch (p.log_ratio_dtype) {
    case DType::kFloat32: return element<float>(p.log_ratio, t);
    case DType::kFloat64: return element<double>(p.log_ratio, t);
    case DType::kFloat16: return to_float(element<Half>(p.log_ratio, t));
    default: return to_float(element<BFloat16>(p.log_ratio, t));
  }
}

__device__ Token token_at(const CombineParams& p, int64_t index) {
  Token t;
  t.row = p.rows == 1 ? 0 : index / p.cols;
  t.col = index - t.row * p.cols;
  t.valid = is_valid(p, t);
  t.not_above = t.not_below = true;
  if (t.valid && p.log_ratio.data) {
    const double log_u = log_ratio_at(p, t);
    t.not_above = log_u <= p.log_high;
    t.not_below = log_u >= p.log_low;
  }
  return t;
}

template <class C>
struct Entry {
  C raw, noon, advantage, gated;  // A', A before and after reward_weights, I(A); 0 where not taken
  bool finite, taken;
};

// Objective i at a token; memory behind the mask is not even read.
template <class S, class C>
__device__ Entry<C> entry_at(const CombineParams& p, int i, const Token& t, C scale) {
  Entry<C> e{};
  if (!t.valid) return e;
  const C raw = Storage<S>::load(element<S>(p.advantages[i], t));
  e.finite = raw - raw == C{0};
  e.taken = e.finite || p.propagate;
  if (!e.taken) return e;
  e.raw = raw;
  e.noon = noon(raw, p.noon ? C{0} : -static_cast<C>(HUGE_VAL));
  e.advantage = e.noon * scale;
  e.gated = gate(e.advantage, t.not_above, t.not_below);
  return e;
}

// Sum of `mine` over the block, in shared.tree[0]; a fixed tree. All threads must call it.
__device__ const Moments& merge_block(Shared& shared, const Moments& mine) {
  __syncthreads();  // the tree may still be read from the last time
  shared.tree[threadIdx.x] = mine;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (threadIdx.x < width) merge(shared.tree[threadIdx.x], shared.tree[threadIdx.x + width]);
  }
  __syncthreads();
  return shared.tree[0];
}

// Moments of the tokens [first, last) of every objective, by the whole block, in shared.pool.
template <class S>
__device__ void scan(const CombineParams& p, Shared& shared, int64_t first, int64_t last) {
  using C = typename Storage<S>::Compute;
  for (int i = 0; i < p.n; ++i) {
    const C scale = static_cast<C>(p.scale(i));
    Moments mine = Moments::empty();
    for (int64_t k = first + threadIdx.x; k < last; k += kThreads) {
      const Token t = token_at(p, k);
      const Entry<C> e = entry_at<S>(p, i, t, scale);
      if (e.finite) add(mine, static_cast<double>(e.raw));
      mine.nonfinite += t.valid && !e.finite;
      mine.active += static_cast<double>(e.gated);
      mine.nonzero += e.noon != C{0};
      mine.clipped += e.noon != C{0} && e.gated == C{0};
    }
    const Moments& block = merge_block(shared, mine);
    if (threadIdx.x == 0) shared.pool[i] = block;
  }
  __syncthreads();
}

template <class S, class C>
__device__ void store(const CombineParams& p, const Plane& q, const Token& t, C value) {
  reinterpret_cast<S*>(q.data)[t.row * q.row + t.col * q.col] = Storage<S>::store(value);
}

// The combination of the tokens [first, last) under shared.weights; objectives of weight 0 are not read.
template <class S>
__device__ void weigh(const CombineParams& p, const Shared& shared, int64_t first, int64_t last) {
  using C = typename Storage<S>::Compute;
  for (int64_t k = first + threadIdx.x; k < last; k += kThreads) {
    const Token t = token_at(p, k);
    C combined{0};
    for (int i = 0; i < p.n; ++i) {
      const C weight = static_cast<C>(shared.weights[i]);
      C share{0};
      if (weight != C{0}) {
        const Entry<C> e = entry_at<S>(p, i, t, static_cast<C>(p.scale(i)));
        if (e.taken) share = weight * e.advantage;
      }
      combined += share;
      if (p.in_place) store<S>(p, p.advantages[i], t, share);
    }
    if (!p.in_place) store<S>(p, p.out, t, combined);
  }
}

__device__ void add_warp_sum(Shared& shared, int slot, double x) {
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  if (threadIdx.x % 32 == 0) shared.warp_sums[threadIdx.x / 32][slot] += x;
}

// Level token: Theorem 1 and the combination for each of the tokens [first, last), one thread a token.
template <class S>
__device__ void solve_tokens(const CombineParams& p, Shared& shared, int64_t first, int64_t last) {
  using C = typename Storage<S>::Compute;
  const C inf = static_cast<C>(HUGE_VAL), nan = static_cast<C>(NAN);
  const bool fixed = p.solver == Solver::kFixed;
  for (int slot = threadIdx.x % 32; slot < p.n + 2; slot += 32) shared.warp_sums[threadIdx.x / 32][slot] = 0.0;
  __syncwarp();

  for (int64_t begin = first; begin < last; begin += kThreads) {
    const int64_t k = begin + threadIdx.x;
    const bool inside = k < last;  // the others only take part in the sums over the warp
    Token t{};
    if (inside) t = token_at(p, k);

    C low = inf, high = -inf;
    int at_low = 0, at_high = 0, present = 0, kept = 0;
    bool undefined = false;
    for (int i = 0; i < p.n; ++i) {
      const Entry<C> e = entry_at<S>(p, i, t, static_cast<C>(p.scale(i)));
      if (!e.taken) continue;
      ++present;
      undefined |= e.gated != e.gated;
      if (p.skip_inactive && e.gated == C{0}) continue;
      ++kept;
      at_low = e.gated < low ? 1 : at_low + (e.gated == low);
      at_high = e.gated > high ? 1 : at_high + (e.gated == high);
      low = e.gated < low ? e.gated : low;
      high = e.gated > high ? e.gated : high;
    }
    if (kept == 0) low = high = C{0}, at_low = present;  // nobody active: all that have data, each with a_i = 0
    const Split<C> total = split(low, high);
    C combined{0}, value = fixed ? C{0} : project(low, high);
    if (undefined && !fixed) value = nan;
    for (int i = 0; i < p.n; ++i) {
      const Entry<C> e = entry_at<S>(p, i, t, static_cast<C>(p.scale(i)));
      C c{0};
      if (fixed) {
        c = static_cast<C>(p.fixed_weight(i));
        if (e.taken && c != C{0}) value += c * e.gated;
      } else if (undefined) {
        c = nan;
      } else if (e.taken && (kept == 0 || !p.skip_inactive || e.gated != C{0})) {
        c = (e.gated == low ? total.low / static_cast<C>(at_low) : C{0}) +
            (e.gated == high && total.high != C{0} ? total.high / static_cast<C>(at_high) : C{0});
      }
      const C share = e.taken && c != C{0} ? c * e.advantage : C{0};
      combined += share;
      if (inside && p.in_place) store<S>(p, p.advantages[i], t, share);
      if (inside && p.per_token)
        static_cast<C*>(p.packed)[(kStatistics + k) * p.n + i] = fixed || present ? c : static_cast<C>(1.0 / p.n);
      if (!fixed) add_warp_sum(shared, i, present ? static_cast<double>(c) : 0.0);
    }
    if (!present) value = C{0};
    if (inside && !p.in_place) store<S>(p, p.out, t, combined);
    if (inside && p.per_token) static_cast<C*>(p.packed)[(kStatistics + p.tokens()) * p.n + k] = value;
    add_warp_sum(shared, p.n, static_cast<double>(value));
    add_warp_sum(shared, p.n + 1, present ? 1.0 : 0.0);
  }
}

__device__ Moments* block_moments(const CombineParams& p, int block) {
  return reinterpret_cast<Moments*>(static_cast<char*>(p.workspace) + block * block_bytes(p.n));
}
__device__ double* block_sums(const CombineParams& p, int block) {
  return reinterpret_cast<double*>(block_moments(p, block) + p.n);
}

// Every block's moments, merged in block order by each block that calls it, in shared.pool.
__device__ void merge_grid(const CombineParams& p, Shared& shared) {
  for (int i = 0; i < p.n; ++i) {
    Moments mine = Moments::empty();
    for (int b = threadIdx.x; b < gridDim.x; b += kThreads) merge(mine, block_moments(p, b)[i]);
    const Moments& grid = merge_block(shared, mine);
    if (threadIdx.x == 0) shared.pool[i] = grid;
  }
  __syncthreads();
}

// What every block has left in shared.pool (and warp_sums) meets here.
template <bool kAllBlocks>
__device__ void meet(const CombineParams& p, Shared& shared) {
  if (threadIdx.x < p.n) block_moments(p, blockIdx.x)[threadIdx.x] = shared.pool[threadIdx.x];
  if (p.level == Level::kToken) {
    for (int slot = threadIdx.x; slot < p.n + 2; slot += kThreads) {
      double sum = 0.0;
      for (int w = 0; w < kWarps; ++w) sum += shared.warp_sums[w][slot];
      block_sums(p, blockIdx.x)[slot] = sum;
    }
  }
  if (gridDim.x > 1) {
    cooperative_groups::this_grid().sync();
  } else {
    __syncthreads();
  }
  if (kAllBlocks || blockIdx.x == 0) merge_grid(p, shared);
}

template <class C>
__device__ void write_solution(const CombineParams& p, int64_t solve_index, const Shared& shared) {
  C* weights = static_cast<C*>(p.packed) + kStatistics * p.n;
  for (int i = threadIdx.x; i < p.n; i += kThreads) weights[solve_index * p.n + i] = static_cast<C>(shared.weights[i]);
  if (threadIdx.x == 0) weights[p.solves() * p.n + solve_index] = static_cast<C>(shared.value);
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) combine_kernel(const __grid_constant__ CombineParams p) {
  using C = typename Storage<S>::Compute;
  __shared__ Shared shared;
  const int64_t tokens = p.tokens(), run = (tokens + gridDim.x - 1) / gridDim.x;
  const int64_t first = min(tokens, blockIdx.x * run), last = min(tokens, first + run);

  if (p.level == Level::kBatch) {
    scan<S>(p, shared, first, last);
    meet<true>(p, shared);
    if (threadIdx.x == 0) shared.value = solve(p, shared.pool, nullptr, nullptr, shared.weights);
    __syncthreads();
    weigh<S>(p, shared, first, last);
    if (blockIdx.x == 0) write_solution<C>(p, 0, shared);
  } else if (p.level == Level::kSequence) {
    if (threadIdx.x < p.n) shared.total[threadIdx.x] = Moments::empty();
    for (int64_t row = blockIdx.x; row < p.rows; row += gridDim.x) {
      scan<S>(p, shared, row * p.cols, (row + 1) * p.cols);
      if (threadIdx.x == 0) shared.value = solve(p, shared.pool, nullptr, nullptr, shared.weights);
      if (threadIdx.x < p.n) merge(shared.total[threadIdx.x], shared.pool[threadIdx.x]);
      __syncthreads();
      weigh<S>(p, shared, row * p.cols, (row + 1) * p.cols);
      write_solution<C>(p, row, shared);
      __syncthreads();  // before the next row's scan overwrites pool and weights
    }
    if (threadIdx.x < p.n) shared.pool[threadIdx.x] = shared.total[threadIdx.x];
    __syncthreads();
    meet<false>(p, shared);
  } else {
    scan<S>(p, shared, first, last);
    solve_tokens<S>(p, shared, first, last);
    __syncthreads();
    meet<false>(p, shared);
    if (blockIdx.x == 0 && !p.per_token) {
      double sum = 0.0;
      if (threadIdx.x < p.n + 2)
        for (int b = 0; b < gridDim.x; ++b) sum += block_sums(p, b)[threadIdx.x];
      if (threadIdx.x == p.n + 1) shared.tree[0].active = sum;  // how many tokens have data
      __syncthreads();
      const double used = shared.tree[0].active;
      if (threadIdx.x < p.n)
        shared.weights[threadIdx.x] = p.solver == Solver::kFixed ? p.fixed_weight(threadIdx.x)
                                      : used > 0                 ? sum / used
                                                                 : 1.0 / p.n;
      if (threadIdx.x == p.n) shared.value = used > 0 ? sum / used : 0.0;
      __syncthreads();
      write_solution<C>(p, 0, shared);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < p.n)
    write_statistics(shared.pool[threadIdx.x], threadIdx.x, p.n, static_cast<C*>(p.packed));
}

// Blocks of combine_kernel<S> that are resident together, as a cooperative launch needs; asked once per device.
template <class S>
int resident_blocks(int device) {
  constexpr int kDevices = 64;
  static std::atomic<int> known[kDevices];
  if (device < kDevices && known[device]) return known[device];
  const DeviceGuard guard(device);
  int multiprocessors = 0, each = 0;
  check_cuda(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  check_cuda(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, combine_kernel<S>, kThreads, 0),
             "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  const int blocks = multiprocessors * std::clamp(each, 1, kBlocksPerSM);
  if (device < kDevices) known[device] = blocks;
  return blocks;
}

template <class S>
int blocks_for(const CombineParams& p) {
  if (p.tokens() * p.n <= kSingleBlockElements) return 1;
  constexpr int64_t each = kThreads * kTokensPerThread;
  const int64_t wanted = p.level == Level::kSequence ? p.rows : (p.tokens() + each - 1) / each;
  return static_cast<int>(std::min<int64_t>(wanted, resident_blocks<S>(p.device.index)));
}

template <class S>
void launch(const CombineParams& p, cudaStream_t stream) {
  const DeviceGuard guard(p.device.index);
  const dim3 blocks(static_cast<unsigned>(blocks_for<S>(p)));
  CombineParams copy = p;
  void* arguments[] = {&copy};
  const void* kernel = reinterpret_cast<const void*>(combine_kernel<S>);
  if (blocks.x == 1) {
    check_cuda(cudaLaunchKernel(kernel, blocks, kThreads, arguments, 0, stream), "launching combine_kernel");
  } else {
    check_cuda(cudaLaunchCooperativeKernel(kernel, blocks, kThreads, arguments, 0, stream), "launching combine_kernel");
  }
  check_cuda(cudaGetLastError(), "after launching combine_kernel");
}

}  // namespace

int64_t combine_cuda_workspace(const CombineParams& params) {
  return block_bytes(params.n) * with_dtype(params.dtype, [&](auto s) { return blocks_for<decltype(s)>(params); });
}

int cuda_toolkit() { return CUDART_VERSION; }

void launch_combine_cuda(const CombineParams& params, void* stream) {
  with_dtype(params.dtype, [&](auto s) { launch<decltype(s)>(params, static_cast<cudaStream_t>(stream)); });
}

}  // namespace pama
