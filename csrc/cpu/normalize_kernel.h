// Normalisation on the CPU: the moments of every pool, as an affine map each, and their use on a tile. Included once
// per instruction set, inside namespace pama::PAMA_ISA.
#pragma once

#include <cmath>

#include "lanes.h"
#include "pama/moments.h"
#include "tile.h"

namespace pama {
namespace PAMA_ISA {

struct Nothing {};  // what a caller of Normalizer::measure returns if it wants nothing done

template <class C>
class Normalizer {
  using V = typename Simd<C>::V;
  using M = typename Simd<C>::M;
  using I = typename Simd<C>::I;
  static constexpr int kLanes = Simd<C>::lanes;
  static constexpr int kSmall = 64;  // groups of up to this many tokens are done side by side, a lane each
  static constexpr C kInf = std::numeric_limits<C>::infinity();

  // Tiles are not read at aligned places only.
  static V vector_at(const C* x) {
    V v;
    memcpy(&v, x, sizeof v);
    return v;
  }
  static M mask_at(const I* x) {
    M m;
    memcpy(&m, x, sizeof m);
    return m;
  }
  static M finite(V x) { return (x - x) == V{}; }
  using Places = pama::PAMA_ISA::Places<C>;
  template <int... kPlaces>
  static M places(std::integer_sequence<int, kPlaces...>) {
    return M{kPlaces...};
  }
  static M below(int first, int last) {  // lanes k with first + k < last
    return places(Places()) < M{} + (last - first);
  }

 public:
  explicit Normalizer(const CombineParams& params)
      : p(params),
        rules(params.normalize.each),
        pools(params.normalize.by == Pool::kGroup ? params.groups : 1),
        map(static_cast<C*>(params.affine), params.n * pools),
        equal(params.normalize.by == Pool::kGroup ? params.equal_rows * params.row_tokens : 0) {}

  bool active() const { return map.high != nullptr; }

  // to[k] = the normalised x[k] of objective i, for the tokens [first, first + count); to may be x.
  void apply(int i, int64_t first, int count, const C* x, C* to) const {
    int64_t at = i * pools;
    if (pools == 1) return run(map[at], x, to, count);
    if (equal > 0 && first % equal == 0) {
      switch (equal) {
        case 2: return equal_runs<2>(at + first / 2, x, to, count);
        case 4: return equal_runs<4>(at + first / 4, x, to, count);
        case 8: return equal_runs<8>(at + first / 8, x, to, count);
        case 16: return equal_runs<16>(at + first / 16, x, to, count);
        case 32: return equal_runs<32>(at + first / 32, x, to, count);
        case 64: return equal_runs<64>(at + first / 64, x, to, count);
        default: break;
      }
    }
    int64_t g = group_at(first);
    for (int k = 0; k < count; ++g) {
      const int end = static_cast<int>(smaller<int64_t>(count, p.starts[g + 1] * p.row_tokens - first));
      run(map[at + g], x + k, to + k, end - k);
      k = end;
    }
  }

  // The maps of the groups [first, last). load(token, count) fills `tile`; then(token, count) is called for every tile
  // once the maps of its groups are known, with the tile as it was loaded.
  template <class Load, class Then>
  void measure(int64_t first, int64_t last, Tile<C>& tile, int stride, Moments* moments, Load load, Then then) {
    for (int64_t g = first; g < last;) {
      const int64_t begin = token(g);
      int64_t end = g;
      while (end < last && token(end + 1) - begin <= stride) ++end;
      if (equal > 0 && equal <= kSmall && end < last && end - g > kLanes)
        end = g + (end - g) / kLanes * kLanes;  // a group to a lane
      if (end == g) {                           // larger than a tile
        Moments of[kMaxObjectives];
        fill(of, 0, p.n, Moments::empty());
        for (int64_t t = begin; t < token(g + 1); t += stride) {
          const int count = static_cast<int>(smaller<int64_t>(stride, token(g + 1) - t));
          load(t, count);
          for (int i = 0; i < p.n; ++i) merge(of[i], range(tile, tile.x + i * stride, 0, count));
        }
        for (int i = 0; i < p.n; ++i) keep(i, g, of[i], moments[i]);
        if constexpr (!std::is_same_v<decltype(then(0, 0)), Nothing>) {
          for (int64_t t = begin; t < token(g + 1); t += stride) {
            const int count = static_cast<int>(smaller<int64_t>(stride, token(g + 1) - t));
            load(t, count);
            then(t, count);
          }
        }
        ++g;
        continue;
      }
      const int count = static_cast<int>(token(end) - begin);
      if (count == 0) {  // nobody will ask for their maps
        g = end;
        continue;
      }
      load(begin, count);
      for (int i = 0; i < p.n; ++i) groups_of_tile(i, g, end, count, tile, tile.x + i * stride, moments[i]);
      then(begin, count);
      g = end;
    }
  }

  // Raw moments of the usable samples [first, last) of a tile, around their mean or the centre given.
  Moments range(const Tile<C>& tile, const C* x, int first, int last, const C* given = nullptr) {
    V total{};
    M counted{}, nonfinite{};
    for (int k = first; k < last; k += kLanes) {
      const V sample = vector_at(x + k);
      const M valid = mask_at(tile.valid + k) & below(k, last), usable = valid & finite(sample);
      counted -= usable;
      nonfinite -= valid & ~usable;
      total += usable ? sample : V{};
    }
    Moments m = Moments::empty();
    lanes.spill(counted, nonfinite, total);
    m.count = lanes.count(0);
    m.nonfinite = lanes.count(1);
    if (m.count == 0) return m;
    const double n = static_cast<double>(m.count);
    C centre = given ? *given : static_cast<C>(lanes.sum(2) / n);
    if (!(centre - centre == 0)) centre = 0;  // the sum of huge samples has overflowed
    V deviation{}, squares{}, low = V{} + kInf, high = V{} - kInf;
    for (int k = first; k < last; k += kLanes) {
      const V sample = vector_at(x + k);
      const M usable = mask_at(tile.valid + k) & below(k, last) & finite(sample);
      const V d = usable ? sample - centre : V{};
      deviation += d;
      squares += d * d;
      low = (usable & (sample < low)) ? sample : low;
      high = (usable & (sample > high)) ? sample : high;
    }
    lanes.spill(deviation, squares, low, high);
    settle(m, static_cast<double>(centre), lanes.sum(0), lanes.sum(1));
    m.min = lanes.template extreme<Smaller>(2);
    m.max = lanes.template extreme<Larger>(3);
    return m;
  }

  void keep(int i, int64_t g, const Moments& m, Moments& total) {
    const PoolMoments pool = m.pool(p.propagate);
    map.set(i * pools + g, affine<C>(rules, pool));
    total.dead += is_dead(rules, pool);
  }

 private:
  int64_t token(int64_t group) const { return p.starts[group] * p.row_tokens; }

  int64_t group_at(int64_t token_index) const {  // the last group that starts at or before it
    const int64_t row = token_index / p.row_tokens;
    int64_t low = 0, high = pools;
    while (high - low > 1) {
      const int64_t middle = low + (high - low) / 2;
      (p.starts[middle] <= row ? low : high) = middle;
    }
    return low;
  }

  static void run(const Affine<C>& f, const C* x, C* to, int count) {
    for (int k = 0; k < count; ++k) to[k] = f(x[k]);
  }

  // Of what each of kLanes groups has, what the entries of vector kRow of these groups, kSize entries each, take.
  template <int kSize, int kRow, int... kPlaces>
  static V spread(V x, std::integer_sequence<int, kPlaces...>) {
    return __builtin_shufflevector(x, x, ((kRow * kLanes + kPlaces) / kSize)...);
  }
  template <int kSize>
  void equal_runs(int64_t at, const C* __restrict x, C* to, int count) const {
    int k = 0;
    for (; k + kSize * kLanes <= count; k += kSize * kLanes, at += kLanes) {
      const V high = vector_at(map.high + at), low = vector_at(map.low + at), factor = vector_at(map.factor + at);
      [&]<int... kRow>(std::integer_sequence<int, kRow...>) {
        (
            [&] {
              const V y = (vector_at(x + k + kRow * kLanes) - spread<kSize, kRow>(high, Places()) -
                           spread<kSize, kRow>(low, Places())) *
                          spread<kSize, kRow>(factor, Places());
              memcpy(to + k + kRow * kLanes, &y, sizeof y);
            }(),
            ...);
      }(std::make_integer_sequence<int, kSize>());
    }
    for (; k + kSize <= count; k += kSize, ++at) {
      const Affine<C> f = map[at];
      for (int j = 0; j < kSize; ++j) to[k + j] = f(x[k + j]);
    }
    if (k < count) run(map[at], x + k, to + k, count - k);
  }

  void groups_of_tile(int i, int64_t first, int64_t last, int count, Tile<C>& tile, const C* x, Moments& total) {
    const bool whole = count % kLanes == 0 && all_usable(tile, x, count);  // the usual case, with less to look at
    if (!whole) prepare(tile, x, count);
    const C* samples = whole ? x : tile.normal;
    const int64_t begin = token(first);
    for (int64_t g = first; g < last;) {
      if (whole && last - g >= kLanes && equal_groups(i, g, samples + (g - first) * equal, total)) {
        g += kLanes;
        continue;
      }
      int size[kLanes] = {}, lane = 0, longest = 0;
      for (; lane < kLanes && g + lane < last; ++lane) {
        size[lane] = static_cast<int>(token(g + lane + 1) - token(g + lane));
        if (size[lane] > kSmall) break;
        longest = size[lane] > longest ? size[lane] : longest;
      }
      if (lane == 0) {
        const int from = static_cast<int>(token(g) - begin);
        keep(i, g, range(tile, x, from, from + size[0]), total);
        ++g;
        continue;
      }
      for (int l = 0; l < lane; ++l) {  // a group to a lane
        const C* from = samples + (token(g + l) - begin);
        for (int j = 0; j < size[l]; ++j) columns[j][l] = from[j];
        for (int j = size[l]; j < longest; ++j) columns[j][l] = std::numeric_limits<C>::quiet_NaN();
      }
      side_by_side<0>(i, g, lane, columns, longest, total);
      g += lane;
    }
  }

  static bool all_usable(const Tile<C>& tile, const C* x, int count) {
    M usable = ~M{};
    for (int k = 0; k < count; k += kLanes) usable &= mask_at(tile.valid + k) & finite(vector_at(x + k));
    for (int l = 0; l < kLanes; ++l)
      if (!usable[l]) return false;
    return true;
  }

  // tile.normal = x, but NaN where a sample is not usable, and inf where it makes its pool undefined.
  void prepare(Tile<C>& tile, const C* x, int count) const {
    const V absent = V{} + std::numeric_limits<C>::quiet_NaN(), spoilt = p.propagate ? V{} + kInf : absent;
    for (int k = 0; k < count; k += kLanes) {
      const V sample = vector_at(x + k), some = finite(sample) ? sample : spoilt;
      const V prepared = mask_at(tile.valid + k) ? some : absent;
      memcpy(tile.normal + k, &prepared, sizeof prepared);
    }
  }

  // kLanes groups of an equal, small size; false if it is not one of those known to the compiler.
  bool equal_groups(int i, int64_t first, const C* from, Moments& total) {
    switch (equal) {
      case 2: return transposed<2>(i, first, from, total);
      case 4: return transposed<4>(i, first, from, total);
      case 8: return transposed<8>(i, first, from, total);
      case 16: return transposed<16>(i, first, from, total);
      case 32: return transposed<32>(i, first, from, total);
      case 64: return transposed<64>(i, first, from, total);
      default: return false;
    }
  }

  template <int kSize>
  bool transposed(int i, int64_t first, const C* from, Moments& total) {
    constexpr int kPart = kSize < kLanes ? kSize : kLanes;  // entries of a group at a time
    V places[kSize];
    for (int j = 0; j < kSize; j += kPart) {
      V rows[kPart];
      load_rows<kPart, C>(from + j, kSize, rows);
      part<kPart, C>(rows, [&](int place, V x) { places[j + place] = x; });
    }
    side_by_side<kSize>(i, first, kLanes, places, kSize, total);
    return true;
  }

  // kLanes groups at a time; store_maps has the formulas of affine(), for vectors.
  // kSize > 0: every group has that many samples, all usable.
  template <int kSize>
  inline __attribute__((always_inline)) void side_by_side(int i, int64_t first, int count, const V* columns_of,
                                                          int longest, Moments& total) {
    constexpr bool kAll = kSize > 0;
    V n = V{} + static_cast<C>(kSize), sum{}, low = V{} + kInf, high = V{} - kInf;
    M broken{};
#pragma GCC unroll 16
    for (int j = 0; j < (kAll ? kSize : longest); ++j) {
      const V x = columns_of[j];
      if (kAll) {
        sum += x;
        low = x < low ? x : low;
        high = x > high ? x : high;
      } else {
        const M usable = finite(x);
        n += usable ? V{} + 1 : V{};
        sum += usable ? x : V{};
        low = (usable & (x < low)) ? x : low;
        high = (usable & (x > high)) ? x : high;
        broken |= x == kInf;
      }
    }
    const V divisor = n > V{} ? n : V{} + 1;
    V mean = sum / divisor;
    mean = finite(mean) ? mean : V{};
    V drift{}, squares{};
#pragma GCC unroll 16
    for (int j = 0; j < (kAll ? kSize : longest); ++j) {
      const V x = columns_of[j], d = kAll ? x - mean : (finite(x) ? x - mean : V{});
      drift += d;
      squares += d * d;
    }
    const V rest = drift / divisor;  // what the mean lacks
    V m2 = squares - drift * rest;
    m2 = m2 > V{} ? m2 : V{};
    store_maps(i, first, count, n, mean, rest, m2, low, high, broken, total);
  }

  void store_maps(int i, int64_t first, int count, V n, V mean, V rest, V m2, V low, V high, M broken, Moments& total) {
    const M nothing{}, any = ~nothing, single = n == V{} + 1, raw = rules.raw_singleton ? single : nothing;
    const M changes = rules.center || rules.scale ? any : nothing;
    const M dead = changes & ~broken & ((single & ~raw) | ((n > V{} + 1) & (low == high)));
    const V freedom = n - static_cast<C>(rules.correction), eps = V{} + static_cast<C>(rules.eps);
    const V variance = raw ? V{} + 1 : m2 / (freedom > V{} ? freedom : V{} + 1);
    const V deviation = rules.eps_in_variance ? root(variance + eps) : root(variance) + eps;
    V factor = rules.scale ? 1 / deviation : V{} + 1, shift = rules.center ? mean : V{}, remainder = V{};
    if (rules.center) remainder = rest;
    shift = dead ? low : raw ? V{} : shift;
    remainder = dead | raw ? V{} : remainder;
    factor = dead ? V{} : factor;
    shift = changes & broken ? V{} + std::numeric_limits<C>::quiet_NaN() : shift;
    const int64_t at = i * pools + first;
    if (count == kLanes) {
      memcpy(map.high + at, &shift, sizeof shift);
      memcpy(map.low + at, &remainder, sizeof remainder);
      memcpy(map.factor + at, &factor, sizeof factor);
    } else {
      for (int l = 0; l < count; ++l) map.set(at + l, {shift[l], remainder[l], factor[l]});
    }
    lanes.spill(dead & below(0, count));
    total.dead -= lanes.count(0);
  }

  static float root(float x) { return __builtin_sqrtf(x); }
  static double root(double x) { return __builtin_sqrt(x); }
  static V root(V x) {
    C lane[kLanes];
    memcpy(lane, &x, sizeof x);
    for (int l = 0; l < kLanes; ++l) lane[l] = root(lane[l]);
    return vector_at(lane);
  }

  const CombineParams& p;
  const MomentRules rules;
  const int64_t pools;
  const Maps<C> map;    // [n, pools]
  const int64_t equal;  // tokens in every group, 0 if that is not one number
  Lanes<C> lanes;
  V columns[kSmall];  // a group to a lane
};

}  // namespace PAMA_ISA
}  // namespace pama
