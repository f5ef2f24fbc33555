// What is added up of tiles of which all is plain (see observe.h): of one objective as vectors, of as many as a vector
// has lanes folded to numbers at once, and of tiles, one after the other, held around one centre until they are merged
// into moments. Included once per instruction set.
#pragma once

#include "isa.h"
#include "lanes.h"
#include "pama/moments.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

// Of one objective. Comparisons are what takes the time where not all is plain: here a maximum or a test of integers
// does their work.
template <class C>
struct Sums {
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;

  V deviation, squares, active, low, high;
  M counts;

  void clear() {
    deviation = squares = active = V{};
    low = V{} + std::numeric_limits<C>::infinity(), high = -low;
    counts = M{};
  }
  // The larger of x and 0, as integers, of which a core makes twice as many in a cycle as of floats: NaN may pass.
  static V positive(V x) { return (V)larger((M)x, M{}); }

  // Returns A_i. kScaled: some factor is not 1, and where one is smaller A_i may be 0 and the positive part of what is
  // processed not.
  template <bool kScaled>
  V add(Where<V, M> valid, Where<V, M> open, M both, V entry, V processed, V around, V factor) {
    const V d = valid.only(entry - around), part = positive(processed), advantage = kScaled ? part * factor : part;
    deviation += d;
    squares += d * d;
    low = valid.lower(entry, low);
    high = valid.higher(entry, high);
    active = open.add(active, advantage);
    if (kScaled) {
      counts = valid.add_if_positive(counts, M{} + 1, (M)part);
      counts = open.add_if_positive(counts, M{} + kOpen, (M)advantage);
    } else {
      counts = valid.add_if_positive(counts, both, (M)part);
    }
    return advantage;
  }

  // Counted at once: 1 for a positive part that is not 0, and kOpen more if A_i passes its gate and is not 0.
  static constexpr I kOpen = 1 << 16;
  static_assert(kTileTokens < kOpen && kTileTokens < INT32_MAX / (kOpen + 1));
  static M counted(Where<V, M> open) { return open.add(M{} + 1, M{} + kOpen); }
};

template <class C>
class HeldSums {
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes;
  static constexpr C kInf = std::numeric_limits<C>::infinity();

 public:
  static constexpr int kMost = kLanes > 8 ? kLanes : 8;  // objectives that are folded at once

  HeldSums(int objectives, const C* factors, bool some_factor, bool is_normalized)
      : n(objectives), scale(factors), scaled(some_factor), normalized(is_normalized) {
    fill(count, 0, n, 0);
    for (int j = n; j < kMost; ++j) put(j, Sums<C>{});  // what is folded with others
  }

  // Whether something is held of objective i, and so its centre stands.
  bool any(int i) const { return count[i] > 0; }

  // If not: a centre for what comes now, which is merged once there is three times as much as the centre is the mean
  // of.
  void begin(int i, double mean, int64_t of) {
    centre[i] = centre_of(mean);
    enough[i] = 3 * of;
    positive[i] = open[i] = 0;
    drift[i] = spread[i] = active[i] = 0.0;
    low[i] = HUGE_VAL, high[i] = -HUGE_VAL;
  }
  static C centre_of(double mean) {
    const C of = static_cast<C>(mean);
    return of - of == 0 ? of : C{0};  // the sum of huge entries has overflowed
  }

  // Of a tile and the j-th of the objectives that are folded next.
  void put(int j, const Sums<C>& sums) {
    memcpy(vectors.deviation[j], &sums.deviation, sizeof(V));
    memcpy(vectors.squares[j], &sums.squares, sizeof(V));
    memcpy(vectors.low[j], &sums.low, sizeof(V));
    memcpy(vectors.high[j], &sums.high, sizeof(V));
    memcpy(vectors.active[j], &sums.active, sizeof(V));
    memcpy(vectors.counts[j], &sums.counts, sizeof(M));
  }

  // What has been added up of each of several objectives.
  template <int kMany>
  struct Folded {
    C drifts[kMany], spreads[kMany], lows[kMany], highs[kMany], actives[kMany];
    I counts[kMany];
  };

  // Of the `many` objectives from i on, at most kMost, whose sums have been put: holds those that `fit`, and of which
  // all has been plain; or none, if all would have to be. Returns which, a bit for each. kRows: a power of two, not
  // less.
  template <int kRows = 4>
  __attribute__((noinline)) uint64_t fold(int i, int many, int valid_count, uint64_t fit, bool all_or_none,
                                          Moments* m) {
    if constexpr (kRows < kMost)
      if (many > kRows) return fold<2 * kRows>(i, many, valid_count, fit, all_or_none, m);
    asm volatile("" : : "r"(&vectors) : "memory");  // for the reason told in lanes.h
    Folded<kRows> of;
    I valid[kRows];
    fold_rows<Add>(vectors.deviation, of.drifts);
    fold_rows<Add>(vectors.squares, of.spreads);
    fold_rows<Smaller>(vectors.low, of.lows);
    fold_rows<Larger>(vectors.high, of.highs);
    fold_rows<Add>(vectors.active, of.actives);
    fold_rows<Add>(vectors.counts, of.counts);
    fill(valid, 0, kRows, valid_count);

    bool suspect = scaled;
    for (int j = 0; j < kRows; ++j) suspect |= !(of.drifts[j] - of.drifts[j] == 0);
    uint64_t plain = fit;
    for (int j = 0; j < many && suspect; ++j) {
      const C largest = of.highs[j] * scale[i + j];  // of A_i, if that is x
      if (!(of.drifts[j] - of.drifts[j] == 0 && (normalized || largest < kInf))) plain &= ~(uint64_t{1} << j);
    }
    if (all_or_none && plain != fit) return 0;
    for (int j = 0; j < many && plain != ~uint64_t{0} >> (64 - many); ++j) {
      if (plain >> j & 1) continue;
      of.drifts[j] = of.spreads[j] = of.actives[j] = C{0};
      of.lows[j] = kInf, of.highs[j] = -kInf;
      of.counts[j] = valid[j] = 0;
    }
    if (many == kRows) {  // as vectors
      hold(of, i, 0, kRows, valid, m);
    } else {
      hold(of, i, 0, many, valid, m);
    }
    return plain;
  }

  // Of the objectives from i on what has been folded of as many from j on, of valid[0..many) entries; merged if each
  // has enough.
  template <class F>
  inline __attribute__((always_inline)) void hold(const F& of, int i, int j, int many, const I* valid, Moments* m) {
    int64_t lacking = -1;  // negative if each lacks some
    for (int l = 0; l < many; ++l) {
      positive[i + l] += of.counts[j + l] % Sums<C>::kOpen;
      open[i + l] += of.counts[j + l] / Sums<C>::kOpen;
      add(i + l, valid[l], of.drifts[j + l], of.spreads[j + l], of.actives[j + l], of.lows[j + l], of.highs[j + l]);
    }
    for (int l = 0; l < many; ++l) lacking &= count[i + l] - enough[i + l];
    for (int l = 0; l < many && lacking >= 0; ++l) merge_if_enough(i + l, m[i + l]);
  }

  // Adds what has been added up of `valid` entries in another way.
  inline __attribute__((always_inline)) void add(int i, int64_t valid, double deviations, double squares, double gated,
                                                 double smallest, double largest) {
    count[i] += valid;
    drift[i] += deviations;
    spread[i] += squares;
    active[i] += gated;
    low[i] = smallest < low[i] ? smallest : low[i];
    high[i] = largest > high[i] ? largest : high[i];
  }
  void merge_if_enough(int i, Moments& m) {
    if (count[i] >= enough[i]) merge_into(i, m);
  }

  void merge_into(Moments* m) {
    for (int i = 0; i < n; ++i) merge_into(i, m[i]);
  }
  void merge_into(int i, Moments& m) {
    add_held(i, m);
    count[i] = 0;
  }

  // m with what is held of objective i, which goes on being held.
  void add_held(int i, Moments& m) const {
    if (!any(i)) return;
    Moments here = Moments::empty();
    here.count = count[i];
    here.positive = here.nonzero = positive[i];
    here.clipped = positive[i] - open[i];
    settle(here, static_cast<double>(centre[i]), drift[i], spread[i]);
    here.active = active[i];
    here.min = low[i] + 0.0;  // of zeros which came first depends on who looks
    here.max = high[i] + 0.0;
    merge(m, here);
  }

  C centre[kMaxObjectives];

 private:
  template <class Op, class T, int kRows>
  static inline __attribute__((always_inline)) void fold_rows(const T (&rows)[kMost][kLanes], T (&folded)[kRows]) {
    using Row = std::conditional_t<std::is_same_v<T, C>, V, M>;
    constexpr int many = kRows < kLanes ? kRows : kLanes;
    for (int r = 0; r < kRows; r += many) {
      const auto of = pama::PAMA_ISA::fold_rows<Op, kLanes, many>(reinterpret_cast<const Row*>(rows) + r);
      memcpy(folded + r, &of, sizeof of);
    }
  }

  struct Vectors {
    alignas(64) C deviation[kMost][kLanes], squares[kMost][kLanes], low[kMost][kLanes], high[kMost][kLanes],
        active[kMost][kLanes];
    alignas(64) I counts[kMost][kLanes];
  };

  const int n;
  const C* const scale;
  const bool scaled, normalized;
  Vectors vectors;
  // What is held: of `count` finite entries. `enough`: how many are merged.
  int64_t count[kMaxObjectives], enough[kMaxObjectives], positive[kMaxObjectives], open[kMaxObjectives];
  double drift[kMaxObjectives], spread[kMaxObjectives], active[kMaxObjectives], low[kMaxObjectives],
      high[kMaxObjectives];
};

}  // namespace PAMA_ISA
}  // namespace pama
