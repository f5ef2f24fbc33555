// launch_combine_cuda: one launch per call, at every level and size; what Normalize asks for comes in launches of its
// own before and after it (cuda/normalize.cu).
//
// Tokens are dealt to blocks in equal runs (level "sequence": rows, round robin), and within a block to threads one
// after the other. Statistics go thread -> block (a tree in shared memory) -> grid (through the workspace and one grid
// barrier, in block order): no atomics, so the same input on the same device gives the same bits. A single block needs
// no grid barrier and is launched as an ordinary kernel, more than one as a cooperative kernel.
#include <cooperative_groups.h>

#include <algorithm>

#include "entry.cuh"
#include "launch.h"
#include "normalize.h"
#include "pama/solve.h"

namespace pama {
namespace {

static_assert(kThreads >= kMaxObjectives + 2, "one thread per objective, and two for the sums at level token");
constexpr int kTokensPerThread = 4;             // before another block is worth its share of the barrier
constexpr int64_t kSingleBlockElements = 8192;  // up to here one block alone is faster
constexpr int kBlocksPerSM = 2;

constexpr int kGramTokens = 32;  // at a time

__host__ __device__ constexpr int64_t gram_size(int n) { return static_cast<int64_t>(n) * n + 1; }

// Per block in the workspace: the moments of each objective, then at level "token" the sums of c_i, of s* and of
// tokens; for min-norm the Gram matrix of the block, that of all, and the solver's scratch.
__host__ __device__ constexpr int64_t block_bytes(int n, bool min_norm) {
  const int64_t doubles = n + 2 + (min_norm ? 2 * gram_size(n) + min_norm_scratch(n) : 0);
  return n * static_cast<int64_t>(sizeof(Moments)) + doubles * static_cast<int64_t>(sizeof(double));
}

struct Shared {
  union {
    Moments tree[kThreads];
    double gated[kMaxObjectives][kGramTokens];
  };
  Moments pool[kMaxObjectives];   // of the batch, or of the row at hand
  Moments total[kMaxObjectives];  // of all rows of this block
  double weights[kMaxObjectives];
  double value;
  double warp_sums[kWarps][kMaxObjectives + 2];
};

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
      mine.positive += e.positive;
      mine.nonfinite += t.valid && !e.finite;
      mine.active += static_cast<double>(e.gated);
      mine.nonzero += e.noon != C{0};
      mine.clipped += e.noon != C{0} && e.gated == C{0};
    }
    const Moments& block = merge_block(shared.tree, mine);
    if (threadIdx.x == 0) shared.pool[i] = block;
  }
  __syncthreads();
}

__device__ Moments* block_moments(const CombineParams& p, int block) {
  return reinterpret_cast<Moments*>(static_cast<char*>(p.workspace) +
                                    block * block_bytes(p.n, p.solver == Solver::kMinNorm));
}
__device__ double* block_sums(const CombineParams& p, int block) {
  return reinterpret_cast<double*>(block_moments(p, block) + p.n);
}
__device__ double* block_gram(const CombineParams& p, int block) { return block_sums(p, block) + p.n + 2; }

// Sums of I(A_i) I(A_j) over the tokens [first, last), in the upper triangle of block_gram, and behind it the number of
// tokens with data. A pair of objectives to a thread.
template <class S>
__device__ void add_grams(const CombineParams& p, Shared& shared, int64_t first, int64_t last) {
  using C = typename Storage<S>::Compute;
  double* gram = block_gram(p, blockIdx.x);
  const int pairs = p.n * p.n;
  for (int e = threadIdx.x; e <= pairs; e += kThreads) gram[e] = 0.0;
  for (int64_t begin = first; begin < last; begin += kGramTokens) {
    __syncthreads();  // the tokens before are still being read
    for (int e = threadIdx.x; e < p.n * kGramTokens; e += kThreads) {
      const int i = e / kGramTokens, k = e % kGramTokens;
      shared.gated[i][k] = 0.0;
      if (begin + k >= last) continue;
      const Entry<C> entry = entry_at<S>(p, i, token_at(p, begin + k), static_cast<C>(p.scale(i)));
      shared.gated[i][k] = static_cast<double>(entry.gated);
    }
    double used = 0.0;
    if (threadIdx.x < kGramTokens && begin + threadIdx.x < last) {
      const Token t = token_at(p, begin + threadIdx.x);
      for (int i = 0; i < p.n; ++i) used = entry_at<S>(p, i, t, C{1}).taken ? 1.0 : used;
    }
    if (threadIdx.x < kGramTokens) {
      for (int offset = 16; offset > 0; offset /= 2) used += __shfl_xor_sync(0xffffffffu, used, offset);
      if (threadIdx.x == 0) gram[pairs] += used;
    }
    __syncthreads();
    for (int e = threadIdx.x; e < pairs; e += kThreads) {
      const int i = e / p.n, j = e % p.n;
      if (j < i) continue;
      double sum = 0.0;
      for (int k = 0; k < kGramTokens; ++k) sum += shared.gated[i][k] * shared.gated[j][k];
      gram[e] += sum;
    }
  }
  __syncthreads();
}

// Every block's Gram matrix, summed in block order, behind that of the block that calls it.
__device__ const double* merge_grams(const CombineParams& p) {
  double* total = block_gram(p, blockIdx.x) + gram_size(p.n);
  for (int e = threadIdx.x; e < gram_size(p.n); e += kThreads) {
    double sum = 0.0;
    for (int b = 0; b < gridDim.x; ++b) sum += block_gram(p, b)[e];
    total[e] = sum;
  }
  __syncthreads();
  return total;
}

// The combination of the tokens [first, last) under shared.weights; objectives of weight 0 are not read.
template <class S>
__device__ void weigh(const CombineParams& p, const Shared& shared, int64_t first, int64_t last) {
  using C = typename Storage<S>::Compute;
  for (int64_t k = first + threadIdx.x; k < last; k += kThreads) {
    const Token t = token_at(p, k);
    C combined{0};
    bool present = false;
    for (int i = 0; i < p.n; ++i) {
      const C weight = static_cast<C>(shared.weights[i]);
      C share{0};
      if (weight != C{0} || p.marks()) {
        const Entry<C> e = entry_at<S>(p, i, t, static_cast<C>(p.scale(i)));
        present |= e.taken;
        if (e.taken && weight != C{0}) share = weight * e.advantage;
      }
      combined += share;
      if (p.in_place) store<S>(p.advantages[i], t, share);
    }
    if (p.marks()) {
      store_marked<S>(p.out, t, combined, present);
    } else if (!p.in_place) {
      store<S>(p.out, t, combined);
    }
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
    if (p.solver == Solver::kMinNorm && value < C{0}) value = -value;  // of one token: the closed form
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
      if (inside && p.in_place) store<S>(p.advantages[i], t, share);
      if (inside && p.per_token)
        static_cast<C*>(p.packed)[(kStatistics + p.row_at(k)) * p.n + i] =
            fixed || present ? c : static_cast<C>(1.0 / p.n);
      if (!fixed) add_warp_sum(shared, i, present ? static_cast<double>(c) : 0.0);
    }
    if (!present) value = C{0};
    if (inside && p.marks()) {
      store_marked<S>(p.out, t, combined, present > 0);
    } else if (inside && !p.in_place) {
      store<S>(p.out, t, combined);
    }
    if (inside && p.per_token) static_cast<C*>(p.packed)[(kStatistics + p.tokens()) * p.n + p.row_at(k)] = value;
    add_warp_sum(shared, p.n, static_cast<double>(value));
    add_warp_sum(shared, p.n + 1, present ? 1.0 : 0.0);
  }
}

// Every block's moments, merged in block order by each block that calls it, in shared.pool.
__device__ void merge_grid(const CombineParams& p, Shared& shared) {
  for (int i = 0; i < p.n; ++i) {
    Moments mine = Moments::empty();
    for (int b = threadIdx.x; b < gridDim.x; b += kThreads) merge(mine, block_moments(p, b)[i]);
    const Moments& grid = merge_block(shared.tree, mine);
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

// The weights of shared.pool, by one thread; `gram` if the solver wants one.
__device__ void solve_pool(const CombineParams& p, Shared& shared, const double* gram) {
  double* scratch = gram ? block_gram(p, blockIdx.x) + 2 * gram_size(p.n) : nullptr;
  if (threadIdx.x == 0) shared.value = solve(p, shared.pool, gram, scratch, shared.weights);
  __syncthreads();
}

template <class S>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) combine_kernel(const __grid_constant__ CombineParams p) {
  using C = typename Storage<S>::Compute;
  __shared__ Shared shared;
  const int64_t tokens = p.tokens(), run = (tokens + gridDim.x - 1) / gridDim.x;
  const int64_t first = min(tokens, blockIdx.x * run), last = min(tokens, first + run);

  if (p.level == Level::kBatch) {
    scan<S>(p, shared, first, last);
    if (p.solver == Solver::kMinNorm) add_grams<S>(p, shared, first, last);
    meet<true>(p, shared);
    solve_pool(p, shared, p.solver == Solver::kMinNorm ? merge_grams(p) : nullptr);
    weigh<S>(p, shared, first, last);
    if (blockIdx.x == 0) write_solution<C>(p, 0, shared);
  } else if (p.level == Level::kSequence || p.level == Level::kGroup) {
    if (threadIdx.x < p.n) shared.total[threadIdx.x] = Moments::empty();
    for (int64_t pool = blockIdx.x; pool < p.pools(); pool += gridDim.x) {
      const Rows rows = p.level == Level::kGroup ? rows_of(p, pool) : Rows{pool, pool + 1};
      const bool at_rows = p.level == Level::kSequence || p.normalize.groups == Groups::kIds;
      if (at_rows && rows.first == rows.last) continue;
      const int64_t begin = rows.first * p.row_tokens, end = rows.last * p.row_tokens;
      scan<S>(p, shared, begin, end);
      if (p.solver == Solver::kMinNorm) add_grams<S>(p, shared, begin, end);
      solve_pool(p, shared, p.solver == Solver::kMinNorm ? block_gram(p, blockIdx.x) : nullptr);
      if (threadIdx.x < p.n) merge(shared.total[threadIdx.x], shared.pool[threadIdx.x]);
      weigh<S>(p, shared, begin, end);
      if (at_rows) {
        for (int64_t row = rows.first; row < rows.last; ++row) write_solution<C>(p, p.row_at(row), shared);
      } else {
        write_solution<C>(p, pool, shared);
      }
      __syncthreads();  // before the next scan overwrites pool and weights
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
  if (blockIdx.x == 0 && threadIdx.x < p.n && p.dead) shared.pool[threadIdx.x].dead = p.dead[threadIdx.x];
  if (blockIdx.x == 0 && threadIdx.x < p.n)
    write_statistics(shared.pool[threadIdx.x], threadIdx.x, p.n, static_cast<C*>(p.packed));
}

template <class S>
int blocks_for(const CombineParams& p) {
  if (p.tokens() * p.n <= kSingleBlockElements) return 1;
  constexpr int64_t each = kThreads * kTokensPerThread;
  const bool pooled = p.level == Level::kSequence || p.level == Level::kGroup;
  const int64_t wanted = pooled ? p.pools() : (p.tokens() + each - 1) / each;
  return static_cast<int>(
      std::min<int64_t>(wanted, resident_blocks<combine_kernel<S>>(p.device.index, kThreads, kBlocksPerSM)));
}

}  // namespace

// Behind the blocks' own memory stands that of the normalisation.
static int64_t blocks_bytes(const CombineParams& p) {
  const int64_t blocks = with_dtype(p.dtype, [&](auto s) { return blocks_for<decltype(s)>(p); });
  return (block_bytes(p.n, p.solver == Solver::kMinNorm) * blocks + 15) / 16 * 16;
}

int64_t combine_cuda_workspace(const CombineParams& p) { return blocks_bytes(p) + normalize_cuda_workspace(p); }

int cuda_toolkit() { return CUDART_VERSION; }

void launch_combine_cuda(CombineParams& params, void* stream) {
  const DeviceGuard guard(params.device.index);
  normalize_cuda(params, static_cast<char*>(params.workspace) + blocks_bytes(params), stream);
  with_dtype(params.dtype, [&](auto s) {
    using S = decltype(s);
    launch_together(reinterpret_cast<const void*>(combine_kernel<S>), blocks_for<S>(params), kThreads, params, stream,
                    "launching combine_kernel");
  });
  normalize_combined_cuda(params, stream);
}

}  // namespace pama
