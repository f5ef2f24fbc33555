// One block of the kernel of `combine`: its tiles, where it meets the others, the solve and the combination.
#pragma once

#include "meet.cuh"
#include "scan.cuh"

namespace pama {

// Solved for the batch or for each pool; the same from Gram matrices; for each token.
enum class Kind { kPools, kGram, kTokens };

template <class S, Kind kKind>
class Block : Scanner<typename Storage<S>::Compute> {
  using C = typename Storage<S>::Compute;
  using Base = Scanner<C>;
  using Base::p, Base::shared, Base::tile;
  static constexpr bool kGram = kKind == Kind::kGram;

 public:
  __device__ __forceinline__ Block(const CombineParams& params, char* memory) : Base(params, memory) {}

  __device__ __forceinline__ void run() {
    if (threadIdx.x < p.n) {
      shared.total[threadIdx.x] = Moments::empty();
      shared.scale[threadIdx.x] = static_cast<C>(p.scale(threadIdx.x));
      shared.dead[threadIdx.x] = 0;
    }
    __syncthreads();
    if (kKind == Kind::kTokens) {
      tokens();
    } else {
      pools();
    }
    if (!solves_batch()) write_totals();
    // Nobody leaves while its shared memory may be read.
    if (p.meeting == Meeting::kCluster) cluster().barrier_wait();
  }

 private:
  __device__ __forceinline__ bool solves_batch() const { return kKind != Kind::kTokens && p.level == Level::kBatch; }

  // The run of tokens of this block.
  __device__ __forceinline__ void my_tokens(int64_t& first, int64_t& last) const {
    first = min(p.tokens(), blockIdx.x * p.run_tokens);
    last = min(p.tokens(), first + p.run_tokens);
  }

  __device__ __forceinline__ void load(int64_t first, int count, uint64_t wanted, bool gates) {
    __syncthreads();  // the tile before may still be read
    load_tile<S>(p, first, count, wanted, gates, tile);
    const int64_t group = p.measures ? first / p.group_tokens() : 0;
    if (p.measures) this->number_groups(group, count);
    __syncthreads();
    if (!p.measures || !gates) return;
    this->measure_groups(group, count);
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
      const int64_t tiles = (last - first + tile.tokens - 1) / tile.tokens;
      if (kGram) this->clear_gram();
      if (together == 1 && tiles == 0) this->clear_slices();
      uint64_t wanted = everyone;
      for (int64_t step = 0; step < 2 * tiles || step == tiles; ++step) {
        if (step == tiles) {
          if (together == 1) this->merge_slices();
          if (batch) add_dead(shared.part);
          if (batch && gridDim.x > 1) {
            keep_total();
            meet(true);
          }
          solve_pools(many);
          for (int i = 0; i < p.n && batch; ++i)
            if (!p.marks() && shared.share[i] == C{0}) wanted &= ~(uint64_t{1} << i);
          if (tiles == 0) break;
        }
        const bool forward = step < tiles;
        const int64_t from = first + (forward ? step : 2 * tiles - 1 - step) * tile.tokens;
        const int count = static_cast<int>(min(int64_t{tile.tokens}, last - from));
        if (step != tiles) load(from, count, wanted, forward);
        if (forward && together > 1) {
          this->scan_pools(count, static_cast<int>(size));
        } else if (forward) {
          scan(count, step == 0);
        } else {
          const int whole = together > 1 ? 0 : whole_out(from, count);
          if (together > 1) {
            weigh_pools(count, static_cast<int>(size));
          } else if (p.plain) {
            weigh<true>(from, whole, count);
          } else {
            weigh<false>(from, whole, count);
          }
          store_rest(from, whole, count);
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
      add_dead(shared.total);
      meet(false);
    } else if (blockIdx.x == 0) {
      write_solution(0, 0);
    }
  }

  __device__ __forceinline__ void tokens() {
    int64_t first, last;
    my_tokens(first, last);
    const bool plain = p.plain && p.solver != Solver::kFixed && !p.skip_inactive && !p.per_token;
    double low = 0.0, high = 0.0, value = 0.0, used = 0.0;
    if (first == last) this->clear_slices();
    for (int64_t k = first; k < last; k += tile.tokens) {
      const int count = static_cast<int>(min(int64_t{tile.tokens}, last - k));
      load(k, count, ~uint64_t{0} >> (64 - p.n), true);
      scan(count, k == first);
      __syncthreads();  // results may take the place of what is scanned
      const int whole = plain ? whole_out(k, count) : 0;
      if (plain) {
        solve_plain_tokens(k, whole, count, low, high, value, used);
      } else {
        solve_tokens(k, count, low, high, value, used);
      }
      store_rest(k, whole, count);
    }
    this->merge_slices();
    add_dead(shared.part);
    keep_total();
    write_shares(low, high, value, used);
    meet(false);
    if (blockIdx.x == 0 && !p.per_token) mean_shares();
  }

  __device__ __forceinline__ void scan(int count, bool first) {
    if (p.plain) {
      this->template scan_slices<true>(count, first);
    } else {
      this->template scan_slices<false>(count, first);
    }
    if (kGram) this->add_gram(count);
  }

  // The groups of this block that give only 0, if it has measured them.
  __device__ __forceinline__ void add_dead(Moments* to) const {
    if (p.measures && threadIdx.x < p.n) to[threadIdx.x].dead += static_cast<int64_t>(shared.dead[threadIdx.x]);
  }

  // What merge_slices has left is all that this block has.
  __device__ __forceinline__ void keep_total() {
    if (threadIdx.x < p.n) shared.total[threadIdx.x] = shared.part[threadIdx.x];
  }

  // The weights of the pools of the tile, a thread to a pool, or of the one that it has, for min-norm. The moments then
  // join the total.
  __device__ __forceinline__ void solve_pools(int many) {
    const Moments* moments = solves_batch() ? met() : shared.part;
    if (kGram) {
      this->solve_gram(moments, solves_batch());
    } else {
      for (int e = threadIdx.x; e < many * p.n; e += kThreads) shared.weights[e] = moments[e].scalar();
      __syncthreads();
      if (threadIdx.x < many) {
        double* weights = shared.weights + threadIdx.x * p.n;
        shared.values[threadIdx.x] = solve_scalars(p, moments + threadIdx.x * p.n, weights);
        for (int i = 0; i < p.n; ++i) shared.share[threadIdx.x * p.n + i] = static_cast<C>(weights[i]);
      }
    }
    __syncthreads();
    if (solves_batch()) return write_totals();  // by few threads, while the others combine
    merge_parts(shared.part, many, p.n);
    if (threadIdx.x < p.n) merge(shared.total[threadIdx.x], shared.part[threadIdx.x]);
    __syncthreads();
  }

  // The statistics, by the last threads of the first block.
  __device__ __forceinline__ void write_totals() const {
    const int i = threadIdx.x - (kThreads - kMaxObjectives);
    if (blockIdx.x > 0 || i < 0 || i >= p.n) return;
    Moments total = met()[i];
    if (p.dead && !p.measures) total.dead = p.dead[i];
    write_statistics(total, i, p.n, static_cast<C*>(p.packed));
  }

  // The combination of the tile under the weights of its pools, which have `size` tokens each, in the place of the
  // first objective; in place, the shares.
  __device__ __forceinline__ void weigh_pools(int count, int size) {
    for (int k = threadIdx.x; k < count; k += kThreads) {
      const C* weights = shared.share + k / size * p.n;
      C combined{0};
      bool present = false;
      for (int i = 0; i < p.n; ++i) {
        const C weight = weights[i];
        C share{0};
        if (weight != C{0} || p.marks()) {
          const Entry<C> e = this->entry(i, k);
          present |= e.taken;
          if (e.taken && weight != C{0}) share = weight * e.advantage;
        }
        combined += share;
        if (p.in_place) tile.x[i * tile.stride + k] = share;
      }
      if (!p.in_place) keep_out(k, combined, present);
    }
  }

  // The same of a tile in one pool, four tokens at a time; of the first `whole` tokens it goes to memory at once.
  template <bool kPlain>
  __device__ __forceinline__ void weigh(int64_t first, int whole, int count) {
    for (int k = kQuad * threadIdx.x; k < count; k += kQuad * kThreads) {
      const unsigned flags = this->flags_of_quad(k);
      Pack<C, kQuad> combined = {};
      unsigned present = 0;
      for (int i = 0; i < p.n; ++i) {
        const C weight = shared.share[i];
        if (weight == C{0} && !p.in_place && (kPlain || !p.marks())) continue;
        Pack<C, kQuad>& x = pack<C, kQuad>(tile.x + i * tile.stride + k);
        Pack<C, kQuad> shares = x;
#pragma unroll
        for (int t = 0; t < kQuad; ++t) {
          const Entry<C> e = this->template entry<kPlain>(i, k + t, shares.at[t], flags, t);
          if (e.taken) present |= unsigned{kPresentFlag} << 8 * t;
          shares.at[t] = e.taken && weight != C{0} ? weight * e.advantage : C{0};
          combined.at[t] += shares.at[t];
        }
        if (p.in_place) x = shares;
      }
      if (!p.in_place) put(first, k, whole, combined, flags | present);
    }
  }

  // How many tokens of the combination of the tile that starts at `first` can be stored four at a time.
  __device__ __forceinline__ int whole_out(int64_t first, int count) const {
    const bool aligned = holds_pack<S, kQuad>(reinterpret_cast<const S*>(p.out.data) + first);
    return p.out_together && !p.marks() && aligned ? count / kQuad * kQuad : 0;
  }

  // Four tokens of the combination, to where they go, or into the tile for store_rest.
  __device__ __forceinline__ void put(int64_t first, int k, int whole, const Pack<C, kQuad>& combined, unsigned flags) {
    if (k < whole) {
      Pack<S, kQuad> rounded;
#pragma unroll
      for (int t = 0; t < kQuad; ++t) rounded.at[t] = Storage<S>::store(combined.at[t]);
      pack<S, kQuad>(reinterpret_cast<S*>(p.out.data) + first + k) = rounded;
    } else {
      pack<C, kQuad>(tile.x + k) = combined;
      *reinterpret_cast<unsigned*>(tile.flags + k) = flags;
    }
  }

  __device__ __forceinline__ void keep_out(int k, C combined, bool present) {
    tile.x[k] = combined;
    if (present) tile.flags[k] |= kPresentFlag;
  }

  // What is still in the tile goes to memory: the combination of its tokens from `whole` on; in place, the shares.
  __device__ __forceinline__ void store_rest(int64_t first, int whole, int count) const {
    if (!p.in_place && whole == count) return;
    __syncthreads();
    if (p.in_place) return store_tile<S>(p, first, count, tile);
    for (int k = whole + threadIdx.x; k < count; k += kThreads)
      store_out(first + k, tile.x[k], has(tile.flags[k], kPresentFlag));
  }

  __device__ __forceinline__ void store_out(int64_t token, C combined, bool present) const {
    const Token t = token_at(p, token, false);
    if (p.marks()) {
      store_marked<S>(p.out, t, combined, present);
    } else {
      store<S>(p.out, t, combined);
    }
  }

  // Level token where no advantage is negative: whoever has the smallest I(A) shares the weight. As solve_tokens, but
  // four tokens a thread.
  __device__ __forceinline__ void solve_plain_tokens(int64_t first, int whole, int count, double& mine_low,
                                                     double& mine_high, double& values, double& used) {
    const int lane = threadIdx.x % 32;
    for (int base = kQuad * (threadIdx.x - lane); base < count; base += kQuad * kThreads) {
      const int k = base + kQuad * lane;
      const bool there = k < count;
      const unsigned flags = there ? this->flags_of_quad(k) : 0;
      const C inf = static_cast<C>(HUGE_VAL);
      C low[kQuad] = {inf, inf, inf, inf}, shares[kQuad];
      int ties[kQuad] = {};
      for (int i = 0; i < p.n; ++i) {
        Pack<C, kQuad> x = {};
        if (there) x = pack<C, kQuad>(tile.x + i * tile.stride + k);
#pragma unroll
        for (int t = 0; t < kQuad; ++t) {
          const Entry<C> e = this->template entry<true>(i, k + t, x.at[t], flags, t);
          const C gated = e.taken ? e.gated : inf;
          ties[t] = gated < low[t] ? 1 : gated == low[t] ? ties[t] + 1 : ties[t];
          low[t] = static_cast<C>(fmin(low[t], gated));
        }
      }
      Pack<C, kQuad> combined = {};
      int present = 0;
#pragma unroll
      for (int t = 0; t < kQuad; ++t) {
        shares[t] = C{1} / static_cast<C>(ties[t]);
        if (low[t] < inf) values += static_cast<double>(low[t]), ++present;
      }
      used += present;
      for (int i = 0; i < p.n; ++i) {
        Pack<C, kQuad> x = {};
        if (there) x = pack<C, kQuad>(tile.x + i * tile.stride + k);
        C weights{0};
#pragma unroll
        for (int t = 0; t < kQuad; ++t) {
          const Entry<C> e = this->template entry<true>(i, k + t, x.at[t], flags, t);
          const C weight = e.taken && e.gated == low[t] ? shares[t] : C{0};
          x.at[t] = weight * e.advantage;
          combined.at[t] += x.at[t];
          weights += weight;
        }
        if (p.in_place && there) pack<C, kQuad>(tile.x + i * tile.stride + k) = x;
        const double sum = static_cast<double>(warp_sum(weights));
        if (lane == i) mine_low += sum;
        if (lane + 32 == i) mine_high += sum;
      }
      if (!p.in_place && there) put(first, k, whole, combined, flags);
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
        const Entry<C> e = this->entry(i, k);
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
        const Entry<C> e = this->entry(i, k);
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
      if (k < count && !p.in_place) keep_out(k, combined, present > 0);
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
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    double* sums = shared.sums[0];
    for (int k = warp; k < p.n + 2; k += kWarps) {
      double sum = 0.0;
#pragma unroll 4
      for (int b = lane; b < gridDim.x; b += 32) sum += block_sums(p, b)[k];
      sum = warp_sum(sum);
      if (lane == 0) sums[k] = sum;
    }
    __syncthreads();
    const double used = sums[p.n + 1], sum = threadIdx.x <= p.n ? sums[threadIdx.x] : 0.0;
    if (threadIdx.x < p.n)
      shared.weights[threadIdx.x] = p.solver == Solver::kFixed ? p.fixed_weight(threadIdx.x)
                                    : used > 0                 ? sum / used
                                                               : 1.0 / p.n;
    if (threadIdx.x == p.n) shared.values[0] = used > 0 ? sum / used : 0.0;
    __syncthreads();
    write_solution(0, 0);
  }

  // Where the moments of another block can be read once all have met.
  __device__ __forceinline__ const Moments* total_of(int block) const {
    if (p.meeting == Meeting::kCluster) return cluster().map_shared_rank(shared.total, block);
    return block_moments(p, block);
  }

  // Of all blocks, once they have met.
  __device__ __forceinline__ const Moments* met() const {
    return gridDim.x > 1 || solves_batch() ? shared.part : shared.total;
  }

  // The totals of all blocks, merged for every block (`everywhere`) or for the first: see met(). Called once, as it
  // arrives at the barrier of a cluster at which run() waits; no block's total is read after that.
  __device__ __forceinline__ void meet(bool everywhere) {
    if (p.meeting == Meeting::kGrid && threadIdx.x < p.n)
      block_moments(p, blockIdx.x)[threadIdx.x] = shared.total[threadIdx.x];
    wait_for_all(p.meeting);
    if (gridDim.x > 1 && (everywhere || blockIdx.x == 0)) {
      merge_blocks([](Moments& m, const Moments& x, double centre) { gather(m, x, centre); },
                   [](Moments& m, const Moments& x) { add_gathered(m, x); });
      const int i = threadIdx.x;
      if (__syncthreads_or(i < p.n && !gathered(shared.part[i], total_of(0)[i])))
        merge_blocks([](Moments& m, const Moments& x, double) { merge(m, x); }, Merge());
    }
    if (p.meeting == Meeting::kCluster) cluster().barrier_arrive();
  }

  // In part[n]: a slice of the blocks by each set of n threads, in block order, then the slices by a tree.
  template <class F, class G>
  __device__ __forceinline__ void merge_blocks(F add_block, G add_slice) {
    const int slices = min(kUnits / p.n, static_cast<int>(gridDim.x));
    for (int e = threadIdx.x; e < slices * p.n; e += kThreads) {
      const int i = e % p.n;
      const double centre = total_of(0)[i].mean;
      Moments m = Moments::empty();
#pragma unroll 1
      for (int b = e / p.n; b < gridDim.x; b += slices) add_block(m, total_of(b)[i], centre);
      shared.part[e] = m;
    }
    __syncthreads();
    merge_parts(shared.part, slices, p.n, add_slice);
  }

  // Pool `from` of the tile, where the caller looks for solve `to`.
  __device__ __forceinline__ void write_solution(int64_t to, int from) const {
    C* weights = static_cast<C*>(p.packed) + kStatistics * p.n;
    for (int i = threadIdx.x; i < p.n; i += kThreads)
      weights[to * p.n + i] = static_cast<C>(shared.weights[from * p.n + i]);
    if (threadIdx.x == 0) weights[p.solves() * p.n + to] = static_cast<C>(shared.values[from]);
  }
};

}  // namespace pama
