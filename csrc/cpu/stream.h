// Few objectives, side by side or each by itself: observed and combined in one walk over memory. AVX-512 has registers
// for their sums; with AVX2, whose sums the compiler keeps on the stack, that still costs less than a tile. And one
// alone of those side by side, where the others have no weight. Included once per instruction set.
#pragma once

#include "combiner.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
class Streamer : protected Combiner<C> {
 protected:
  using typename Combiner<C>::V;
  using typename Combiner<C>::M;
  template <int kN>
  using TokenSums = typename Combiner<C>::template TokenSums<kN>;
  using Combiner<C>::all;
  using Combiner<C>::can_be_plain;
  using Combiner<C>::floor;
  using Combiner<C>::gapless;
  using Combiner<C>::kInf;
  using Combiner<C>::kLanes;
  using Combiner<C>::kLine;
  using Combiner<C>::known;
  using Combiner<C>::lanes;
  using Combiner<C>::many;
  using Combiner<C>::normalizer;
  using Combiner<C>::p;
  using Combiner<C>::scale;
  using Combiner<C>::scaled;
  using Combiner<C>::held;
  using Combiner<C>::tile;
  using Combiner<C>::wanted;
  using Combiner<C>::weight;

  static constexpr int kFew = PAMA_VECTOR_BYTES == 64 ? 4 : PAMA_VECTOR_BYTES == 32 ? 6 : 0;  // objectives

  explicit Streamer(const CombineParams& params)
      : Combiner<C>(params), adjacent(pama::adjacent(params.advantages, params.n, params.dtype)) {
    unbroken = !p.order && !p.sums && !p.in_place && !p.marks() && !normalizer.active();
    for (int i = 0; i < p.n; ++i) unbroken &= gapless(p.advantages[i], adjacent ? p.n : 1);
    gates_unbroken = !p.log_ratio.data || (p.log_ratio_dtype == p.dtype && gapless(p.log_ratio, 1));
    streams = unbroken && gates_unbroken && 1 < p.n && p.n <= kFew && can_be_plain;
    reads_mask = p.mask.data && size_of(p.mask_dtype) == 1 && gapless(p.mask, 1);
    distant = p.tokens() * p.n * size_of(p.dtype) > kNear;
  }

  // The statistics of a tile and, if `combine`, its combination: of each token if there are shares, else under the
  // weights wanted. Bit for bit what observing and combining it by way of scratch gives, and false, with nothing
  // merged, if that is what has to be done: because of how things are stored, or because a number is not finite.
  template <class S>
  bool stream(int64_t t, int count, Moments* m, bool combine, TokenShares* shares) {
    bool done = false;
    if constexpr (kFew > 0) {
      if (!streams || count % kLanes != 0 || !begin_all(count, m)) return false;
      C* const out = this->template destination<S>(t, count);
      [&]<int... kN>(std::integer_sequence<int, kN...>) {
        static_cast<void>(
            ((p.n == kN + 2 && (done = walk<kN + 2, S>(t, count, m, combine, shares, out), true)) || ...));
      }(std::make_integer_sequence<int, kFew ? kFew - 1 : 0>());
      if (done && combine && out == tile.out) store_plane<S>(p, p.out, t, count, out);
    }
    return done;
  }

  // The combination of a tile, as combine_tile() has it, where one objective is wanted; or false, and nothing is done.
  // `moments` have seen the tile.
  template <class S>
  bool stream_one(int64_t t, int count, const Moments* moments) {
    if constexpr (std::is_same_v<S, C>) {
      if (!unbroken || many != 1 || weight[0] == 0 || moments[wanted[0]].nonfinite > 0 || count % kLanes != 0)
        return false;
      C* const out = this->template destination<S>(t, count);
      [&]<int... kStep>(std::integer_sequence<int, kStep...>) {
        const int step = adjacent ? p.n : 1;
        const bool shuffled = ((step == kStep + 1 && (walk_one<kStep + 1>(t, count, step, out), true)) || ...);
        if (!shuffled) walk_one<0>(t, count, step, out);
      }(std::make_integer_sequence<int, kShuffled>());
      if (out == tile.out) store_plane<S>(p, p.out, t, count, out);
      return true;
    }
    return false;
  }

  // Whether each objective has a centre for the next tile. If so they begin to be held.
  bool begin_all(int count, const Moments* m) {
    for (int i = 0; i < p.n; ++i)
      if (!held.any(i) && !known(m[i], count)) return false;
    for (int i = 0; i < p.n; ++i)
      if (!held.any(i)) held.begin(i, m[i].mean, m[i].count);
    return true;
  }

  // The bytes that tell what is valid of a tile: the mask's own, or made in `set`.
  const uint8_t* bytes_of_mask(int64_t t, int count, int8_t* set) const {
    if (reads_mask) return pama::PAMA_ISA::at<const uint8_t>(p.mask, 0, t);
    if (p.mask.data) {
      load_mask(p, t, count, set);
    } else {
      memset(set, -1, count);
    }
    return reinterpret_cast<const uint8_t*>(set);
  }

  const bool adjacent;
  bool unbroken;        // what is read and written are the advantages themselves, which stand without gaps
  bool gates_unbroken;  // what gates are made of, too, and is of the same type

 private:
  static constexpr int kNear = 1 << 20;                   // bytes: what is not larger may be in a cache of the core
  static constexpr int kAhead = 128 * PAMA_VECTOR_BYTES;  // bytes of the advantages

  template <int kN, class S>
  bool walk(int64_t t, int count, Moments* m, bool combine, TokenShares* shares, C* out) {
    if (shares)
      return scaled ? walk<kN, true, true, S>(t, count, m, combine, shares, out)
                    : walk<kN, true, false, S>(t, count, m, combine, shares, out);
    return scaled ? walk<kN, false, true, S>(t, count, m, combine, shares, out)
                  : walk<kN, false, false, S>(t, count, m, combine, shares, out);
  }
  template <int kN, bool kTokens, bool kScaled, class S>
  bool walk(int64_t t, int count, Moments* m, bool combine, TokenShares* shares, C* out) {
    using Mask = Where<V, M>;
    // Vector r of the objectives side by side, or of objective r.
    const S* row[kN];
    const int step = adjacent ? kN : 1, apart = step * kBlock<C>;
    const bool side_by_side = adjacent;
    const int between = adjacent ? kLine - kBlock<C> : 0;  // what two lines are further apart than two rows
    // What is not there, or not so, is made up, so that the loop need not ask.
    alignas(64) S none[kTileTokens];
    alignas(64) int8_t set[kTileTokens];
    const uint8_t* const mask = bytes_of_mask(t, count, set);
    const S* log_ratio = none;
    if (p.log_ratio.data) {
      log_ratio = pama::PAMA_ISA::at<const S>(p.log_ratio, 0, t);
    } else {
      fill(none, 0, count, S{});
    }
    const V high = all(p.log_ratio.data ? at_most<C>(p.log_high) : kInf), even = all(C{1} / kN);
    Sums<C> of[kN];
    V around[kN], factor[kN], weight_of[kN];
    TokenSums<kTokens ? kN : 1> tokens;
    tokens.clear();
    bool weighted[kN];
    int valid_count = 0, active_count = 0;
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) {
      row[i] = side_by_side ? pama::PAMA_ISA::at<const S>(p.advantages[0], 0, t) + i * kBlock<C>
                            : pama::PAMA_ISA::at<const S>(p.advantages[i], 0, t);
      of[i].clear();
      around[i] = all(held.centre[i]);
      factor[i] = all(scale[i]);
      weight_of[i] = V{};
      weighted[i] = false;
    }
    for (int j = 0; j < many && combine && !kTokens; ++j) {
      weighted[wanted[j]] = true;
      weight_of[wanted[j]] = all(weight[j]);
    }
    constexpr int64_t kTokensAhead = kAhead / sizeof(S) / kN;
    for (int k = 0; k < count; k += kLanes) {
      if (distant && k % kLine == 0) {
#pragma GCC unroll 8
        for (int r = 0; r < kN; ++r) __builtin_prefetch(row[r] + (k + kTokensAhead) * step + r * between);
        __builtin_prefetch(log_ratio + k + kTokensAhead);
      }
      const Mask valid = Mask::nonzero(mask + k), open = valid.at_most(load_vector<C>(log_ratio + k), high);
      const M both = Sums<C>::counted(open);
      valid_count += valid.count();
      V rows[kN], a[kN], combined{};
#pragma GCC unroll 8
      for (int r = 0; r < kN; ++r) a[r] = rows[r] = load_blocks<C>(row[r] + k * step, apart);
      if (side_by_side) part<kN, C>(rows, [&](int i, V entry) { a[i] = entry; });
#pragma GCC unroll 8
      for (int i = 0; i < kN; ++i) {
        a[i] = of[i].template add<kScaled>(valid, open, both, a[i], a[i], around[i], factor[i]);
        if (!kTokens && weighted[i]) combined = valid.add(combined, weight_of[i] * a[i]);
      }
      if constexpr (kTokens) {
        combined = tokens.add(kN, a, valid, open, even);
        active_count += open.count();
      }
      if (kTokens || combine) this->put(out, k, combined);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kN; ++i) held.put(i, of[i]);
    const bool plain = held.fold(0, kN, valid_count, (1 << kN) - 1, true, m);
    if constexpr (kTokens)
      if (plain) this->template add_shares<kN>(kN, tokens, valid_count, active_count, *shares);
    return plain;
  }

  // step: from one token to the next. kStep: as of every_entry().
  template <int kStep>
  void walk_one(int64_t t, int count, int64_t step, C* out) {
    alignas(64) int8_t set[kTileTokens];
    const uint8_t* const mask = bytes_of_mask(t, count, set);
    const C* const src = pama::PAMA_ISA::at<const C>(p.advantages[wanted[0]], 0, t);
    const V factor = all(scale[wanted[0]]), share_of = all(weight[0]), lowest = all(floor);
    auto weigh = [&](int k, V entry) {
      this->put(out, k, Where<V, M>::nonzero(mask + k).add(V{}, this->weighed(entry, lowest, factor, share_of)));
    };
    // The last vector of all is read entry by entry: those of the others would reach beyond the tensor, as far as this
    // objective stands behind the first.
    const int whole = count - (kStep > 1 && t + count == p.tokens() ? kLanes : 0);
    for (int k = 0; k < whole; k += kLanes) weigh(k, every_entry<kStep>(src + k * step, step, Places<C>{}));
    for (int k = whole; k < count; k += kLanes) {
      alignas(64) C entries[kLanes];
      load_run(src + k * step, step, kLanes, entries);
      weigh(k, this->vec(entries));
    }
  }

  bool streams, distant, reads_mask;
};

}  // namespace PAMA_ISA
}  // namespace pama
