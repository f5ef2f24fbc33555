// What the warps and blocks of the kernel of plain calls (cuda/direct.cuh) find, and where the others look for it.
#pragma once

#include "launch.h"
#include "scan.cuh"

namespace pama {

constexpr int kDirectWarps = 32;   // of a block; as many objectives at most: where all meet, a lane has one of them
constexpr int kDirectSlices = 16;  // of an objective in a block: whoever needs the whole adds them up
constexpr int kDirectSlice = 128;  // tokens that are worth a warp

// What a warp has found in its slice of an objective, or all slices of a block, or all blocks.
template <class C>
struct Found {
  C sum{0}, active{0}, low = static_cast<C>(HUGE_VAL), high = -static_cast<C>(HUGE_VAL);
  C drift{0}, squares{0};  // around the mean of all
  unsigned usable = 0, valid = 0, positive = 0, clipped = 0;

  __device__ __forceinline__ void add(const Found& x) {
    sum += x.sum;
    active += x.active;
    low = static_cast<C>(fmin(low, x.low));
    high = static_cast<C>(fmax(high, x.high));
    drift += x.drift;
    squares += x.squares;
    usable += x.usable;
    valid += x.valid;
    positive += x.positive;
    clipped += x.clipped;
  }
};

template <class C, int kMany>
struct alignas(kBytes) DirectShared {
  // [n, slices], of the block; then of all blocks, of which each slice has some
  Found<C> slice[kMany > 1 ? kMany * kDirectSlices : kDirectWarps];
  Found<C> block[kDirectWarps];  // [n]
  bool last;                     // of all blocks to get that far
};
// From one plane to the next in shared memory, in elements: what an entry and the next go to lies in different banks.
template <class S>
__host__ __device__ constexpr int64_t direct_pitch(int64_t tokens) {
  return tokens + kBytes / sizeof(S);
}

// In the workspace: how many blocks have published their spread, and what each has found.
template <class C>
struct Published {
  unsigned* count;
  Found<C>* found;     // [blocks, n]
  volatile C* spread;  // [blocks, n, 2]: drift and squares, which no cache may hold

  __device__ __forceinline__ Published(void* workspace, int n)
      : count(static_cast<unsigned*>(workspace)),
        found(reinterpret_cast<Found<C>*>(static_cast<char*>(workspace) + kBytes)),
        spread(reinterpret_cast<C*>(found + static_cast<int>(gridDim.x) * n)) {}

  static __host__ int64_t bytes(int64_t blocks, int n) {
    return kBytes + blocks * n * static_cast<int64_t>(sizeof(Found<C>) + 2 * sizeof(C));
  }
};

}  // namespace pama
