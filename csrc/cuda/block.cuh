// One block of the kernel of `combine`: its tiles, where it meets the others, the solve and the combination.
#pragma once

#include <cooperative_groups.h>

#include "scan.cuh"

namespace pama {

// Solved for the batch or for each pool; the same from Gram matrices; for each token.
enum class Kind { kPools, kGram, kTokens };

template <class S, Kind kKind>
class Block : Scanner<typename Storage<S>::Compute> {
  using C = typename Storage<S>::Compute;
  using Base = Scanner<C>;
  using Base::p, Base::shared, Base::tile;
  using typename Base::Entry;
  static constexpr bool kGram = kKind == Kind::kGram;

 public:
  __device__ __forceinline__ Block(const CombineParams& params, char* memory) : Base(params, memory) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x < p.n) {
      shared.total[threadIdx.x] = Moments::empty();
      shared.scale[threadIdx.x] = static_cast<C>(p.scale(threadIdx.x));
    }
    __syncthreads();
    if (kKind == Kind::kTokens) {
      tokens();
    } else {
      pools();
    }
    if (blockIdx.x == 0 && threadIdx.x < p.n) {
      if (p.dead) shared.total[threadIdx.x].dead = p.dead[threadIdx.x];
      write_statistics(shared.total[threadIdx.x], threadIdx.x, p.n, static_cast<C*>(p.packed));
    }
    if (p.meeting == Meeting::kCluster) wait_for_all();  // nobody leaves while its shared memory may be read
  }

 private:
  // The run of tokens of this block, in multiples of what is read at once.
  __device__ __forceinline__ void my_tokens(int64_t& first, int64_t& last) const {
    constexpr int kStep = Tile<C>::kStep;
    const int64_t tokens = p.tokens(), each = (tokens + gridDim.x - 1) / gridDim.x;
    const int64_t run = (each + kStep - 1) / kStep * kStep;
    first = min(tokens, blockIdx.x * run);
    last = min(tokens, first + run);
  }

  __device__ __forceinline__ void load(int64_t first, int count, uint64_t wanted, bool gates) {
    __syncthreads();  // the tile before may still be read
    load_tile<S>(p, first, count, wanted, gates, tile);
    __syncthreads();
  }

  // The batch, of which every block has a share, or rows or groups, of which those of an equal, small size are taken
  // several at a time. Each tile twice: for the statistics, and backwards for the combination. The last tile is still
  // there then, and those before it are the likeliest to be in the cache.
  __device__ __forceinline__ void pools() {
    const uint64_t everyone = ~uint64_t{0} >> (64 - p.n);
    const bool batch = p.level == Level::kBatch;
    const bool at_rows = p.level == Level::kSequence || p.normalize.groups == Groups::kIds;
    const int64_t pools = batch ? gridDim.x : p.pools();
    const int together = p.tile_pools;
    for (int64_t pool = static_cast<int64_t>(blockIdx.x) * together; pool < pools;
         pool += static_cast<int64_t>(gridDim.x) * together) {
      Rows rows{pool, pool + 1};
      if (p.level == Level::kGroup) rows = rows_of(p, pool);
      if (!batch && at_rows && rows.first == rows.last) continue;
      const int many = static_cast<int>(min(int64_t{together}, pools - pool));
      int64_t first = rows.first * p.row_tokens, size = (rows.last - rows.first) * p.row_tokens;
      int64_t last = first + many * size;
      if (batch) my_tokens(first, last);
      const int64_t tiles = (last - first + tile.stride - 1) / tile.stride;
      if (kGram) this->clear_gram();
      if (threadIdx.x < p.n) own = Moments::empty();
      uint64_t wanted = everyone;
      for (int64_t step = 0; step < 2 * tiles || step == tiles; ++step) {
        if (step == tiles) {
          if (batch) meet(true);
          solve_pools(many);
          for (int i = 0; i < p.n && batch; ++i)
            if (!p.marks() && shared.share[i] == C{0}) wanted &= ~(uint64_t{1} << i);
          if (tiles == 0) break;
        }
        const bool forward = step < tiles;
        const int64_t from = first + (forward ? step : 2 * tiles - 1 - step) * tile.stride;
        const int count = static_cast<int>(min(int64_t{tile.stride}, last - from));
        if (step != tiles) load(from, count, wanted, forward);
        if (forward) {
          scan_tile(count, together > 1 ? static_cast<int>(size) : kPiece);
        } else {
          weigh(from, count, together > 1 ? static_cast<int>(size) : tile.stride);
        }
      }
      if (batch) break;
      for (int j = 0; j < many; ++j) {
        if (!at_rows) write_solution(pool + j, j);
        for (int64_t row = rows.first; at_rows && row < rows.last; ++row) write_solution(p.row_at(row + j), j);
      }
      __syncthreads();  // before the next pools overwrite the weights
    }
    if (!batch) {
      meet(false);
    } else if (blockIdx.x == 0) {
      write_solution(0, 0);
    }
  }

  __device__ __forceinline__ void tokens() {
    int64_t first, last;
    my_tokens(first, last);
    double low = 0.0, high = 0.0, value = 0.0, used = 0.0;
    for (int64_t k = first; k < last; k += tile.stride) {
      const int count = static_cast<int>(min(int64_t{tile.stride}, last - k));
      load(k, count, ~uint64_t{0} >> (64 - p.n), true);
      scan_tile(count, kPiece);
      solve_tokens(k, count, low, high, value, used);
      if (!p.in_place) continue;
      __syncthreads();
      store_tile<S>(p, k, count, tile);
    }
    write_shares(low, high, value, used);
    meet(false);
    if (blockIdx.x == 0 && !p.per_token) mean_shares();
  }

  // Statistics of a tile in pieces; those of one pool are added up, several pools are kept apart in `part` for the
  // solve.
  __device__ __forceinline__ void scan_tile(int count, int piece) {
    this->scan(count, piece);
    if (kGram) this->add_gram(count);
    if (p.tile_pools > 1) return;
    merge_parts(shared.part, (count + piece - 1) / piece, p.n);
    if (threadIdx.x < p.n) {
      const Moments here = shared.part[threadIdx.x];
      if (kKind == Kind::kTokens || p.level == Level::kBatch) {
        merge(shared.total[threadIdx.x], here);
      } else {
        merge(own, here);
      }
    }
    __syncthreads();
  }

  // The weights of the pools of the tile, a thread to a pool, whose moments then join the total.
  __device__ __forceinline__ void solve_pools(int many) {
    const bool batch = p.level == Level::kBatch;
    if (!batch && p.tile_pools == 1 && threadIdx.x < p.n) shared.part[threadIdx.x] = own;
    __syncthreads();
    const double* gram = kGram ? (batch ? this->merge_grams() : block_gram(p, blockIdx.x)) : nullptr;
    double* scratch = kGram ? block_gram(p, blockIdx.x) + 2 * gram_size(p.n) : nullptr;
    if (threadIdx.x < many) {
      const Moments* moments = batch ? shared.total : shared.part + threadIdx.x * p.n;
      double* weights = shared.weights + threadIdx.x * p.n;
      shared.values[threadIdx.x] = solve(p, moments, gram, scratch, weights);
      for (int i = 0; i < p.n; ++i) shared.share[threadIdx.x * p.n + i] = static_cast<C>(weights[i]);
    }
    __syncthreads();
    if (batch) return;
    merge_parts(shared.part, many, p.n);
    if (threadIdx.x < p.n) merge(shared.total[threadIdx.x], shared.part[threadIdx.x]);
    __syncthreads();
  }

  // The combination of the tile under the weights of its pools, which have `size` tokens each; in place, the shares.
  __device__ __forceinline__ void weigh(int64_t first, int count, int size) {
    for (int k = threadIdx.x; k < count; k += kThreads) {
      const C* weights = shared.share + k / size * p.n;
      C combined{0};
      bool present = false;
      for (int i = 0; i < p.n; ++i) {
        const C weight = weights[i];
        C share{0};
        if (weight != C{0} || p.marks()) {
          const Entry e = this->entry(i, k);
          present |= e.taken;
          if (e.taken && weight != C{0}) share = weight * e.advantage;
        }
        combined += share;
        if (p.in_place) tile.x[i * tile.stride + k] = share;
      }
      if (!p.in_place) store_out(first + k, combined, present);
    }
    if (!p.in_place) return;
    __syncthreads();
    store_tile<S>(p, first, count, tile);
  }

  __device__ __forceinline__ void store_out(int64_t token, C combined, bool present) const {
    const Token t = token_at(p, token, false);
    if (p.marks()) {
      store_marked<S>(p.out, t, combined, present);
    } else {
      store<S>(p.out, t, combined);
    }
  }

  // Level token: Theorem 1 and the combination, one thread a token. Lane l of a warp keeps the sums of the weights of
  // the objectives l and l + 32.
  __device__ __forceinline__ void solve_tokens(int64_t first, int count, double& mine_low, double& mine_high,
                                               double& values, double& used) {
    const C inf = static_cast<C>(HUGE_VAL), nan = static_cast<C>(NAN);
    const bool fixed = p.solver == Solver::kFixed;
    const int lane = threadIdx.x % 32;
    for (int base = threadIdx.x - lane; base < count; base += kThreads) {
      const int k = base + lane;  // beyond the last token: no valid one
      C low = inf, high = -inf;
      int at_low = 0, at_high = 0, present = 0, kept = 0;
      bool undefined = false;
      for (int i = 0; i < p.n; ++i) {
        const Entry e = this->entry(i, k);
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
      const C low_share = total.low / static_cast<C>(at_low), high_share = total.high / static_cast<C>(at_high);
      C combined{0}, value = fixed ? C{0} : project(low, high);
      if (p.solver == Solver::kMinNorm && value < C{0}) value = -value;  // of one token: the closed form
      if (undefined && !fixed) value = nan;
      for (int i = 0; i < p.n; ++i) {
        const Entry e = this->entry(i, k);
        C c{0};
        if (fixed) {
          c = static_cast<C>(p.fixed_weight(i));
          if (e.taken && c != C{0}) value += c * e.gated;
        } else if (undefined) {
          c = nan;
        } else if (e.taken && (kept == 0 || !p.skip_inactive || e.gated != C{0})) {
          c = (e.gated == low ? low_share : C{0}) + (e.gated == high && total.high != C{0} ? high_share : C{0});
        }
        const C share = e.taken && c != C{0} ? c * e.advantage : C{0};
        combined += share;
        if (p.in_place && k < count) tile.x[i * tile.stride + k] = share;
        if (p.per_token && k < count)
          static_cast<C*>(p.packed)[(kStatistics + p.row_at(first + k)) * p.n + i] =
              fixed || present ? c : static_cast<C>(1.0 / p.n);
        if (fixed) continue;
        const double sum = static_cast<double>(warp_sum(present ? c : C{0}));
        if (lane == i) mine_low += sum;
        if (lane + 32 == i) mine_high += sum;
      }
      if (!present) value = C{0};
      if (k < count && !p.in_place) store_out(first + k, combined, present > 0);
      if (k < count && p.per_token)
        static_cast<C*>(p.packed)[(kStatistics + p.tokens()) * p.n + p.row_at(first + k)] = value;
      values += static_cast<double>(value);
      used += present ? 1.0 : 0.0;
    }
  }

  // The sums of the block, where the first block will look for them.
  __device__ __forceinline__ void write_shares(double low, double high, double value, double used) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    value = warp_sum(value);
    used = warp_sum(used);
    if (lane < p.n) shared.sums[warp][lane] = low;
    if (lane + 32 < p.n) shared.sums[warp][lane + 32] = high;
    if (lane == 0) shared.sums[warp][p.n] = value, shared.sums[warp][p.n + 1] = used;
    __syncthreads();
    if (threadIdx.x < p.n + 2) {
      double sum = 0.0;
      for (int w = 0; w < kWarps; ++w) sum += shared.sums[w][threadIdx.x];
      block_sums(p, blockIdx.x)[threadIdx.x] = sum;
    }
  }

  // Mean weights and s* over the tokens with data, by the first block.
  __device__ __forceinline__ void mean_shares() {
    double sum = 0.0;
    if (threadIdx.x < p.n + 2)
      for (int b = 0; b < gridDim.x; ++b) sum += block_sums(p, b)[threadIdx.x];
    if (threadIdx.x == p.n + 1) shared.sums[0][0] = sum;  // how many tokens have data
    __syncthreads();
    const double used = shared.sums[0][0];
    if (threadIdx.x < p.n)
      shared.weights[threadIdx.x] = p.solver == Solver::kFixed ? p.fixed_weight(threadIdx.x)
                                    : used > 0                 ? sum / used
                                                               : 1.0 / p.n;
    if (threadIdx.x == p.n) shared.values[0] = used > 0 ? sum / used : 0.0;
    __syncthreads();
    write_solution(0, 0);
  }

  __device__ __forceinline__ void wait_for_all() const {
    if (p.meeting == Meeting::kBlock) return __syncthreads();
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.meeting == Meeting::kCluster) return cooperative_groups::this_cluster().sync();
#endif
    cooperative_groups::this_grid().sync();
  }

  // Where the moments of another block can be read once all have met.
  __device__ __forceinline__ const Moments* total_of(int block) const {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (p.meeting == Meeting::kCluster) return cooperative_groups::this_cluster().map_shared_rank(shared.total, block);
#endif
    return block_moments(p, block);
  }

  // The moments of all blocks, merged into shared.total of every block (`everywhere`) or of the first: a slice of the
  // blocks to each set of n threads, in block order, then the slices by a tree.
  __device__ __forceinline__ void meet(bool everywhere) {
    if (p.meeting == Meeting::kGrid && threadIdx.x < p.n)
      block_moments(p, blockIdx.x)[threadIdx.x] = shared.total[threadIdx.x];
    wait_for_all();
    if (gridDim.x == 1 || (!everywhere && blockIdx.x > 0)) return;
    const int slices = min(kUnits / p.n, static_cast<int>(gridDim.x));
    for (int e = threadIdx.x; e < slices * p.n; e += kThreads) {
      Moments m = Moments::empty();
      for (int b = e / p.n; b < gridDim.x; b += slices) merge(m, total_of(b)[e % p.n]);
      shared.part[e] = m;
    }
    __syncthreads();
    merge_parts(shared.part, slices, p.n);
    if (p.meeting == Meeting::kCluster && everywhere) wait_for_all();  // all have read what is overwritten now
    if (threadIdx.x < p.n) shared.total[threadIdx.x] = shared.part[threadIdx.x];
    __syncthreads();
  }

  // Pool `from` of the tile, where the caller looks for solve `to`.
  __device__ __forceinline__ void write_solution(int64_t to, int from) const {
    C* weights = static_cast<C*>(p.packed) + kStatistics * p.n;
    for (int i = threadIdx.x; i < p.n; i += kThreads)
      weights[to * p.n + i] = static_cast<C>(shared.weights[from * p.n + i]);
    if (threadIdx.x == 0) weights[p.solves() * p.n + to] = static_cast<C>(shared.values[from]);
  }

  Moments own;  // of one pool and one objective
};

}  // namespace pama
