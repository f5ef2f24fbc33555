// The CPU kernel of `combine`, compiled once per instruction set (csrc/cpu/isa_*.cpp).
//
// A tile of tokens is loaded objective by objective into cache-sized scratch, whatever its dtype and layout; everything
// after that is one arithmetic on unit-stride vectors. Few objectives without gaps need no scratch (stream.h), nor do
// the statistics of many side by side (abreast.h). Each objective goes through the same operations in the same order
// wherever it stands, so duplicated objectives tie exactly and permuting objectives permutes bits.
#include <cmath>

#include "abreast.h"
#include "isa.h"

namespace pama {
namespace PAMA_ISA {

template <class C>
class Kernel : Abreast<C> {
  using typename Abreast<C>::V;
  using typename Abreast<C>::M;
  using Abreast<C>::adjacent;
  using Abreast<C>::can_be_plain;
  using Abreast<C>::centre_of;
  using Abreast<C>::gated_at;
  using Abreast<C>::keep;
  using Abreast<C>::known;
  using Abreast<C>::kLanes;
  using Abreast<C>::kLine;
  using Abreast<C>::lanes;
  using Abreast<C>::lower_gates;
  using Abreast<C>::many;
  using Abreast<C>::mean;
  using Abreast<C>::normalizer;
  using Abreast<C>::p;
  using Abreast<C>::stride;
  using Abreast<C>::held;
  using Abreast<C>::tile;
  using Abreast<C>::tries_abreast;
  using Abreast<C>::vec;
  using Abreast<C>::want;
  using Abreast<C>::wanted;

 public:
  explicit Kernel(const CombineParams& params) : Abreast<C>(params) {}

  // Statistics of the tokens [first, last), merged into moments[n], and into the Gram matrix if there is one; and their
  // combination, if it can be guessed. The guess is looked at after 1, 4, 16, ... tiles: to change it late is to repair
  // all that came before.
  template <class S>
  void scan(int64_t first, int64_t last, Moments* moments, double* gram, const Moments* others, Guess* guess) {
    int64_t done = 0, look_after = 1;
    tiles(first, last, [&](int64_t t, int count) {
      bool combined = guess && guess->from != Guess::kNone, loaded = false;  // to scratch
      if (gram || !this->template stream<S>(t, count, moments, combined, nullptr)) {
        // What is wanted of several objectives is parted anyhow.
        const bool tries = tries_abreast && !gram && !(combined && many > 1);
        if (tries) look_ahead<S>(t, count);
        loaded = !tries || !this->template observe_abreast<S>(t, count, moments, combined);
        if (loaded) {
          load<S>(t, count);
          scan_tile(t, count, moments, gram);
          combined = false;
        }
      }
      if (!guess) return;
      if (++done == look_after) {
        look_after *= 4;
        Moments seen[kMaxObjectives];
        for (int i = 0; i < p.n; ++i) held.add_held(i, seen[i] = moments[i]);
        if (guess->look(p, others, seen, t)) {
          want(guess->weights);
          combined = false;
        }
      }
      if (guess->from == Guess::kNone || combined) return;
      if (loaded) {
        this->template combine_tile<S>(t, count, moments);
      } else {
        weigh_tile<S>(t, count, moments);
      }
    });
    held.merge_into(moments);
  }

  // The same for the tokens of the groups [first, last), and the maps that normalise them.
  template <class S>
  void scan_groups(int64_t first, int64_t last, Moments* moments, double* gram) {
    normalizer.measure(
        first, last, tile, stride, moments, [&](int64_t t, int count) { load<S>(t, count); },
        [&](int64_t t, int count) { scan_tile(t, count, moments, gram); });
    held.merge_into(moments);
  }

  // Raw moments of the samples [first, last), merged into moments[n].
  template <class S>
  void moments(int64_t first, int64_t last, Moments* to) {
    tiles(first, last, [&](int64_t t, int count) {
      load_samples<S>(t, count);
      for (int i = 0; i < p.n; ++i) {
        const C* const x = tile.x + i * stride;
        const C centre = centre_of(known(to[i], count) ? to[i].mean : mean(x, count));
        Moments here;
        if (!this->observe_samples(x, count, centre, here)) here = normalizer.range(tile, x, 0, count, &centre);
        if (!(here.m2 - here.m2 == 0)) here = normalizer.range(tile, x, 0, count);  // too far from what came before
        merge(to[i], here);
      }
    });
  }

  // The maps that normalise the groups [first, last).
  template <class S>
  void measure(int64_t first, int64_t last, Moments* moments) {
    normalizer.measure(
        first, last, tile, stride, moments, [&](int64_t t, int count) { load_samples<S>(t, count); },
        [](int64_t, int) { return Nothing{}; });
  }

  // The score of each of the rows [first, last): the sum of its valid entries, whatever they are; -0 if there are none.
  template <class S>
  void sum_rows(int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      double sums[kMaxObjectives];
      int64_t valid = 0;
      fill(sums, 0, p.n, 0.0);
      tiles(row * p.cols, (row + 1) * p.cols, [&](int64_t t, int count) {
        load_samples<S>(t, count);
        for (int i = 0; i < p.n; ++i) {
          V total{};
          M counted{};
          for (int k = 0; k < count; k += kLanes) {
            total += vec(tile.valid + k) ? vec(tile.x + i * stride + k) : V{};
            counted -= vec(tile.valid + k);
          }
          lanes.spill(total, counted);
          sums[i] += lanes.sum(0);
          if (i == 0) valid += lanes.count(1);
        }
      });
      C* to = static_cast<C*>(p.sums) + row * p.n;
      for (int i = 0; i < p.n; ++i) to[i] = valid ? static_cast<C>(sums[i]) : -C{0};
    }
  }

  // Normalises the one objective in place; what is not there becomes 0.
  template <class S>
  void rewrite(int64_t first, int64_t last) {
    tiles(first, last, [&](int64_t t, int count) {
      load_samples<S>(t, count);
      normalizer.apply(0, t, count, tile.x, tile.normal);
      for (int k = 0; k < count; k += kLanes) vec(tile.normal + k) = vec(tile.valid + k) ? vec(tile.normal + k) : V{};
      store_plane<S>(p, p.advantages[0], t, count, tile.normal);
    });
  }

  // The combination of the tokens [first, last) under fixed weights[n]; of weight 0 only what stands beside others is
  // read.
  template <class S>
  void weigh(int64_t first, int64_t last, const double* weights, const Moments* moments) {
    want(weights);
    tiles(first, last, [&](int64_t t, int count) { weigh_tile<S>(t, count, moments); });
  }

  // Level token: statistics, solve and combination of the tokens [first, last).
  template <class S>
  void tokens(int64_t first, int64_t last, Moments* moments, TokenShares& shares) {
    tiles(first, last, [&](int64_t t, int count) {
      if (solves_plainly() && this->template stream<S>(t, count, moments, true, &shares)) return;
      load<S>(t, count);
      tokens_tile<S>(t, count, moments, shares);
    });
    held.merge_into(moments);
  }

  // The same for the tokens of the groups [first, last), and the maps that normalise them.
  template <class S>
  void token_groups(int64_t first, int64_t last, Moments* moments, TokenShares& shares) {
    normalizer.measure(
        first, last, tile, stride, moments, [&](int64_t t, int count) { load<S>(t, count); },
        [&](int64_t t, int count) { tokens_tile<S>(t, count, moments, shares); });
    held.merge_into(moments);
  }

 private:
  // f(t, count) for each tile of the tokens [first, last). Of few objectives the first of several is a short one:
  // enough to know the centre of the next, which then may be streamed. In every layout, as bits depend on where tiles
  // end.
  template <class F>
  void tiles(int64_t first, int64_t last, F f) const {
    int64_t size = p.n <= Abreast<C>::kFew && last - first > stride ? (stride / 2 + 15) / 16 * 16 : stride;
    for (int64_t t = first; t < last; t += size, size = stride)
      f(t, static_cast<int>(smaller<int64_t>(size, last - t)));
  }

  // Level token: whether tokens of which all is plain need no more than their smallest A_i.
  bool solves_plainly() const { return p.solver != Solver::kFixed && !p.skip_inactive && !p.per_token; }

  void scan_tile(int64_t t, int count, Moments* moments, double* gram) {
    if (!gram) {
      this->template observe<Keep::kNothing>(t, count, moments);
      return;
    }
    gate_tile(this->template observe<Keep::kUnlessPlain>(t, count, moments), count, gram[p.n * p.n]);
    add_gram(count, gram);
  }

  template <class S>
  void tokens_tile(int64_t t, int count, Moments* moments, TokenShares& shares) {
    const uint64_t plain = this->template observe<Keep::kUnlessPlain>(t, count, moments);
    C* const out = this->template destination<S>(t, count);
    if (solves_plainly() && plain == ~uint64_t{0} >> (64 - p.n)) {
      this->solve_plain_tokens(count, shares, out);
    } else {
      for (int i = 0; i < p.n; ++i)
        if (plain >> i & 1 && !normalizer.active()) keep(i, tile.x + i * stride, count);
      this->template solve_tokens<S>(t, count, shares, out);
    }
    if (p.in_place) {
      for (int i = 0; i < p.n; ++i) store_plane<S>(p, p.advantages[i], t, count, tile.x + i * stride);
    } else if (out == tile.out) {
      store_plane<S>(p, p.out, t, count, out);
    }
  }

  // What is not wanted is not loaded, unless it stands beside several that are.
  template <class S>
  void weigh_tile(int64_t t, int count, const Moments* moments) {
    if (this->template stream_one<S>(t, count, moments)) return;
    const bool together = adjacent && !p.sums && many > 2;  // then in one walk over memory
    load_valid(p, t, count, tile);
    if (together) load_objectives<S>(p, p.advantages, true, t, count, tile.x, stride);
    for (int j = 0; j < many && !together; ++j) load_objective<S>(wanted[j], t, count, tile.x + wanted[j] * stride);
    this->template combine_tile<S>(t, count, moments);
  }

  template <class S>
  void load(int64_t t, int count) {
    load_valid(p, t, count, tile);
    load_gates(p, t, count, lower_gates, tile);
    load_all<S>(t, count);
    look_ahead<S>(t, count);
  }

  // Where the next tile stands, as if it followed without a gap; addresses beyond the tensor do no harm. Up to a fifth
  // of what is side by side, with gates and mask, is left to the loop that solves tokens, if there is one: memory
  // should have something to do then too, and it takes about a fifth of the time (on an Intel Xeon, at N = 10).
  template <class S>
  void look_ahead(int64_t t, int count) {
    const int64_t row = p.rows == 1 ? 0 : t / p.cols, col = t - row * p.cols;
    auto follow = [&](const Plane& q, int size, int64_t elements) {
      return q.data + (q.row * row + q.col * col + elements) * size;
    };
    auto share = [&](int i) {
      const Plane& q = p.advantages[adjacent ? 0 : i];
      return follow(q, sizeof(S), adjacent ? static_cast<int64_t>(count) * (p.n + i) : count * q.col);
    };
    const bool solves = p.level == Level::kToken && can_be_plain && solves_plainly();
    const char* const nothing = reinterpret_cast<const char*>(tile.valid);  // is near, and not shorter
    tile.ahead_step = kLine * sizeof(S);
    tile.late_many = adjacent && solves ? p.n / 5 : 0;
    const int early = p.n - tile.late_many;
    for (int i = 0; i < p.n; ++i) tile.ahead[i] = share(tile.late_many ? i * early / p.n : i);  // divisions take time
    tile.late = tile.late_many > 0 ? share(early) : nothing;
    tile.observed = tile.solved = {nothing, nothing};
    auto& beside = solves ? tile.solved : tile.observed;
    if (p.log_ratio.data) beside.gates = follow(p.log_ratio, size_of(p.log_ratio_dtype), count * p.log_ratio.col);
    if (p.mask.data) beside.mask = follow(p.mask, size_of(p.mask_dtype), count * p.mask.col);
    const bool soon = p.level == Level::kBatch || p.level == Level::kToken;  // the combination follows the statistics
    tile.result = soon && !p.in_place && !p.has_gram() ? follow(p.out, sizeof(S), 0) : nothing;
  }

  template <class S>
  void load_all(int64_t t, int count) {
    if (!p.sums) return load_objectives<S>(p, p.advantages, adjacent, t, count, tile.x, stride);
    for (int i = 0; i < p.n; ++i) load_objective<S>(i, t, count, tile.x + i * stride);
  }

  template <class S>
  void load_objective(int i, int64_t t, int count, C* x) {
    if (!p.sums) return load_plane<S>(p, p.advantages[i], t, count, x);
    load_plane<C>(p, Plane{reinterpret_cast<char*>(static_cast<C*>(p.sums) + i), p.n, 0}, t, count, x);
  }

  // Without gates.
  template <class S>
  void load_samples(int64_t t, int count) {
    load_valid(p, t, count, tile);
    load_objectives<S>(p, p.advantages, adjacent, t, count, tile.x, stride);
    if (!p.absent_zero) return;
    tile.valid_count = 0;
    for (int k = 0; k < count; ++k) {
      tile.valid[k] = tile.x[k] == 0 && __builtin_signbit(tile.x[k]) ? 0 : -1;
      tile.valid_count -= static_cast<int>(tile.valid[k]);
    }
  }

  // I(A_i) in `x`, which holds A_i, or what was loaded of an objective of which all is `plain` and nothing normalised.
  // Adds to `used` how many tokens have data: all that are valid, where one objective is plain.
  void gate_tile(uint64_t plain, int count, double& used) {
    for (int i = 0; i < p.n; ++i) {
      C* const x = tile.x + i * stride;
      const C factor = this->scale[i];
      if (plain >> i & 1 && !normalizer.active()) {
        for (int k = 0; k < count; k += kLanes)
          vec(x + k) = this->only(vec(tile.not_above + k), this->positive(vec(x + k))) * factor;
      } else {
        for (int k = 0; k < count; k += kLanes) vec(x + k) = gated_at(vec(x + k), k);
      }
    }
    if (plain) {
      used += tile.valid_count;
      return;
    }
    M used_count{};
    for (int k = 0; k < count; k += kLanes) {
      M any{};
      for (int i = 0; i < p.n; ++i) any |= vec(tile.taken + i * stride + k);
      used_count -= any;
    }
    lanes.spill(used_count);
    used += static_cast<double>(lanes.count(0));
  }

  static constexpr int kColumns = 6;  // two sums of each are 12 of the 16 registers that AVX2 has

  // Sums of the products of the objectives' entries in `x`, in the upper triangle. Two objectives at a time with those
  // from the first of them on, these dealt out evenly to as few walks as have registers for their sums.
  void add_gram(int count, double* gram) {
    int i = 0;
    for (; i + 2 <= p.n; i += 2) {
      for (int j = i, walks = (p.n - i + kColumns - 1) / kColumns; walks > 0; --walks) {
        const int columns = (p.n - j) / walks;
        [&]<int... kMany>(std::integer_sequence<int, kMany...>) {
          static_cast<void>(((columns == kMany + 1 && (add_products<2, kMany + 1>(i, j, count, gram), true)) || ...));
        }(std::make_integer_sequence<int, kColumns>());
        j += columns;
      }
    }
    if (i < p.n) add_products<1, 1>(i, i, count, gram);
  }

  // Of kRows objectives from i on with kMany from j on, all at once: one sum alone would wait for its own additions,
  // and what is read serves several.
  template <int kRows, int kMany>
  void add_products(int i, int j, int count, double* gram) {
    const C *const row = tile.x + i * stride, *const column = tile.x + j * stride;
    const int64_t step = stride;
    V products[kRows][kMany] = {};
    for (int k = 0; k < count; k += kLanes) {
#pragma GCC unroll 8
      for (int c = 0; c < kMany; ++c)
#pragma GCC unroll 2
        for (int r = 0; r < kRows; ++r) products[r][c] += vec(row + r * step + k) * vec(column + c * step + k);
    }
    double of[kRows * kMany];
    lanes.template sums<kRows * kMany>(products[0], of);
    for (int r = 0; r < kRows; ++r)
      for (int c = 0; c < kMany; ++c)
        if (i + r <= j + c) gram[(i + r) * p.n + j + c] += of[r * kMany + c];
  }
};

namespace {

// f(kernel, S{}) with the kernel of the storage type S of the advantages.
template <class F>
inline __attribute__((always_inline)) void with_kernel(const CombineParams& p, F f) {
  with_dtype(p.dtype, [&](auto s) {
    Kernel<typename Storage<decltype(s)>::Compute> kernel(p);
    f(kernel, s);
  });
}

void scan(const CombineParams& p, int64_t first, int64_t last, Moments* moments, double* gram, const Moments* others,
          Guess* guess) {
  with_kernel(p, [&](auto& kernel, auto s) {
    if (p.measures) return kernel.template scan_groups<decltype(s)>(first, last, moments, gram);
    kernel.template scan<decltype(s)>(first, last, moments, gram, others, guess);
  });
}

void weigh(const CombineParams& p, int64_t first, int64_t last, const double* weights, const Moments* moments) {
  with_kernel(p, [&](auto& kernel, auto s) { kernel.template weigh<decltype(s)>(first, last, weights, moments); });
}

void tokens(const CombineParams& p, int64_t first, int64_t last, Moments* moments, TokenShares& shares) {
  with_kernel(p, [&](auto& kernel, auto s) {
    if (p.measures) return kernel.template token_groups<decltype(s)>(first, last, moments, shares);
    kernel.template tokens<decltype(s)>(first, last, moments, shares);
  });
}

// One solve for each pool of tokens, combined while they are in cache: rows at level "sequence", or groups. Where
// groups are measured on the way, [first, last) are groups at either level.
void pools(const CombineParams& p, int64_t first, int64_t last, Moments* moments, double* gram) {
  with_kernel(p, [&](auto& kernel, auto s) {
    using S = decltype(s);
    using C = typename Storage<S>::Compute;
    C* weights_out = static_cast<C*>(p.packed) + kStatistics * p.n;
    C* values_out = weights_out + p.solves() * p.n;
    auto solve_rows = [&](int64_t k, int64_t begin, int64_t end) {  // pool k: the rows [begin, end)
      Moments of[kMaxObjectives];
      double weights[kMaxObjectives];
      fill(of, 0, p.n, Moments::empty());
      if (gram) fill(gram, 0, p.n * p.n + 1, 0.0);
      kernel.template scan<S>(begin * p.row_tokens, end * p.row_tokens, of, gram, nullptr, nullptr);
      const double value = solve_pool(p, of, gram, weights);
      kernel.template weigh<S>(begin * p.row_tokens, end * p.row_tokens, weights, of);
      for (int i = 0; i < p.n; ++i) merge(moments[i], of[i]);
      // The solve of a row, or of a group by ids, stands at its rows; that of another group at its own index.
      const bool at_rows = p.level == Level::kSequence || p.normalize.groups == Groups::kIds;
      for (int64_t row = begin; row < (at_rows ? end : begin + 1); ++row) {
        const int64_t at = at_rows ? p.row_at(row) : k;
        for (int i = 0; i < p.n; ++i) weights_out[at * p.n + i] = static_cast<C>(weights[i]);
        values_out[at] = static_cast<C>(value);
      }
    };
    for (int64_t k = first; k < last; ++k) {
      if (p.measures) kernel.template measure<S>(k, k + 1, moments);
      if (p.level == Level::kGroup) {
        solve_rows(k, p.starts[k], p.starts[k + 1]);
      } else {
        const int64_t begin = p.measures ? p.starts[k] : k, end = p.measures ? p.starts[k + 1] : k + 1;
        for (int64_t row = begin; row < end; ++row) solve_rows(row, row, row + 1);
      }
    }
  });
}

void moments(const CombineParams& p, int64_t first, int64_t last, Moments* to) {
  with_kernel(p, [&](auto& kernel, auto s) { kernel.template moments<decltype(s)>(first, last, to); });
}

void measure(const CombineParams& p, int64_t first, int64_t last, Moments* to) {
  with_kernel(p, [&](auto& kernel, auto s) { kernel.template measure<decltype(s)>(first, last, to); });
}

void sum_rows(const CombineParams& p, int64_t first, int64_t last) {
  with_kernel(p, [&](auto& kernel, auto s) { kernel.template sum_rows<decltype(s)>(first, last); });
}

void rewrite(const CombineParams& p, int64_t first, int64_t last) {
  with_kernel(p, [&](auto& kernel, auto s) { kernel.template rewrite<decltype(s)>(first, last); });
}

}  // namespace

}  // namespace PAMA_ISA
}  // namespace pama
