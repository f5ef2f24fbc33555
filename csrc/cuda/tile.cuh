// A tile of tokens in shared memory, objective by objective, whatever dtype and layout it came from. Everything after
// the load is one arithmetic on it, and what fits there is read from device memory once.
#pragma once

#include <type_traits>

#include "entry.cuh"

namespace pama {

constexpr int kBytes = 16;  // of one access to device memory
constexpr int kQuad = 4;    // tokens that a thread works on at once
// Accesses that a thread has under way, so that memory does not wait for it.
template <class S>
constexpr int kLoads = sizeof(S) == 2 ? 4 : 8;

enum TokenFlags : uint8_t { kValidFlag = 1, kNotAboveFlag = 2, kNotBelowFlag = 4, kPresentFlag = 8 };

// Numbers that are loaded or stored at once.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount < kBytes ? sizeof(T) * kCount : kBytes) Pack {
  T at[kCount];
};

template <class T, int kCount>
__device__ Pack<T, kCount>& pack(T* x) {
  return *reinterpret_cast<Pack<T, kCount>*>(x);
}
template <class T, int kCount>
__device__ const Pack<T, kCount>& pack(const T* x) {
  return *reinterpret_cast<const Pack<T, kCount>*>(x);
}
template <class T, int kCount>
__device__ bool holds_pack(const T* x) {
  return reinterpret_cast<uintptr_t>(x) % alignof(Pack<T, kCount>) == 0;
}

// Where the arrays of a tile stand in shared memory, behind `base`, and how many tokens it has room for. Planes are a
// little further apart, so that what is dealt out to several of them goes to several banks.
template <class C>
struct Tile {
  C* x;       // [n, stride]: A'; later, in place, c_i A_i; else the first plane may hold the combination
  C* gated;   // [n, stride]: I(A), min-norm only
  int* pool;  // [tokens]: of Normalize.by, groups only
  uint8_t* flags;
  int tokens, stride;

  // Of so many tokens, a multiple of kStep.
  static constexpr int kStep = 32;
  static __host__ __device__ constexpr int64_t bytes(int n, bool gram, bool pools, int64_t tokens) {
    return (tokens + kQuad) * static_cast<int64_t>(sizeof(C)) * n * (gram ? 2 : 1) + tokens * (pools ? 5 : 1);
  }

  __device__ Tile(char* base, const CombineParams& p) : tokens(p.tile_tokens), stride(p.tile_tokens + kQuad) {
    const int64_t plane = static_cast<int64_t>(p.n) * stride;
    x = reinterpret_cast<C*>(base);
    gated = x + plane;
    pool = reinterpret_cast<int*>(p.has_gram() ? gated + plane : gated);
    flags = reinterpret_cast<uint8_t*>(p.normalizes_groups() ? pool + tokens : pool);
  }
};

// Calls each(k, integral_constant<turns>) for k = first, first + step, ... below count, whose work is done as many
// times at once as it says: as long as there is enough, kTurns of them, then one by one.
template <int kTurns, class F>
__device__ __forceinline__ void in_turns(int first, int step, int count, F each) {
  int k = first;
#pragma unroll 1
  for (; k + (kTurns - 1) * step < count; k += kTurns * step) each(k, std::integral_constant<int, kTurns>());
  if constexpr (kTurns > 1) {
#pragma unroll 1
    for (; k < count; k += step) each(k, std::integral_constant<int, 1>());
  }
}

// N objectives that take turns in memory: a thread loads kVec tokens, N accesses side by side, and stores kVec tokens
// of each objective.
//
//   thread 0, float, N = 3    a0 b0 c0 a1 | b1 c1 a2 b2 | c2 a3 b3 c3   ->   a0 a1 a2 a3 .. | b0 b1 b2 b3 .. | c0 ..
template <int N, class S, class C>
__device__ __forceinline__ void load_interleaved(const S* __restrict from, int count, const Tile<C>& tile) {
  constexpr int kVec = kBytes / sizeof(S), kStep = kThreads * kVec, kMost = N < kLoads<S> ? kLoads<S> / N : 1;
  in_turns<kMost>(threadIdx.x * kVec, kStep, count, [&](int first, auto turns) {
    constexpr int kTurns = decltype(turns)::value;
    Pack<S, kVec> raw[kTurns][N];
#pragma unroll
    for (int d = 0; d < kTurns; ++d)
#pragma unroll
      for (int j = 0; j < N; ++j)
        raw[d][j] = reinterpret_cast<const Pack<S, kVec>*>(from + static_cast<int64_t>(first + d * kStep) * N)[j];
#pragma unroll
    for (int d = 0; d < kTurns; ++d) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        Pack<C, kVec> own;
#pragma unroll
        for (int t = 0; t < kVec; ++t) own.at[t] = Storage<S>::load(raw[d][(t * N + i) / kVec].at[(t * N + i) % kVec]);
        pack<C, kVec>(tile.x + i * tile.stride + first + d * kStep) = own;
      }
    }
  });
}

// The same by accesses of one thread beside the next, whose elements are then dealt out one by one: for many
// objectives, of which a thread could not hold that much. N = 0: n of them.
template <int N, class S, class C>
__device__ __forceinline__ void load_flat(const S* __restrict from, int count, int n, const Tile<C>& tile) {
  constexpr int kVec = kBytes / sizeof(S), kStep = kThreads * kVec;
  if (N > 0) n = N;
  in_turns<kLoads<S>>(threadIdx.x * kVec, kStep, count * n, [&](int first, auto turns) {  // kVec divides the count
    constexpr int kTurns = decltype(turns)::value;
    Pack<S, kVec> raw[kTurns];
#pragma unroll
    for (int d = 0; d < kTurns; ++d) raw[d] = *reinterpret_cast<const Pack<S, kVec>*>(from + first + d * kStep);
#pragma unroll
    for (int d = 0; d < kTurns; ++d) {
      int k = (first + d * kStep) / n, i = first + d * kStep - k * n;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        tile.x[i * tile.stride + k] = Storage<S>::load(raw[d].at[j]);
        if (++i == n) i = 0, ++k;
      }
    }
  });
}

template <class S, class C>
__device__ __forceinline__ void store_flat(S* __restrict to, int count, int n, const Tile<C>& tile) {
  constexpr int kVec = kBytes / sizeof(S);
#pragma unroll 1
  for (int e = threadIdx.x * kVec; e < count * n; e += kThreads * kVec) {
    Pack<S, kVec> raw;
    int k = e / n, i = e - k * n;
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      raw.at[j] = Storage<S>::store(tile.x[i * tile.stride + k]);
      if (++i == n) i = 0, ++k;
    }
    *reinterpret_cast<Pack<S, kVec>*>(to + e) = raw;
  }
}

template <class S, class C>
__device__ __forceinline__ void load_objectives(const S* from, int count, int n, const Tile<C>& tile) {
  switch (n) {
    case 2: return load_interleaved<2>(from, count, tile);
    case 3: return load_interleaved<3>(from, count, tile);
    case 4: return load_interleaved<4>(from, count, tile);
    case 5: return load_interleaved<5>(from, count, tile);
    case 6: return load_interleaved<6>(from, count, tile);
    case 7: return load_interleaved<7>(from, count, tile);
    case 8: return load_interleaved<8>(from, count, tile);
    case 9: return load_flat<9>(from, count, n, tile);
    case 10: return load_flat<10>(from, count, n, tile);
    case 11: return load_flat<11>(from, count, n, tile);
    case 12: return load_flat<12>(from, count, n, tile);
    case 13: return load_flat<13>(from, count, n, tile);
    case 14: return load_flat<14>(from, count, n, tile);
    case 15: return load_flat<15>(from, count, n, tile);
    case 16: return load_flat<16>(from, count, n, tile);
    default: return load_flat<0>(from, count, n, tile);
  }
}

// How many of the tokens [first, first + count) of plane q can be accessed kBytes at a time.
template <class S>
__device__ int whole_packs(const CombineParams& p, const Plane& q, int64_t first, int count) {
  constexpr int kVec = kBytes / sizeof(S);
  const auto address = reinterpret_cast<uintptr_t>(q.data) + first * q.col * static_cast<int64_t>(sizeof(S));
  return p.access != Access::kAny && address % kBytes == 0 ? count / kVec * kVec : 0;
}

// Flags of the tokens from `first` on, four at a time; returns how many that are, none where mask or log_ratio stand
// otherwise. The last thread takes the first: those before it load advantages meanwhile.
template <class C>
__device__ __forceinline__ int load_flags(const CombineParams& p, int64_t first, int count, bool gates,
                                          const Tile<C>& tile) {
  const auto* mask = reinterpret_cast<const uint8_t*>(p.mask.data);
  const auto* log_ratio = gates ? reinterpret_cast<const float*>(p.log_ratio.data) : nullptr;
  if (!p.gates_together || (mask && !holds_pack<uint8_t, kQuad>(mask + first)) ||
      (log_ratio && !holds_pack<float, kQuad>(log_ratio + first)))
    return 0;
  constexpr int kStep = kQuad * kThreads;
  const int whole = count / kQuad * kQuad;
  in_turns<2>(kQuad * (kThreads - 1 - threadIdx.x), kStep, whole, [&](int k, auto turns) {
    constexpr int kTurns = decltype(turns)::value;
    unsigned valid[kTurns];
    Pack<float, kQuad> log_u[kTurns];
#pragma unroll
    for (int d = 0; d < kTurns; ++d) {
      valid[d] = mask ? *reinterpret_cast<const unsigned*>(mask + first + k + d * kStep) : ~0u;
      if (log_ratio) log_u[d] = pack<float, kQuad>(log_ratio + first + k + d * kStep);
    }
#pragma unroll
    for (int d = 0; d < kTurns; ++d) {
      unsigned flags = log_ratio ? 0 : (kNotAboveFlag + kNotBelowFlag) * 0x01010101u;
#pragma unroll
      for (int t = 0; t < kQuad; ++t) {
        if (log_ratio && log_u[d].at[t] <= p.gate_high) flags |= unsigned{kNotAboveFlag} << 8 * t;
        if (log_ratio && log_u[d].at[t] >= p.gate_low) flags |= unsigned{kNotBelowFlag} << 8 * t;
        if (valid[d] & 0xffu << 8 * t) flags |= unsigned{kValidFlag} << 8 * t;
      }
      *reinterpret_cast<unsigned*>(tile.flags + k + d * kStep) = flags;
    }
  });
  return whole;
}

// The tokens [first, first + count) of those objectives that `wanted` has a bit of, with or without their gates.
template <class S, class C>
__device__ __forceinline__ void load_tile(const CombineParams& p, int64_t first, int count, uint64_t wanted, bool gates,
                                          const Tile<C>& tile) {
  constexpr int kVec = kBytes / sizeof(S);
  int whole = whole_packs<S>(p, p.advantages[0], first, count);
  // Of a few among many that take turns, single elements are less to read.
  if (p.access == Access::kInterleaved && 8 * __popcll(wanted) < p.n) whole = 0;
  if (whole && p.access == Access::kInterleaved) {
    load_objectives(reinterpret_cast<const S*>(p.advantages[0].data) + first * p.n, whole, p.n, tile);
  } else if (whole) {
    for (int i = 0; i < p.n; ++i) {
      if (!(wanted >> i & 1)) continue;
      const S* __restrict from = reinterpret_cast<const S*>(p.advantages[i].data) + first;
#pragma unroll 4
      for (int k = threadIdx.x * kVec; k < whole; k += kThreads * kVec) {
        const Pack<S, kVec> raw = *reinterpret_cast<const Pack<S, kVec>*>(from + k);
        Pack<C, kVec> own;
#pragma unroll
        for (int j = 0; j < kVec; ++j) own.at[j] = Storage<S>::load(raw.at[j]);
        pack<C, kVec>(tile.x + i * tile.stride + k) = own;
      }
    }
  }
  const int flagged = load_flags(p, first, count, gates, tile);
  const bool pools = p.normalizes_groups() && !p.measures;
  const int padded = (count + Tile<C>::kStep - 1) / Tile<C>::kStep * Tile<C>::kStep;
  for (int k = min(whole, flagged) + threadIdx.x; k < padded; k += kThreads) {  // what is left, one by one
    uint8_t flags = 0;
    if (k < count) {
      const Token t = token_at(p, first + k, gates);
      flags = t.valid * kValidFlag + t.not_above * kNotAboveFlag + t.not_below * kNotBelowFlag;
      if (pools) tile.pool[k] = static_cast<int>(t.pool);
      for (int i = 0; i < p.n && k >= whole; ++i)
        if (wanted >> i & 1) tile.x[i * tile.stride + k] = t.valid ? sample_at<S>(p, i, t) : C{0};
    }
    if (k >= flagged) tile.flags[k] = flags;
  }
}

// The tile's x, back to where the advantages came from.
template <class S, class C>
__device__ __forceinline__ void store_tile(const CombineParams& p, int64_t first, int count, const Tile<C>& tile) {
  constexpr int kVec = kBytes / sizeof(S);
  const int whole = whole_packs<S>(p, p.advantages[0], first, count);
  if (whole && p.access == Access::kInterleaved) {
    store_flat(reinterpret_cast<S*>(p.advantages[0].data) + first * p.n, whole, p.n, tile);
  } else if (whole) {
    for (int i = 0; i < p.n; ++i) {
      S* to = reinterpret_cast<S*>(p.advantages[i].data) + first;
#pragma unroll 2
      for (int k = threadIdx.x * kVec; k < whole; k += kThreads * kVec) {
        Pack<S, kVec> raw;
#pragma unroll
        for (int j = 0; j < kVec; ++j) raw.at[j] = Storage<S>::store(tile.x[i * tile.stride + k + j]);
        *reinterpret_cast<Pack<S, kVec>*>(to + k) = raw;
      }
    }
  }
  for (int k = whole + threadIdx.x; k < count; k += kThreads) {
    const Token t = token_at(p, first + k, false);
    for (int i = 0; i < p.n; ++i) store<S>(p.advantages[i], t, tile.x[i * tile.stride + k]);
  }
}

}  // namespace pama
