// Moves tiles of tokens between tensors of any dtype and stride and the objective-major scratch of the CPU kernel.
// Included once per instruction set, inside namespace pama::PAMA_ISA.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include "pama/combine.h"
#include "simd.h"

namespace pama {
namespace PAMA_ISA {

// Templates of the standard library are kept out of these files: the linker merges their copies, and might keep one
// compiled for instructions that the machine does not have.
template <class T, class U>
inline void fill(T* x, int first, int last, U value) {
  for (int k = first; k < last; ++k) x[k] = value;
}

// A tile of floats, what it is loaded from or the next (see prefetches_near), and what stands beside the objectives fit
// a first-level cache of 48 KB together; but of many objectives a tile is not so short that what there is to do once
// for each tile and objective would count. Where groups are normalised, 16 of 32 tokens and 10 objectives are one tile.
constexpr int kTileBytes = 17 * 1024, kGroupTileBytes = 21 * 1024, kTileTokens = 1040, kShortestBytes = 1536;
static_assert(2 * kTileBytes > 32 * 1024);  // where prefetching into the first-level cache was slower than none

// Objective i, token t of the tile stands at [i * stride + t]. Entries beyond the tile's last token are not valid.
template <class C>
struct Tile {
  using I = typename Simd<C>::I;
  static constexpr int kShortest = kShortestBytes / static_cast<int>(sizeof(C));
  static constexpr int kElements = kShortest * kMaxObjectives;

  alignas(64) C x[kElements];
  alignas(64) I taken[kElements];
  alignas(64) I valid[kTileTokens];
  int valid_count;
  alignas(64) I not_above[kTileTokens];  // log_ratio <= log(1 + clip_high), of valid tokens
  alignas(64) I not_below[kTileTokens];  // log_ratio >= log(1 - clip_low); only if lower gates are loaded
  alignas(64) C out[kTileTokens + 16];
  alignas(64) C normal[kTileTokens];  // one objective, normalised
  // What to prefetch, with each line of C ahead_step bytes further. While objective i is observed: a share of the next
  // tile, and while the first is, where the combination of this one goes. Gates and mask of the next: also then or, if
  // tokens are solved after that, while they are, with the last late_many shares.
  struct Beside {
    const char *gates, *mask;
  };
  const char *ahead[kMaxObjectives], *result, *late;
  Beside observed, solved;
  int64_t ahead_step;
  int late_many;

  // An odd number of cache lines of floats, so that the objectives of a token do not compete for one place in the
  // cache.
  static int stride_for(int n, int bytes = kTileBytes) {
    const int fits = bytes / static_cast<int>(sizeof(C)) / n;
    return (((smaller(kTileTokens, larger(fits, kShortest))) / 16 - 1) | 1) * 16;
  }
};

// Calls f(row, col, done, m) for each run of m tokens, within one row, of the tokens [first, first + count).
template <class Params, class F>
inline __attribute__((always_inline)) void for_runs(const Params& p, int64_t first, int count, F f) {
  if constexpr (requires { p.order; }) {
    if (p.order) {  // rows stand where the order says
      const int64_t length = p.row_tokens;
      int64_t k = first / length, col = first - k * length;
      for (int done = 0; done < count; ++k, col = 0) {
        const int m = length == 1 ? 1 : static_cast<int>(smaller<int64_t>(count - done, length - col));
        if (p.rows == 1) {
          f(0, p.order[k] * length + col, done, m);
        } else {
          f(p.order[k], col, done, m);
        }
        done += m;
      }
      return;
    }
  }
  int64_t row = p.rows == 1 ? 0 : first / p.cols, col = first - row * p.cols;
  for (int done = 0; done < count; ++row, col = 0) {
    const int m = static_cast<int>(smaller<int64_t>(count - done, p.cols - col));
    f(row, col, done, m);
    done += m;
  }
}

template <class S>
inline S* at(const Plane& q, int64_t row, int64_t col) {
  return reinterpret_cast<S*>(q.data) + row * q.row + col * q.col;
}

template <class C>
using Places = std::make_integer_sequence<int, Simd<C>::lanes>;

// Entries are moved within blocks of so many lanes. With AVX2 these are half a vector, since few of its instructions
// move any across; then the halves are loaded one by one, of tokens that are as many apart.
template <class C>
constexpr int kBlock = (PAMA_VECTOR_BYTES == 32 ? 16 : PAMA_VECTOR_BYTES) / static_cast<int>(sizeof(C));

// Where the entries of a block stood, counted from the first of the vectors loaded.
template <int kLanes>
struct Held {
  static constexpr int lanes = kLanes;
  int place[kLanes];

  constexpr bool operator==(const Held&) const = default;
  constexpr int lane_of(int wanted) const {
    int lane = 0;
    while (place[lane] != wanted) ++lane;
    return lane;
  }
};

template <int kLanes>
constexpr Held<kLanes> every(int step, int first) {
  Held<kLanes> held{};
  for (int l = 0; l < kLanes; ++l) held.place[l] = first + step * l;
  return held;
}

// Of an odd number of vectors, each `apart` places behind the one before, the entries `first` of each `step` places: as
// lanes are a power of two, each finds one in just one of the vectors, which need not move.
template <int kLanes>
constexpr Held<kLanes> in_place(Held<kLanes> held, int apart, int step, int first) {
  for (int& place : held.place)
    while (place % step != first) place += apart;
  return held;
}

// Of two vectors of kAll lanes, the lane `from` of a block of the first or, beyond kLanes, of the second, as `lane`
// finds it in its own block.
template <int kLanes, int kAll>
constexpr int in_block(int lane, int from) {
  return lane / kLanes * kLanes + (from < kLanes ? from : kAll + from - kLanes);
}

// A vector with these entries.
template <int kMany, int kApart, auto kWanted, class V, int... kLane>
inline __attribute__((always_inline)) V choose_in_place(const V* rows, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = kWanted.lanes, all = sizeof...(kLane);
  V found = rows[0];
  auto choose = [&]<int kRow>() {
    found = __builtin_shufflevector(
        found, rows[kRow],
        in_block<lanes, all>(kLane, (kWanted.place[kLane % lanes] / kApart == kRow ? lanes : 0) + kLane % lanes)...);
  };
  [&]<int... kRow>(std::integer_sequence<int, kRow...>) {
    (choose.template operator()<kRow + 1>(), ...);
  }(std::make_integer_sequence<int, kMany - 1>());
  return found;
}

// Of two vectors, kApart places apart, of which the first holds kHeld, the entries kWanted.
template <int kApart, auto kHeld, auto kWanted, class V, int... kLane>
inline __attribute__((always_inline)) V permute(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int lanes = kWanted.lanes, all = sizeof...(kLane);
  return __builtin_shufflevector(
      a, b,
      in_block<lanes, all>(kLane, kWanted.place[kLane % lanes] / kApart * lanes +
                                      kHeld.lane_of(kWanted.place[kLane % lanes] % kApart))...);
}

// The smallest odd prime factor; of a power of two, 2.
constexpr int next_factor(int n) {
  for (int q = 3; q <= n; q += 2)
    if (n % q == 0) return q;
  return 2;
}

// Of kLeft vectors with the entries of every kStep-th place from kFirst on, of which the first holds kHeld and the next
// the same, as many places further as kStep vectors have, one vector in order to each of kLeft objectives that take
// turns there; or just to the first. All of it is inlined: with AVX2, GCC 12 leaves 16 of them a function to itself,
// and their vectors go through memory.
template <int kLeft, int kStep, int kFirst, auto kHeld, bool kAll, class V, class F>
inline __attribute__((always_inline)) void part_further(const V* rows, F f) {
  constexpr int lanes = kHeld.lanes, apart = lanes * kStep, q = next_factor(kLeft);
  constexpr std::make_integer_sequence<int, sizeof(V) / sizeof rows[0][0]> each{};
  if constexpr (kLeft == 1) {
    constexpr auto ordered = every<lanes>(kStep, kFirst);
    f(kFirst, kHeld == ordered ? rows[0] : permute<apart, kHeld, ordered>(rows[0], rows[0], each));
  } else {
    [&]<int... kResidue>(std::integer_sequence<int, kResidue...>) __attribute__((always_inline)) {
      (
          [&]() __attribute__((always_inline)) {
            constexpr int first = kFirst + kResidue * kStep;
            constexpr auto wanted = q == 2 ? every<lanes>(2 * kStep, first) : in_place(kHeld, apart, q * kStep, first);
            V own[kLeft / q];
#pragma GCC unroll 8
            for (int g = 0; g < kLeft / q; ++g) {
              const V* const of = rows + g * q;
              if constexpr (q == 2) {
                own[g] = permute<apart, kHeld, wanted>(of[0], of[1], each);
              } else {
                own[g] = choose_in_place<q, apart, wanted>(of, each);
              }
            }
            part_further<kLeft / q, q * kStep, first, wanted, kAll>(own, f);
          }(),
          ...);
    }(std::make_integer_sequence<int, kAll ? q : 1>());
  }
}

// Of N vectors in which N objectives take turns, one vector to each objective: f(objective, vector). One prime factor
// of N after the other, as that needs fewer instructions: with AVX-512 5 a vector at N = 10, 4 at N = 16. Odd ones come
// first: what is wanted is chosen in place (blends, which more ports make), and put in order by what follows.
template <int N, class C, class F>
inline __attribute__((always_inline)) void part(const typename Simd<C>::V* rows, F f) {
  part_further<N, 1, 0, every<kBlock<C>>(1, 0), true>(rows, f);
}

// Of the same, one vector: of the objective that comes first.
template <int N, class C>
inline __attribute__((always_inline)) auto first_of(const typename Simd<C>::V* rows) {
  typename Simd<C>::V found;
  part_further<N, 1, 0, every<kBlock<C>>(1, 0), false>(rows, [&](int, typename Simd<C>::V x) { found = x; });
  return found;
}

// In place, as step 1 is known where it is asked for.
template <class S, class C>
inline __attribute__((always_inline)) void load_run(const S* __restrict src, int64_t step, int m, C* __restrict dst) {
  for (int k = 0; k < m; ++k) dst[k] = Storage<S>::load(src[k * step]);
}

template <class V, class S>
inline __attribute__((always_inline)) V load_as(const S* src) {
  V x;
  using C = std::remove_reference_t<decltype(x[0])>;
  if constexpr (std::is_same_v<S, C>) {
    memcpy(&x, src, sizeof x);
  } else {
    alignas(V) C flat[sizeof x / sizeof(C)];
    load_run(src, 1, sizeof x / sizeof(C), flat);
    memcpy(&x, flat, sizeof x);
  }
  return x;
}

template <class C, class S>
inline auto load_vector(const S* src) {
  return load_as<typename Simd<C>::V>(src);
}

// A vector whose blocks stand so many elements apart.
template <class C, class S>
inline __attribute__((always_inline)) auto load_blocks(const S* src, int64_t apart) {
  if constexpr (kBlock<C> == Simd<C>::lanes) {
    return load_vector<C>(src);
  } else {
    typedef C Half __attribute__((vector_size(sizeof(C) * kBlock<C>)));
    return joined(load_as<Half>(src), load_as<Half>(src + apart));
  }
}

// A vector of tokens, as part() wants them: N entries of each, and `step` elements to the next, which are N unless a
// token is whole blocks.
template <int N, class C, class S>
inline __attribute__((always_inline)) void load_rows(const S* src, int64_t step, typename Simd<C>::V* rows) {
  constexpr int block = kBlock<C>, blocks = N / block;  // a token
#pragma GCC unroll 16
  for (int r = 0; r < N; ++r) {
    if constexpr (N % block == 0) {
      rows[r] = load_blocks<C>(src + r / blocks * step + r % blocks * block, block * step);
    } else {
      rows[r] = load_blocks<C>(src + r * block, block * N);
    }
  }
}

// Up to so many vectors in which objectives take turns, one of them is parted by shuffles; of more its entries are
// loaded one by one, which with AVX2 takes 5 cycles (shuffles of 4: 5, of 8: 9, of 16: 19).
constexpr int kShuffled = PAMA_VECTOR_BYTES == 32 ? 4 : 16;

// Every step-th entry, as a vector. kStep: `step` or, beyond kShuffled, 0. Up to there what is read is whole vectors.
template <int kStep, class C, int... kLane>
inline __attribute__((always_inline)) auto every_entry(const C* src, int64_t step,
                                                       std::integer_sequence<int, kLane...>) {
  using V = typename Simd<C>::V;
  if constexpr (kStep == 0) {
    return V{src[kLane * step]...};
  } else {
    V rows[kStep];
    load_rows<kStep, C>(src, kStep, rows);
    return first_of<kStep, C>(rows);
  }
}

// Of the last tokens, behind which nothing might be, no whole vectors. One copy of each, as they are many.
template <int kStep, class S, class C>
__attribute__((noinline)) void load_every(const S* __restrict src, int64_t step, int m, C* __restrict dst) {
  constexpr int lanes = Simd<C>::lanes;
  int k = 0;
  if constexpr (std::is_same_v<S, C>)
    for (; k + lanes < m; k += lanes) {
      const auto x = every_entry<kStep>(src + k * step, step, Places<C>{});
      memcpy(dst + k, &x, sizeof x);
    }
  load_run(src + k * step, step, m - k, dst + k);
}

template <class S, class C, class Params>
void load_plane(const Params& p, const Plane& q, int64_t first, int count, C* dst) {
  for_runs(p, first, count, [&](int64_t row, int64_t col, int done, int m) {
    const S* src = at<const S>(q, row, col);
    if (q.col == 1) return load_run(src, 1, m, dst + done);
    [&]<int... kStep>(std::integer_sequence<int, kStep...>) {
      const bool known = ((q.col == kStep + 2 && (load_every<kStep + 2>(src, q.col, m, dst + done), true)) || ...);
      if (!known) load_every<0>(src, q.col, m, dst + done);
    }(std::make_integer_sequence<int, kShuffled - 1>());
  });
}

template <class S, class C, class Params>
void store_plane(const Params& p, const Plane& q, int64_t first, int count, const C* src) {
  for_runs(p, first, count, [&](int64_t row, int64_t col, int done, int m) {
    S* __restrict to = at<S>(q, row, col);
    const C* __restrict from = src + done;
    if (q.col == 1) {
      for (int k = 0; k < m; ++k) to[k] = Storage<S>::store(from[k]);
    } else {
      for (int k = 0; k < m; ++k) to[k * q.col] = Storage<S>::store(from[k]);
    }
  });
}

// Objectives last and adjacent: N of them, in one walk over memory in which a token takes `step` elements: N, or more
// if the N are whole vectors.
template <int N, class S, class C>
void deinterleave(const S* __restrict src, int64_t step, int m, C* __restrict dst, int stride) {
  using V = typename Simd<C>::V;
  constexpr int lanes = Simd<C>::lanes;
  int k = 0;
  for (; k + lanes <= m; k += lanes) {
    V rows[N];
    load_rows<N, C>(src + k * step, step, rows);
    part<N, C>(rows, [&](int i, V x) { memcpy(dst + i * stride + k, &x, sizeof x); });
  }
  for (; k < m; ++k)
    for (int i = 0; i < N; ++i) dst[i * stride + k] = Storage<S>::load(src[k * step + i]);
}

template <class S, class C, class Params>
void load_objectives(const Params& p, const Plane* planes, bool adjacent, int64_t first, int count, C* dst,
                     int stride) {
  if (!adjacent) {
    for (int i = 0; i < p.n; ++i) load_plane<S>(p, planes[i], first, count, dst + i * stride);
    return;
  }
  for_runs(p, first, count, [&](int64_t row, int64_t col, int done, int m) {
    const S* src = at<const S>(planes[0], row, col);
    C* to = dst + done;
    // Up to 16 at once; of more, 16 at a time, the last of them together with some of those before.
    [&]<int... kN>(std::integer_sequence<int, kN...>) {
      static_cast<void>(((p.n == kN + 2 && (deinterleave<kN + 2>(src, p.n, m, to, stride), true)) || ...));
    }(std::make_integer_sequence<int, 15>());
    for (int i = 0; p.n > 16 && i < p.n; i += 16) {
      const int from = smaller(i, p.n - 16);
      deinterleave<16>(src + from, p.n, m, to + from * stride, stride);
    }
  });
}

// Returns how many are set.
template <class U, class I, class Params>
int load_mask_as(const Params& p, int64_t first, int count, U significant, I* valid) {
  int set = 0;
  for_runs(p, first, count, [&](int64_t row, int64_t col, int done, int m) {
    const U* __restrict src = at<const U>(p.mask, row, col);
    I* __restrict to = valid + done;
    const int64_t step = p.mask.col;
    int k = 0;
    if constexpr (sizeof(U) < sizeof(I)) {  // the usual case, without comparing: minus the smaller of the bits and 1
      using M = typename Simd<std::conditional_t<sizeof(I) == 4, float, double>>::M;
      constexpr int lanes = sizeof(M) / sizeof(I);
      M counted{};
      for (; step == 1 && k + lanes <= m; k += lanes) {
        const M one = smaller(widened<M>(src + k) & static_cast<I>(significant), M{} + 1), set_all = -one;
        counted += one;
        memcpy(to + k, &set_all, sizeof set_all);
      }
      I each[lanes];
      memcpy(each, &counted, sizeof each);
      asm volatile("" : : "r"(each) : "memory");  // for the reason told in lanes.h
      for (I one : each) set += static_cast<int>(one);
    }
    for (; k < m; ++k) {
      to[k] = (src[k * step] & significant) ? -1 : 0;
      set -= static_cast<int>(to[k]);
    }
  });
  return set;
}

// The mask as it is (see is_set): -1 where valid, else 0. Returns how many are.
template <class I, class Params>
int load_mask(const Params& p, int64_t first, int count, I* valid) {
  const bool sign = is_float(p.mask_dtype);
  switch (size_of(p.mask_dtype)) {
    case 1: return load_mask_as<uint8_t>(p, first, count, 0xff, valid);
    case 2: return load_mask_as<uint16_t>(p, first, count, sign ? 0x7fff : 0xffff, valid);
    case 4: return load_mask_as<uint32_t>(p, first, count, sign ? 0x7fffffffu : 0xffffffffu, valid);
    default: return load_mask_as<uint64_t>(p, first, count, sign ? ~(uint64_t{1} << 63) : ~uint64_t{0}, valid);
  }
}

template <class C>
void load_valid(const CombineParams& p, int64_t first, int count, Tile<C>& tile) {
  constexpr int lanes = Simd<C>::lanes;
  if (p.mask.data) {
    tile.valid_count = load_mask(p, first, count, tile.valid);
  } else {
    fill(tile.valid, 0, count, -1);
    tile.valid_count = count;
  }
  fill(tile.valid, count, (count + lanes - 1) / lanes * lanes, 0);
}

template <class S, class C>
void load_gates_as(const CombineParams& p, int64_t first, int count, bool lower, Tile<C>& tile) {
  using L = typename Storage<S>::Compute;
  const L high = at_most<L>(p.log_high), low = at_least<L>(p.log_low);
  for_runs(p, first, count, [&](int64_t row, int64_t col, int done, int m) {
    const S* __restrict src = at<const S>(p.log_ratio, row, col);
    auto* __restrict not_above = tile.not_above + done;
    auto* __restrict not_below = tile.not_below + done;
    const auto* __restrict valid = tile.valid + done;
    const int64_t step = p.log_ratio.col;
    for (int k = 0; k < m; ++k)
      not_above[k] = valid[k] & (Storage<S>::load(src[step == 1 ? k : k * step]) <= high ? -1 : 0);
    for (int k = 0; k < m && lower; ++k) not_below[k] = Storage<S>::load(src[k * step]) >= low ? -1 : 0;
  });
}

// The lower ones only where an advantage may need them.
template <class C>
void load_gates(const CombineParams& p, int64_t first, int count, bool lower, Tile<C>& tile) {
  constexpr int lanes = Simd<C>::lanes;
  const int padded = (count + lanes - 1) / lanes * lanes;
  if (!p.log_ratio.data) {
    memcpy(tile.not_above, tile.valid, padded * sizeof tile.valid[0]);
    if (lower) fill(tile.not_below, 0, count, -1);
    return;
  }
  fill(tile.not_above, count, padded, 0);
  switch (p.log_ratio_dtype) {
    case DType::kFloat32: return load_gates_as<float>(p, first, count, lower, tile);
    case DType::kFloat64: return load_gates_as<double>(p, first, count, lower, tile);
    case DType::kFloat16: return load_gates_as<Half>(p, first, count, lower, tile);
    default: return load_gates_as<BFloat16>(p, first, count, lower, tile);
  }
}

}  // namespace PAMA_ISA
}  // namespace pama
