// Objectives side by side, at least as many as a vector has lanes, each in a lane of its own: a vector is of one token,
// and nothing has to be parted, nor folded across lanes. What is left over with AVX2, up to half a vector, takes
// vectors of several tokens. Included once per instruction set.
#pragma once

#include "stream.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
class Abreast : protected Streamer<C> {
 protected:
  using typename Streamer<C>::V;
  using typename Streamer<C>::M;
  using typename Streamer<C>::I;
  using Streamer<C>::adjacent;
  using Streamer<C>::all;
  using Streamer<C>::can_be_plain;
  using Streamer<C>::further;
  using Streamer<C>::held;
  using Streamer<C>::kInf;
  using Streamer<C>::kLanes;
  using Streamer<C>::kLine;
  using Streamer<C>::near_by;
  using Streamer<C>::p;
  using Streamer<C>::scale;
  using Streamer<C>::scaled;
  using Streamer<C>::tile;
  using Streamer<C>::unbroken;
  using Streamer<C>::vec;

  explicit Abreast(const CombineParams& params) : Streamer<C>(params) {
    const int full = p.n / kLanes, left = p.n % kLanes;
    tail = left == 0 ? 0 : kLanes;
    if (PAMA_VECTOR_BYTES == 32 && 0 < left && left <= 2 * kNarrow) tail = left <= kNarrow ? kNarrow : 2 * kNarrow;
    tries_abreast = unbroken && adjacent && can_be_plain && this->gates_unbroken && p.n > this->kFew && full > 0 &&
                    p.n >= kUsed * (full * kLanes + tail);
  }

  // The statistics of a tile, of which it is known what to prefetch: bit for bit what observing it by way of scratch
  // gives. Or false, with nothing merged, if that is what has to be done: because of its length, or because a number is
  // not finite; then the tiles to come are not to be tried. combine: whether to combine it meanwhile, under the
  // weights wanted, and then whether that could be done.
  template <class S>
  bool observe_abreast(int64_t t, int count, Moments* m, bool& combine) {
    if (count % kLanes != 0) return false;
    const int valid_count = load_gates_abreast<S>(t, count);
    tries_abreast = begin_any<S>(t, count, valid_count, m);
    if (!tries_abreast) return false;
    tries_abreast = scaled ? add_columns<S, true>(t, count, m, combine) : add_columns<S, false>(t, count, m, combine);
    if (!tries_abreast) return false;
    I valid[kLanes];
    fill(valid, 0, kLanes, valid_count);
    for (int i = 0; i < p.n; i += kLanes) held.hold(folded, i, i, smaller(kLanes, p.n - i), valid, m);
    return true;
  }

  bool tries_abreast;  // whether to: as things are stored, and after all that has been seen

 private:
  // Entries that are added to a sum between taking it from memory and putting it back, the tokens of as many vectors of
  // whole tokens, and how many objectives take 8 bytes.
  static constexpr int kPair = 2, kPairTokens = kPair * kLanes;
  static constexpr int kNarrow = 8 / static_cast<int>(sizeof(C));
  // Of the lanes at least so many are in use; on AVX-512, where masks cost nothing in scratch, this has not been timed.
  static constexpr double kUsed = PAMA_VECTOR_BYTES == 64 ? 0.8 : 2.0 / 3;

  template <int kWidth>
  using Width = std::integer_sequence<int, kWidth>;

  // Sums of as many objectives as its width, over tokens kLanes apart, as in scratch: of token t and objective i, at
  // t % kLanes * width + i.
  struct Column {
    alignas(64) C deviation[kLanes * kLanes], squares[kLanes * kLanes], active[kLanes * kLanes];
    alignas(64) C low[kLanes], high[kLanes];
    alignas(64) I counts[kLanes];
  };

  // f(width, its number, its first objective) for each column. The last begins among the objectives of the one before,
  // unless they come out even.
  template <class F>
  inline __attribute__((always_inline)) void for_columns(F f) {
    const int full = p.n / kLanes;
    for (int c = 0; c < full; ++c) f(Width<kLanes>{}, c, c * kLanes);
    if (tail == kLanes) f(Width<kLanes>{}, full, p.n - kLanes);
    if constexpr (PAMA_VECTOR_BYTES == 32) {
      if (tail == kNarrow) f(Width<kNarrow>{}, full, p.n - kNarrow);
      if (tail == 2 * kNarrow) f(Width<2 * kNarrow>{}, full, p.n - 2 * kNarrow);
    }
  }

  // kWidth objectives of as many tokens as it takes.
  template <int kWidth, class S>
  static inline __attribute__((always_inline)) V load_tokens(const S* x, int64_t n) {
    if constexpr (kWidth == kLanes) {
      return load_vector<C>(x);
    } else if constexpr (!std::is_same_v<S, C>) {
      alignas(64) C flat[kLanes];
      for (int l = 0; l < kLanes; l += kWidth) load_run(x + l / kWidth * n, 1, kWidth, flat + l);
      return vec(flat);
    } else if constexpr (kWidth > kNarrow) {
      return load_blocks<C>(x, n);
    } else {
      auto token = [&](int l) {
        double of;
        memcpy(&of, x + l * n, sizeof of);
        return of;
      };
      return [&]<int... kToken>(std::integer_sequence<int, kToken...>) {
        return (V)Doubles{token(kToken)...};
      }(Places<double>{});
    }
  }
  // What these tokens have in common with all of their objectives.
  template <int kWidth>
  static inline __attribute__((always_inline)) M spread(const I* of) {
    if constexpr (kWidth == kLanes) {
      return M{} + *of;
    } else {
      M tokens;
      memcpy(&tokens, of, sizeof tokens);
      return [&]<int... kLane>(std::integer_sequence<int, kLane...>) {
        return __builtin_shufflevector(tokens, tokens, (kLane / kWidth)...);
      }(Places<C>{});
    }
  }

  // Masks for each token, and what a positive entry of it counts. Returns how many are valid.
  template <class S>
  int load_gates_abreast(int64_t t, int count) {
    alignas(64) int8_t set[kTileTokens];
    const uint8_t* const mask = this->bytes_of_mask(t, count, set);
    const S* const log_ratio = p.log_ratio.data ? pama::PAMA_ISA::at<const S>(p.log_ratio, 0, t) : nullptr;
    const V highest = all(log_ratio ? at_most<C>(p.log_high) : kInf);
    const auto& ahead = tile.observed;
    int valid_count = 0;
    for (int k = 0; k < count; k += kLanes) {
      if (k % kLine == 0) {
        const int64_t by = k / kLine * tile.ahead_step;
        this->near ? (near_by(ahead.gates + by), near_by(ahead.mask + by))
                   : (further(ahead.gates + by), further(ahead.mask + by));
        near_by(tile.result + by);
      }
      const auto valid = Where<V, M>::nonzero(mask + k);
      const auto open = log_ratio ? valid.at_most(load_vector<C>(log_ratio + k), highest) : valid;
      const M is_open = open.add(M{}, M{} - 1), counts = Sums<C>::counted(open);
      vec(absent + k) = valid.add(M{} - 1, M{} + 1);
      vec(opened + k) = is_open;
      vec(counted + k) = valid.add(M{}, counts);
      valid_count += valid.count();
    }
    return valid_count;
  }

  // As observe() begins. Returns false if a mean is not finite.
  template <class S>
  bool begin_any(int64_t t, int count, int valid_count, const Moments* m) {
    if (this->begin_all(count, m)) return true;
    const S* const x = pama::PAMA_ISA::at<const S>(p.advantages[0], 0, t);
    C sums[kMaxObjectives];
    for_columns([&]<int kWidth>(Width<kWidth>, int, int i) { sum_tokens<kWidth>(x + i, count, sums + i); });
    for (int i = 0; i < p.n; ++i) {
      const double sum = static_cast<double>(sums[i]);
      if (held.any(i)) continue;
      if (this->known(m[i], count)) {
        held.begin(i, m[i].mean, m[i].count);
      } else if (sum - sum == 0) {
        held.begin(i, valid_count > 0 ? sum / valid_count : 0.0, 0);
      } else {
        return false;
      }
    }
    return true;
  }

  // Of one column, each in the order of mean().
  template <int kWidth, class S>
  __attribute__((noinline)) void sum_tokens(const S* x, int count, C* to) {
    constexpr int tokens = kLanes / kWidth, kMost = kWidth < 4 ? kWidth : 4;
    const int64_t n = p.n;
    alignas(64) C sums[kLanes * kWidth];
    for (int r = 0; r < kWidth; r += kMost) {
      V even[kMost] = {}, odd[kMost] = {};
      auto add = [&](V* of, int k) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int u = 0; u < kMost; ++u) {
          const int token = k + (r + u) * tokens;
          of[u] += (V)((M)load_tokens<kWidth>(x + token * n, n) & ~spread<kWidth>(absent + token));
        }
      };
      int k = 0;
      for (; k + kLanes < count; k += 2 * kLanes) add(even, k), add(odd, k + kLanes);
      if (k < count) add(even, k);
#pragma GCC unroll 4
      for (int u = 0; u < kMost; ++u) vec(sums + (r + u) * kLanes) = even[u] + odd[u];
    }
    fold_tokens<Add, kWidth * kLanes, kWidth>(sums, to);
  }

  // Returns whether all is plain; then `folded` holds what has been added up of each objective.
  template <class S, bool kScaled>
  bool add_columns(int64_t t, int count, const Moments* m, bool& combine) {
    const int n = p.n;
    for (int c = 0; c * kLanes < n; ++c) clear(column[c]);
    const S* const x = pama::PAMA_ISA::at<const S>(p.advantages[0], 0, t);
    const char* ahead = tile.ahead[0];
    // What the columns and the combination have in common, cache lines and masks, is to stay near meanwhile.
    const int chunk = larger(kTileBytes / static_cast<int>(sizeof(S)) / n / kPairTokens, 1) * kPairTokens;
    for (int k = 0, until; k < count; k = until) {
      until = smaller(k + chunk, count);
      const int even = k + (until - k) / kPairTokens * kPairTokens;
      for_columns([&]<int kWidth>(Width<kWidth>, int c, int i) {
        ahead = add_blocks<kWidth, kPair, kScaled>(x + i, i, k, even, column[c], ahead);
        if (even < until) add_blocks<kWidth, 1, kScaled>(x + i, i, even, until, column[c], ahead);
      });
      combine = combine && this->template stream_one<S>(t + k, until - k, m);
    }
    for_columns([&]<int kWidth>(Width<kWidth>, int c, int i) { fold_column<kWidth>(column[c], i); });
    bool plain = true;
    for (int i = 0; i < n; ++i) plain &= folded.drifts[i] - folded.drifts[i] == 0;
    return plain;
  }

  static void clear(Column& of) {
    for (int k = 0; k < kLanes * kLanes; k += kLanes)
      vec(of.deviation + k) = vec(of.squares + k) = vec(of.active + k) = V{};
    vec(of.low) = all(kInf), vec(of.high) = all(-kInf), vec(of.counts) = M{};
  }

  // The tokens from..until of a column whose first objective is i, the first of the tile's at x; kMany times kLanes of
  // them at a time. Returns what to prefetch next.
  template <int kWidth, int kMany, bool kScaled, class S>
  __attribute__((noinline)) const char* add_blocks(const S* x, int i, int from, int until, Column& to,
                                                   const char* ahead) {
    constexpr int tokens = kLanes / kWidth;
    constexpr int bytes = kMany * kLanes * static_cast<int>(sizeof(S)), fetches = bytes > 64 ? bytes / 64 : 1;
    const int64_t n = p.n;
    const bool near = this->near;
    V around, factor;
    if constexpr (kWidth == kLanes) {
      around = load_vector<C>(held.centre + i), factor = load_vector<C>(scale + i);
    } else {
      alignas(64) C each[2][kLanes];
      for (int l = 0; l < kLanes; ++l) each[0][l] = held.centre[i + l % kWidth], each[1][l] = scale[i + l % kWidth];
      around = vec(each[0]), factor = vec(each[1]);
    }
    V low = vec(to.low), high = vec(to.high);
    M counts = vec(to.counts);
    for (int k = from; k < until; k += kMany * kLanes) {
      const S* entries = x + k * n;
      for (int r = 0; r < kWidth; ++r, entries += tokens * n) {
#pragma GCC unroll 2
        for (int f = 0; f < fetches; ++f, ahead += bytes / fetches) near ? near_by(ahead) : further(ahead);
        const int row = r * kLanes;
        V deviation = vec(to.deviation + row), squares = vec(to.squares + row), active = vec(to.active + row);
#pragma GCC unroll 2
        for (int u = 0; u < kMany; ++u) {
          const int token = k + u * kLanes + r * tokens;
          V entry = load_tokens<kWidth>(entries + u * kLanes * n, n);
          M gone = spread<kWidth>(absent + token);
          load_once(entry), load_once(gone);
          const M open = spread<kWidth>(opened + token), counting = spread<kWidth>(counted + token);
          const V d = (V)((M)(entry - around) & ~gone), or_nan = (V)((M)entry | gone);
          const V part = Sums<C>::positive(entry), advantage = kScaled ? part * factor : part;
          deviation += d;
          squares += d * d;
          low = smaller(or_nan, low);
          high = larger(or_nan, high);
          active += (V)((M)advantage & open);
          if (kScaled) {
            counts += if_positive((M)part, counting & 1) + if_positive((M)advantage, counting & Sums<C>::kOpen);
          } else {
            counts += if_positive((M)part, counting);
          }
        }
        vec(to.deviation + row) = deviation, vec(to.squares + row) = squares, vec(to.active + row) = active;
      }
    }
    vec(to.low) = low, vec(to.high) = high, vec(to.counts) = counts;
    return ahead;
  }

  // With AVX2 GCC would take it from memory wherever it is needed, and a core loads two vectors in a cycle.
  template <class T>
  static void load_once(T& x) {
    if constexpr (PAMA_VECTOR_BYTES == 32) asm("" : "+x"(x));
  }

  template <int kWidth>
  void fold_column(const Column& of, int i) {
    constexpr int sums = kWidth * kLanes;
    fold_tokens<Add, sums, kWidth>(of.deviation, folded.drifts + i);
    fold_tokens<Add, sums, kWidth>(of.squares, folded.spreads + i);
    fold_tokens<Add, sums, kWidth>(of.active, folded.actives + i);
    fold_tokens<Smaller, kLanes, kWidth>(of.low, folded.lows + i);
    fold_tokens<Larger, kLanes, kWidth>(of.high, folded.highs + i);
    fold_tokens<Add, kLanes, kWidth>(of.counts, folded.counts + i);
  }

  // By the tree of fold(), in lanes.h, until kWidth are left.
  template <class Op, int kMany, int kWidth, class T>
  static inline __attribute__((always_inline)) void fold_tokens(const T* of, T* to) {
    if constexpr (kMany == kWidth) {
      memcpy(to, of, sizeof(T) * kWidth);
    } else {
      constexpr int half = kMany / 2, many = half < kLanes ? half : kLanes;
      typedef T Some __attribute__((vector_size(sizeof(T) * many)));
      alignas(64) T left[half];
#pragma GCC unroll 16
      for (int k = 0; k < half; k += many) {
        Some a, b;
        memcpy(&a, of + k, sizeof a);
        memcpy(&b, of + half + k, sizeof b);
        a = Op::apply(a, b);
        memcpy(left + k, &a, sizeof a);
      }
      fold_tokens<Op, half, kWidth>(left, to);
    }
  }

  int tail;  // the width of the column of those that are left over, or 0
  alignas(64) I absent[kTileTokens + kLanes], opened[kTileTokens + kLanes], counted[kTileTokens + kLanes];
  Column column[(kMaxObjectives + kLanes - 1) / kLanes];
  typename HeldSums<C>::template Folded<kMaxObjectives> folded;
};

}  // namespace PAMA_ISA
}  // namespace pama
