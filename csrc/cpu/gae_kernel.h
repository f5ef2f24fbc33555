// The CPU kernel of `gae`, compiled once per instruction set (csrc/cpu/isa_*.cpp).
//
// Whole sequences are walked from their last token to their first, a tile at a time. Over the valid tokens, with v and
// A of the token after,
//
//   delta(k) = r(k) + gamma v(k+1) - v(k)        A(k) = delta(k) + decay A(k+1),  decay = gamma lam
//
// W objectives stand side by side (all of them, or one), so k+1 is W elements further on. For a vector of elements at a
// time: b = delta, then b(e) += decay^s b(e + W s) for s = 1, 2, 4, ..., then the vector behind is added, times powers
// of decay. Where sequences end within a vector the coefficients are carried along, 0 across an end.
//
// Where nothing is masked, converted or rearranged, vectors go straight from memory to memory. Elsewhere the tile is
// copied to scratch first, without the tokens that the mask leaves out.
#include <new>

#include "isa.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

// Lane k of x from lane k + kBy; beyond the last from `beyond`.
template <int kBy, class V, int... kPlaces>
inline V shifted(V x, V beyond, std::integer_sequence<int, kPlaces...>) {
  return __builtin_shufflevector(x, beyond, (kPlaces + kBy)...);
}

// Lane k from the first lane of x that is a multiple of W further on than k, x being behind.
template <int W, int kLanes, class V, int... kPlaces>
inline V behind(V x, std::integer_sequence<int, kPlaces...>) {
  return __builtin_shufflevector(x, x, (kPlaces + (kLanes - kPlaces + W - 1) / W * W - kLanes)...);
}

template <class C>
class GaeKernel {
  using V = typename Simd<C>::V;
  using I = typename Simd<C>::I;
  static constexpr int lanes = Simd<C>::lanes;
  static constexpr int kPad = 16;  // before each run of elements: the first vector may start there
  static constexpr int kElements = 2048, kTokens = 1024, kLong = 128;

 public:
  explicit GaeKernel(const GaeParams& params)
      : p(params),
        width(p.advantages.objective == 1 ? p.n : 1),
        tokens(smaller(kTokens, kElements / p.n / 16 * 16)),
        stride(tokens + kPad),
        direct_layout(is_direct()) {
    for (int i = 0; i < p.n; ++i) {
      gamma[i] = static_cast<C>(p.gamma[i]);
      decay[i] = static_cast<C>(p.gamma[i] * p.lam[i]);
    }
    each_width([&](auto w) {
      if constexpr (by_vectors<w>())
        for (int i = 0; i < p.n; i += width) new (coefficients<w>(i)) Coefficients<w>(*this, i);
    });
  }

  // The sequences that make up the tokens [first, last).
  void run(int64_t first, int64_t last) {
    sequence = sequence_of(last - 1);
    open = false;
    for (int64_t end = last; end > first;) {
      int count = static_cast<int>(smaller<int64_t>(tokens, end - first));
      // A mask often leaves one piece of a long sequence, but hardly ever of two.
      const int64_t own = end - p.start(sequence);
      if (p.mask.data && own >= kLong && own < count) count = static_cast<int>(own);
      end -= count;
      tile(end, count);
    }
  }

 private:
  // Whether all that is read and written stands as it is worked on.
  bool is_direct() const {
    if (p.outcome || p.kl.data || p.rows != 1) return false;
    const DType native = sizeof(C) == 8 ? DType::kFloat64 : DType::kFloat32;
    if (p.rewards_dtype != native || p.values_dtype != native || p.dtype != native) return false;
    if (width > 1) return pama::adjacent(p.rewards, p.n, native) && pama::adjacent(p.values, p.n, native);
    for (int i = 0; i < p.n; ++i)
      if (p.rewards[i].col != 1 || p.values[i].col != 1) return false;
    return true;
  }

  C* scratch(C* of, int i) const { return of + kPad + (width > 1 ? 0 : i * stride); }  // from objective i on

  // The sequence that a token belongs to: the last one that starts at or before it.
  int64_t sequence_of(int64_t token) const {
    if (!p.offsets) return token / p.length;
    int64_t low = 0, high = p.sequences;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (p.start(middle) <= token ? low : high) = middle;
    }
    return low;
  }

  void tile(int64_t first, int count) {
    select(first, count);
    find_ends(first, count);
    if (direct_layout && valid_count == count && count * width % lanes == 0) {
      for (int i = 0; i < p.n; i += width) {
        const int64_t at = first * width, from = i * p.advantages.objective + at;
        recur(i, elements(p.rewards[i]) + at, elements(p.values[i]) + at, elements(p.advantages) + from,
              elements(p.returns) + from);
      }
      return;
    }
    if (valid_count > 0) {
      load(first, count);
      for (int i = 0; i < p.n; i += width) {
        C *r = scratch(rewards, i) + valid_first * width, *v = scratch(values, i) + valid_first * width;
        recur(i, r, v, r, v);
      }
    }
    for (int i = 0; i < p.n; i += width) {
      put_back(scratch(rewards, i), count);
      put_back(scratch(values, i), count);
    }
    with_dtype(p.dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(C) == 8 && sizeof(S) != 8) return;  // float64 in, float64 out
      store<S>(p.advantages, first, count, rewards);
      store<S>(p.returns, first, count, values);
    });
  }

  template <class Q>
  static C* elements(const Q& q) {
    return reinterpret_cast<C*>(q.data);
  }

  // Which of the tile's tokens are valid: valid_count from valid_first on, or those that `taken` lists.
  void select(int64_t first, int count) {
    valid_first = 0;
    valid_count = count;
    scattered = false;
    if (!p.mask.data) return;
    load_mask(p, first, count, valid);
    I sum = 0;
    for (int k = 0; k < count; ++k) sum -= valid[k];
    valid_count = static_cast<int>(sum);
    if (valid_count == 0 || valid_count == count) return;
    while (!valid[valid_first]) ++valid_first;
    int last = count;
    while (!valid[last - 1]) --last;
    scattered = last - valid_first != valid_count;
    if (!scattered) return;
    valid_first = 0;
    for (int k = 0, m = 0; k < count; ++k) {
      rank[k] = m;
      taken[m] = k;
      m -= static_cast<int>(valid[k]);
    }
  }

  // How many of the tile's tokens before token k are valid.
  int rank_of(int k, int count) const {
    if (scattered) return k == count ? valid_count : rank[k];
    const int from = k - valid_first;
    return from < 0 ? 0 : smaller(from, valid_count);
  }

  // The tokens of the tile, as ranks and from the last on, that are the last valid ones of their sequences.
  void find_ends(int64_t first, int count) {
    ends = 0;
    for (int64_t to = first + count; to > first;) {
      const int64_t start = p.start(sequence), from = start > first ? start : first;
      const int begin = rank_of(static_cast<int>(from - first), count);
      const int end = rank_of(static_cast<int>(to - first), count);
      if (end > begin && !open) {
        end_rank[ends] = end - 1;
        end_sequence[ends++] = sequence;
      }
      open |= end > begin;
      to = from;
      if (start < first) break;
      open = false;
      while (sequence > 0 && p.start(sequence) >= start) --sequence;
    }
  }

  // Rewards, less the penalty, and values; only between the first and the last valid token, and these without gaps.
  void load(int64_t first, int count) {
    const int begin = valid_first, m = scattered ? count : valid_count;
    if (p.outcome) {
      for (int i = 0; i < p.n; i += width) fill(scratch(rewards, i), begin * width, (begin + m) * width, C{0});
    } else {
      load_as(p.rewards, p.rewards_dtype, first + begin, m, rewards, begin);
    }
    load_as(p.values, p.values_dtype, first + begin, m, values, begin);
    if (p.kl.data) {
      with_dtype(p.kl_dtype, [&](auto s) { load_plane<decltype(s)>(p, p.kl, first + begin, m, penalty); });
      each_width([&](auto of) {
        const int w = of ? of : width;
        for (int i = 0; i < p.n; i += w) {
          C* __restrict r = scratch(rewards, i) + begin * w;
          for (int k = 0; k < m; ++k)
            for (int j = 0; j < w; ++j) r[k * w + j] -= penalty[k];
        }
      });
    }
    if (!scattered) return;
    each_width([&](auto of) {
      const int w = of ? of : width;
      for (int i = 0; i < p.n; i += w) {
        C *r = scratch(rewards, i), *v = scratch(values, i);
        for (int k = 0; k < valid_count; ++k)
          for (int j = 0; j < w; ++j) r[k * w + j] = r[taken[k] * w + j], v[k * w + j] = v[taken[k] * w + j];
      }
    });
  }

  void load_as(const Plane* planes, DType dtype, int64_t first, int m, C* to, int begin) const {
    const bool adjacent = width > 1 && pama::adjacent(planes, p.n, dtype);
    with_dtype(dtype, [&](auto s) {
      using S = decltype(s);
      if constexpr (sizeof(S) <= sizeof(C)) {
        for (int i = 0; i < (adjacent ? 1 : p.n); ++i) {
          C* const own = scratch(to, width > 1 ? 0 : i) + begin * width + (width > 1 ? i : 0);
          for_runs(p, first, m, [&](int64_t row, int64_t col, int done, int count) {
            const S* from = at<const S>(planes[i], row, col);
            C* dst = own + done * width;
            if (adjacent || (width == 1 && planes[i].col == 1)) return load_run(from, 1, count * width, dst);
            for (int k = 0; k < count; ++k) dst[k * width] = Storage<S>::load(from[k * planes[i].col]);
          });
        }
      }
    });
  }

  // f(width) as a constant, 0 where it is a large one.
  template <class F>
  auto each_width(F f) const {
    switch (width) {
      case 1: return f(std::integral_constant<int, 1>());
      case 2: return f(std::integral_constant<int, 2>());
      case 3: return f(std::integral_constant<int, 3>());
      case 4: return f(std::integral_constant<int, 4>());
      case 5: return f(std::integral_constant<int, 5>());
      case 6: return f(std::integral_constant<int, 6>());
      case 7: return f(std::integral_constant<int, 7>());
      case 8: return f(std::integral_constant<int, 8>());
      default: return f(std::integral_constant<int, 0>());
    }
  }

  // Coefficients of W interleaved objectives, for each objective that the first lane of a vector may belong to.
  template <int W>
  struct Coefficients {
    static constexpr int kSteps = W >= lanes ? 0 : 2 * W >= lanes ? 1 : 4 * W >= lanes ? 2 : 8 * W >= lanes ? 3 : 4;
    V gamma[W], power[kSteps + 1][W], behind[W];  // power: decay^1, ^2, ^4, ...; behind: as far as the next vector

    Coefficients(const GaeKernel& kernel, int first) {
      alignas(64) C lane[lanes], powers[W][lanes + 1];
      for (int i = 0; i < W; ++i) {
        // Of the rounded decay, which errs as gamma does: gamma v - v and the decay of A nearly cancel where lam is 1.
        double power = 1.0;
        for (int k = 0; k <= lanes; ++k, power *= kernel.decay[first + i]) powers[i][k] = static_cast<C>(power);
      }
      for (int phase = 0; phase < W; ++phase) {
        const auto fill_lanes = [&](V& to, auto value) {  // value(objective, lane)
          for (int k = 0; k < lanes; ++k) lane[k] = value((phase + k) % W, k);
          memcpy(&to, lane, sizeof(V));
        };
        fill_lanes(gamma[phase], [&](int i, int) { return kernel.gamma[first + i]; });
        fill_lanes(behind[phase], [&](int i, int k) { return powers[i][(lanes - k + W - 1) / W]; });
        for (int step = 0; step <= kSteps; ++step)
          fill_lanes(power[step][phase], [&](int i, int) { return powers[i][1 << step]; });
      }
    }
  };

  template <int W>
  static constexpr bool by_vectors() {
    return W > 0 && 2 * W <= lanes;
  }

  alignas(64) char storage[kMaxObjectives * sizeof(Coefficients<1>)];
  template <int W>
  Coefficients<W>* coefficients(int first) {  // of the objectives from the first on
    static_assert(sizeof(Coefficients<W>) <= sizeof(storage));
    return reinterpret_cast<Coefficients<W>*>(storage) + first / W;
  }

  template <int kBy>
  static V further(V x, V beyond) {
    return shifted<kBy>(x, beyond, Places<C>());
  }

  template <int W, int kStep = 0>
  static V scan(V b, const Coefficients<W>& by, int phase) {
    if constexpr (kStep < Coefficients<W>::kSteps) {
      b += by.power[kStep][phase] * further<(W << kStep)>(b, V{});
      return scan<W, kStep + 1>(b, by, phase);
    } else {
      return b;
    }
  }

  // The same where the coefficients differ; leaves in `a` those of what is behind the vector. What is beyond an end is
  // not even added times 0, since it may be infinite.
  template <int W, int kStep = 0>
  static V scan_ends(V b, V& a) {
    if constexpr (kStep < Coefficients<W>::kSteps) {
      constexpr int kBy = W << kStep;
      const V product = a * further<kBy>(b, V{});
      b += a != V{} ? product : V{};
      a *= further<kBy>(a, V{} + C{1});
      return scan_ends<W, kStep + 1>(b, a);
    } else {
      return b;
    }
  }

  // Rewards and values of the valid tokens to advantages and returns, `width` objectives from the first on.
  void recur(int first, const C* r, const C* v, C* advantages, C* returns) {
    each_width([&](auto w) { recur_as<w>(first, r, v, advantages, returns); });
  }

  template <int W>
  void recur_as(int first, const C* r, const C* v, C* advantages, C* returns) {
    if constexpr (!by_vectors<W>()) {
      recur_wide(r, v, advantages, returns);
    } else {
      const Coefficients<W>& by = *coefficients<W>(first);
      const int count = valid_count * W;
      alignas(64) C lane[lanes] = {};
      C first_value[W];
      for (int i = 0; i < W; ++i) first_value[i] = v[i];
      V after, advantage_after;  // the vector behind
      for (int i = 0; i < W; ++i) lane[i] = next_value[first + i];
      memcpy(&after, lane, sizeof(V));
      for (int i = 0; i < W; ++i) lane[i] = next_advantage[first + i];
      memcpy(&advantage_after, lane, sizeof(V));
      V carried = behind<W, lanes>(advantage_after, Places<C>());
      int e = 0, phase = (count - lanes % W + W) % W;
      for (int k = count - lanes; k > -lanes; k -= lanes) {
        V reward, value, b;
        memcpy(&reward, r + k, sizeof(V));
        memcpy(&value, v + k, sizeof(V));
        V term = by.gamma[phase] * further<W>(value, after);
        if (e < ends && (end_rank[e] + 1) * W > k) {
          alignas(64) C terms[lanes], inside[lanes];
          memcpy(terms, &term, sizeof(V));
          memcpy(inside, &by.power[0][phase], sizeof(V));
          for (; e < ends && (end_rank[e] + 1) * W > k; ++e) {
            const int from = end_rank[e] * W - k;
            for (int i = from < 0 ? -from : 0; i < W && from + i < lanes; ++i) {
              terms[from + i] = static_cast<C>(p.last_term(first + i, end_sequence[e]));
              inside[from + i] = C{0};
            }
            if (from < 0) break;  // the rest of this token is in the next vector
          }
          V a;
          memcpy(&term, terms, sizeof(V));
          memcpy(&a, inside, sizeof(V));
          b = scan_ends<W>(reward + term - value, a);
          const V product = a * carried;
          b += a != V{} ? product : V{};
          carried = behind<W, lanes>(b, Places<C>());
        } else {
          const V within = scan<W>(reward + term - value, by, phase);
          b = within + by.behind[phase] * carried;
          if constexpr (lanes % W == 0) {  // the same as below, without waiting for b
            carried = behind<W, lanes>(within, Places<C>()) + by.power[Coefficients<W>::kSteps][phase] * carried;
          } else {
            carried = behind<W, lanes>(b, Places<C>());
          }
        }
        after = value;
        value += b;
        memcpy(advantages + k, &b, sizeof(V));
        memcpy(returns + k, &value, sizeof(V));
        if constexpr (lanes % W != 0) phase = (phase + W - lanes % W) % W;
      }
      for (int i = 0; i < W; ++i) {
        next_value[first + i] = first_value[i];
        next_advantage[first + i] = advantages[i];
      }
    }
  }

  // Many objectives: token after token, vectors across the objectives.
  void recur_wide(const C* r, const C* v, C* advantages, C* returns) {
    const int n = p.n;
    for (int e = 0, k = valid_count; k-- > 0;) {
      const C *reward = r + k * n, *value = v + k * n;  // may be where the results go
      C term[kMaxObjectives];
      if (e < ends && end_rank[e] == k) {
        for (int i = 0; i < n; ++i) term[i] = static_cast<C>(p.last_term(i, end_sequence[e]));
        fill(next_advantage, 0, n, C{0});
        ++e;
      } else {
        for (int i = 0; i < n; ++i) term[i] = gamma[i] * next_value[i];
      }
      for (int i = 0; i < n; ++i) {
        const C own = value[i], advantage = reward[i] + term[i] - own + decay[i] * next_advantage[i];
        next_value[i] = own;
        next_advantage[i] = advantage;
      }
      for (int i = 0; i < n; ++i) {
        advantages[k * n + i] = next_advantage[i];
        returns[k * n + i] = next_advantage[i] + next_value[i];
      }
    }
  }

  // Results to where their tokens stand in the tile, 0 elsewhere.
  void put_back(C* x, int count) const {
    if (valid_count == count) return;
    if (scattered) {
      each_width([&](auto of) {
        const int w = of ? of : width;
        for (int k = count; k-- > 0;)
          for (int j = 0; j < w; ++j) x[k * w + j] = valid[k] ? x[rank[k] * w + j] : C{0};
      });
    } else {
      fill(x, 0, valid_first * width, C{0});
      fill(x, (valid_first + valid_count) * width, count * width, C{0});
    }
  }

  template <class S>
  void store(const Planes& to, int64_t first, int count, C* from) const {
    for (int i = 0; i < p.n; i += width) {
      const C* source = scratch(from, i);
      for_runs(p, first, count, [&](int64_t row, int64_t col, int done, int m) {
        S* __restrict dst = reinterpret_cast<S*>(to.data) + row * to.row + col * to.col + i * to.objective;
        const C* __restrict src = source + done * width;
        for (int k = 0; k < m * width; ++k) dst[k] = Storage<S>::store(src[k]);
      });
    }
  }

  const GaeParams& p;
  const int width;           // how many objectives stand side by side: all, or 1
  const int tokens, stride;  // of a tile; of its objectives, where they stand apart
  const bool direct_layout;
  C gamma[kMaxObjectives], decay[kMaxObjectives];

  int64_t sequence;                                                        // of the next token
  bool open;                                                               // it has valid tokens in the tiles before
  C next_value[kMaxObjectives] = {}, next_advantage[kMaxObjectives] = {};  // of the next valid token

  int valid_first, valid_count, ends;
  bool scattered;
  alignas(64) I valid[kTokens];
  int rank[kTokens], taken[kTokens], end_rank[kTokens];
  int64_t end_sequence[kTokens];
  alignas(64) C penalty[kTokens];
  static constexpr int kScratch = kElements + kMaxObjectives * kPad + kPad;
  alignas(64) C rewards[kScratch], values[kScratch];
};

namespace {

void gae(const GaeParams& p, int64_t first, int64_t last) {
  if (p.dtype == DType::kFloat64) {
    GaeKernel<double>(p).run(first, last);
  } else {
    GaeKernel<float>(p).run(first, last);
  }
}

}  // namespace

}  // namespace PAMA_ISA
}  // namespace pama
