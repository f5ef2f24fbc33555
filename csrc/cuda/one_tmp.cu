// launch_combine_cuda: one launch per call, at every level and size; what Normalize asks for comes in launches of its
// own before and after it (cuda/normalize.cu).
//
// Tokens are dealt to blocks in equal runs, and a block takes its run a tile at a time (cuda/tile.cuh); pools (rows,
// groups) are dealt round robin, small ones several to a tile. In a tile, a warp takes a slice of the tokens of some
// objectives (or a part of one a small pool), and what they find meets in trees: in shared memory, then where the
// blocks meet, always in the same order. No float atomics, so the same input on the same device gives the same bits.
// Slices have the same tokens for every objective, so equal objectives get equal bits.
#include <algorithm>
#include <stdexcept>

#include "block.cuh"
#include "launch.h"
#include "normalize.h"

namespace pama {
namespace {

constexpr int kBlocksPerSM = 2;
constexpr int kClusterBlocks = 8;
constexpr int kSlice = 256;  // tokens that are worth a slice: rather than fewer, a warp takes fewer objectives
static_assert(kThreads >= kMaxObjectives + 2, "one thread per objective, and two for the sums at level token");

// What is launched. The blocks meet in the cheapest way that their number allows: within a block, in a cluster through
// distributed shared memory (compute capability 9.0), or in a grid that is resident as a whole, through memory.
//
//   elements        blocks                                          meet in
//   up to 8192      1                                               the block
//   up to 65536     8 at most, one for 8192 elements                a cluster; where there is none, the grid
//   beyond          2 a multiprocessor at most, one for 4096        the grid
//
// A tile is as large as the share of a block, or as what fits into half of a multiprocessor's shared memory.
struct ShapeRow {
  int64_t up_to, elements_per_block;
  int most_blocks;
  Meeting meeting;
};
constexpr ShapeRow kShapes[] = {
    {8192, 8192, 1, Meeting::kBlock},
    {65536, 8192, kClusterBlocks, Meeting::kCluster},
    {INT64_MAX, 4096, INT32_MAX, Meeting::kGrid},
};

template <class S, Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) combine_kernel(const __grid_constant__ CombineParams p) {
  Block<S, kKind>(p, dynamic_shared()).run();
}

template __global__ void combine_kernel<float, Kind::kPools>(const __grid_constant__ CombineParams p);
}  // namespace
}  // namespace pama
