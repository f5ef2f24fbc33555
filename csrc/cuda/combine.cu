// launch_combine_cuda: one launch per call, at every level and size; what Normalize asks for comes in launches of its
// own before and after it (cuda/normalize.cu), unless groups have one size and tiles hold whole ones.
//
// Tokens are dealt to blocks in equal runs, and a block takes its run a tile at a time (cuda/tile.cuh); pools (rows,
// groups) are dealt round robin, small ones several to a tile. In a tile, a warp takes a slice of the tokens of some
// objectives (or a part of one a small pool), and what they find meets in trees: in shared memory, then where the
// blocks meet, always in the same order. No float atomics, so the same input on the same device gives the same bits.
// Slices have the same tokens for every objective, so equal objectives get equal bits.
#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "block.cuh"
#include "direct.cuh"
#include "launch.h"
#include "normalize.h"

namespace pama {
namespace {

constexpr int kBlocksPerSM = 2;
constexpr int kClusterBlocks = 8;
constexpr int kSlice = 256;  // tokens that are worth a slice: rather than fewer, a warp takes fewer objectives
static_assert(kThreads >= kMaxObjectives + 2, "one thread per objective, and two for the sums at level token");

// What is launched, by the first row that a call belongs to:
//
//   call                      elements      kernel       blocks                                   meet in
//   plain, N up to 32         up to 8192    direct.cuh   1                                        the block
//   plain, N up to 32         up to 65536   direct.cuh   8 at most, one for 8192 elements         a cluster
//   plain, N up to 32         beyond        direct.cuh   1 a multiprocessor at most, 1 for 4096   the grid
//   any                       up to 4096    block.cuh    1                                        the block
//   any                       up to 32768   block.cuh    8 at most, one for 2048                  a cluster
//   any                       beyond        block.cuh    2 a multiprocessor at most, 1 for 2048   the grid
//
// The first three rows are kDirectShapes. Plain: at level batch, asking for nothing unusual (is_direct()), and no
// larger than the chip: half of the second-level cache, and for each block kDirectBytes of planes, or what shared
// memory a block may have, whether its layout needs planes or not. The blocks meet in the cheapest way that their
// number allows: within a block, in a cluster through distributed shared memory (compute capability 9.0; elsewhere the
// grid), or in a grid that is resident as a whole, through memory. A tile of block.cuh is as large as the share of a
// block or as a whole number of small pools, as what fits into half of a multiprocessor's shared memory, or as
// kTileTokens. Layouts that are accessed 16 bytes at a time: see access_of().
struct ShapeRow {
  int64_t up_to, elements_per_block;
  int most_blocks;
  Meeting meeting;
};
constexpr ShapeRow kShapes[] = {
    {4096, 4096, 1, Meeting::kBlock},
    {32768, 2048, kClusterBlocks, Meeting::kCluster},
    {INT64_MAX, 2048, INT32_MAX, Meeting::kGrid},
};
constexpr ShapeRow kDirectShapes[] = {
    {8192, 8192, 1, Meeting::kBlock},
    {65536, 8192, kClusterBlocks, Meeting::kCluster},
    {INT64_MAX, 4096, INT32_MAX, Meeting::kGrid},
};
constexpr int kDirectBytes = 192 * 1024;

template <class S, Kind kKind>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) combine_kernel(const __grid_constant__ CombineParams p) {
  Block<S, kKind>(p, dynamic_shared()).run();
}

Kind kind_of(const CombineParams& p) {
  if (p.level == Level::kToken) return Kind::kTokens;
  return p.has_gram() ? Kind::kGram : Kind::kPools;
}

// f(S{}, integral_constant<Kind>) for the kernel that serves the call.
template <class F>
auto with_kernel(const CombineParams& p, F f) {
  return with_dtype(p.dtype, [&](auto s) {
    switch (kind_of(p)) {
      case Kind::kTokens: return f(s, std::integral_constant<Kind, Kind::kTokens>{});
      case Kind::kGram: return f(s, std::integral_constant<Kind, Kind::kGram>{});
      default: return f(s, std::integral_constant<Kind, Kind::kPools>{});
    }
  });
}

bool has_pools(const CombineParams& p) { return p.level == Level::kSequence || p.level == Level::kGroup; }

// Of a kernel on a device: what lets two blocks reside, or what the shortest tile of the most objectives needs.
template <class S, Kind kKind>
int most_shared(int device) {
  using C = typename Storage<S>::Compute;
  constexpr int64_t kLeast =
      sizeof(Shared<C>) + Tile<C>::bytes(kMaxObjectives, kKind == Kind::kGram, true, Tile<C>::kStep);
  const int shared = attribute_of<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
  if (kLeast > shared) throw std::runtime_error("this CUDA device has too little shared memory");
  const int resident = attribute_of<cudaDevAttrMaxSharedMemoryPerMultiprocessor>(device) / kBlocksPerSM -
                       attribute_of<cudaDevAttrReservedSharedMemoryPerBlock>(device);
  return std::max(std::min(shared, resident), static_cast<int>(kLeast));
}

const ShapeRow& shape_of(const CombineParams& p, const ShapeRow (&table)[3]) {
  const int64_t elements = p.tokens() * p.n;
  return *std::find_if(table, table + 3, [&](const ShapeRow& row) { return elements <= row.up_to; });
}

template <auto kKernel>
Meeting meeting_of(const CombineParams& p, int64_t blocks, const ShapeRow (&table)[3]) {
  const int device = p.device.index;
  const bool clusters =
      attribute_of<cudaDevAttrComputeCapabilityMajor>(device) >= 9 && code_version<kKernel>(device) >= 90;
  if (blocks == 1) return Meeting::kBlock;
  return clusters && shape_of(p, table).meeting == Meeting::kCluster ? Meeting::kCluster : Meeting::kGrid;
}

// As many as the table says, however many reside.
int64_t wanted_blocks(const CombineParams& p, const ShapeRow (&table)[3]) {
  const ShapeRow& row = shape_of(p, table);
  const int64_t share = (p.tokens() * p.n + row.elements_per_block - 1) / row.elements_per_block;
  return std::min<int64_t>(has_pools(p) ? std::min(share, p.pools()) : share, row.most_blocks);
}

int blocks_for(const CombineParams& p) {
  const int64_t wanted = wanted_blocks(p, kShapes);
  if (wanted <= 1) return 1;
  return with_kernel(p, [&](auto s, auto kind) {
    using S = decltype(s);
    constexpr Kind kKind = decltype(kind)::value;
    const int device = p.device.index, shared = most_shared<S, kKind>(device);
    return static_cast<int>(
        std::min<int64_t>(wanted, resident_blocks<combine_kernel<S, kKind>>(device, kThreads, kBlocksPerSM, shared)));
  });
}

Access access_of(const CombineParams& p) {
  if (p.order || p.sums) return Access::kAny;
  const Plane& q = p.advantages[0];
  if (p.rows != 1 && q.row != p.cols * q.col) return Access::kAny;
  if (p.n > 1 && adjacent(p.advantages, p.n, p.dtype)) return Access::kInterleaved;
  for (int i = 0; i < p.n; ++i) {
    const Plane& each = p.advantages[i];
    if (each.col != 1 || (p.rows != 1 && each.row != p.cols)) return Access::kAny;
    if ((reinterpret_cast<uintptr_t>(each.data) - reinterpret_cast<uintptr_t>(q.data)) % kBytes) return Access::kAny;
  }
  return Access::kPlanes;
}

// Whether the tokens of a plane follow each other in memory.
bool in_a_row(const CombineParams& p, const Plane& q) { return q.col == 1 && (p.rows == 1 || q.row == p.cols); }

// What the kernel may take for granted.
void plan_entries(CombineParams& p) {
  p.plain = p.noon && !p.propagate && !p.affine && !p.marks() && (!p.weighted || p.solver == Solver::kFixed);
  const bool in_order = !p.order && !p.sums;
  p.gates_together = in_order && (!p.normalizes_groups() || p.measures) &&
                     (!p.mask.data || (in_a_row(p, p.mask) && size_of(p.mask_dtype) == 1)) &&
                     (!p.log_ratio.data || (in_a_row(p, p.log_ratio) && p.log_ratio_dtype == DType::kFloat32));
  p.out_together = in_order && p.out.data && in_a_row(p, p.out);
  p.gate_low = at_least<float>(p.log_low);
  p.gate_high = at_most<float>(p.log_high);
}

// One of which is resident on each multiprocessor.
int64_t direct_blocks(const CombineParams& p) {
  return std::clamp<int64_t>(wanted_blocks(p, kDirectShapes), 1,
                             attribute_of<cudaDevAttrMultiProcessorCount>(p.device.index));
}

// The tokens of a block.
int64_t direct_run(const CombineParams& p) {
  const int64_t blocks = direct_blocks(p), each = (p.tokens() + blocks - 1) / blocks;
  return (each + 31) / 32 * 32;
}

// What a block may have.
int direct_shared(const CombineParams& p) {
  return std::min(attribute_of<cudaDevAttrMaxSharedMemoryPerBlockOptin>(p.device.index), kDirectBytes);
}

// Whether cuda/direct.cuh does it: Noon and no Normalize, and no more than fits on the chip, in any layout.
template <class S>
bool is_direct(const CombineParams& p) {
  using Shared = DirectShared<typename Storage<S>::Compute, 1>;
  const int64_t bytes = p.tokens() * (p.n * size_of(p.dtype) + (p.mask.data ? 1 : 0) + (p.log_ratio.data ? 4 : 0));
  const int64_t cache = attribute_of<cudaDevAttrL2CacheSize>(p.device.index);
  const int64_t planes = p.n * direct_pitch<S>(direct_run(p)) * static_cast<int64_t>(sizeof(S));
  return p.level == Level::kBatch && !p.has_gram() && p.plain && !p.in_place && p.gates_together &&
         p.n <= kDirectWarps && planes + static_cast<int64_t>(sizeof(Shared)) <= direct_shared(p) && bytes <= cache / 2;
}

// As access_of(), but kAny where the first objective is not aligned, as the others then are not either.
template <class S>
Access direct_access(const CombineParams& p) {
  return reinterpret_cast<uintptr_t>(p.advantages[0].data) % kBytes ? Access::kAny : access_of(p);
}

template <class S, int kMany>
void launch_direct_of(CombineParams& p, void* stream) {
  const int64_t blocks = direct_blocks(p);
  p.run_tokens = direct_run(p);
  p.tile_slices = 1;  // as many in every layout
  const int slice = std::max<int>(kDirectSlice, 32 * kBytes / sizeof(S));
  while (64 * p.tile_slices * p.n <= direct_threads(1) && 2 * p.tile_slices <= kDirectSlices &&
         2 * p.tile_slices * slice <= p.run_tokens)
    p.tile_slices *= 2;
  constexpr auto kKernel = combine_direct_kernel<S, kMany>;
  p.meeting = meeting_of<kKernel>(p, blocks, kDirectShapes);
  int64_t shared = sizeof(DirectShared<typename Storage<S>::Compute, kMany>);
  if (kMany == 1 && p.access != Access::kPlanes) shared += p.n * direct_pitch<S>(p.run_tokens) * sizeof(S);
  allow_shared<kKernel>(p.device.index, direct_shared(p));
  launch_together(reinterpret_cast<const void*>(kKernel), blocks, 32 * p.tile_slices * (kMany > 1 ? 1 : p.n), p, stream,
                  "launching combine_direct_kernel", p.meeting, shared);
}

template <class S>
void launch_direct(CombineParams& p, void* stream) {
  p.access = direct_access<S>(p);
  switch (p.access == Access::kInterleaved ? p.n : 1) {
    case 2: return launch_direct_of<S, 2>(p, stream);
    case 3: return launch_direct_of<S, 3>(p, stream);
    case 4: return launch_direct_of<S, 4>(p, stream);
    default: return launch_direct_of<S, 1>(p, stream);
  }
}

// How many tokens a tile has room for.
template <class C>
int64_t capacity(const CombineParams& p, int64_t most_shared) {
  constexpr int64_t kStep = Tile<C>::kStep;
  const bool gram = p.has_gram(), grouped = p.normalize.by == Pool::kGroup;
  const int64_t none = sizeof(Shared<C>) + Tile<C>::bytes(p.n, gram, grouped, 0);
  const int64_t step = Tile<C>::bytes(p.n, gram, grouped, kStep) - Tile<C>::bytes(p.n, gram, grouped, 0);
  return std::min<int64_t>((most_shared - none) / step * kStep, kTileTokens);
}

// What the run of a block and its tiles are multiples of: where groups are measured there, of whole ones.
template <class C>
int64_t run_step(const CombineParams& p) {
  constexpr int64_t kStep = Tile<C>::kStep;
  return p.measures ? std::lcm(kStep, p.group_tokens()) : kStep;
}

// Whether groups are normalised by what their own tile says of them: those of one size of which tiles hold whole ones.
template <class C>
bool measures(const CombineParams& p, int64_t most_shared) {
  if (p.normalize.by != Pool::kGroup || p.normalize.groups != Groups::kSize || p.normalize.row_sums) return false;
  const int64_t size = p.group_tokens(), most = capacity<C>(p, most_shared);
  if (size == 0 || size > most || p.level == Level::kSequence) return false;
  const int64_t unit = std::lcm(int64_t{Tile<C>::kStep}, size);  // not so long that blocks would have nothing to do
  return p.level == Level::kGroup || (unit <= most && unit * blocks_for(p) <= p.tokens() + unit);
}

// Fills the parameters of the launch; returns the shared memory that it needs.
template <class C>
int64_t plan_tiles(CombineParams& p, int64_t blocks, int64_t most_shared) {
  constexpr int64_t kStep = Tile<C>::kStep;
  const bool gram = p.has_gram(), grouped = p.normalizes_groups();
  p.access = access_of(p);
  p.tile_pools = 1;
  auto rounded = [&](int64_t tokens) { return std::max(kStep, (tokens + kStep - 1) / kStep * kStep); };
  const int64_t unit = has_pools(p) ? kStep : run_step<C>(p), most = capacity<C>(p, most_shared) / unit * unit;
  const int64_t each = (p.tokens() + blocks - 1) / blocks;
  int64_t share = p.run_tokens = (each + unit - 1) / unit * unit;
  if (has_pools(p)) {
    const bool equal = p.level == Level::kSequence || p.normalize.groups == Groups::kSize;
    const int64_t size = p.level == Level::kSequence ? p.row_tokens : p.group_tokens();
    share = equal ? size : most;
    if (equal && size > 0 && size <= kPoolTokens && !gram) {
      p.tile_pools = static_cast<int>(
          std::max<int64_t>(1, std::min({most / size, int64_t{kUnits / p.n}, (p.pools() + blocks - 1) / blocks})));
      share = p.tile_pools * size;
    }
  }
  p.tile_tokens = static_cast<int>(std::min(most, rounded(share)));
  p.tile_slices = 1;
  while (p.tile_slices < kWarps && 2 * p.tile_slices * p.n <= kUnits && 2 * p.tile_slices * kSlice <= p.tile_tokens)
    p.tile_slices *= 2;
  return sizeof(Shared<C>) + Tile<C>::bytes(p.n, gram, grouped, p.tile_tokens);
}

}  // namespace

// Behind the blocks' own memory stands that of the normalisation.
static int64_t blocks_bytes(const CombineParams& p) {
  const int64_t direct = Published<double>::bytes(direct_blocks(p), p.n);
  return (std::max(block_bytes(p) * blocks_for(p), direct) + 15) / 16 * 16;
}

int64_t combine_cuda_workspace(const CombineParams& p) { return blocks_bytes(p) + normalize_cuda_workspace(p); }

int cuda_toolkit() { return CUDART_VERSION; }

void launch_combine_cuda(CombineParams& params, void* stream) {
  const DeviceGuard guard(params.device.index);
  with_kernel(params, [&](auto s, auto kind) {
    using S = decltype(s);
    using C = typename Storage<S>::Compute;
    constexpr Kind kKind = decltype(kind)::value;
    constexpr auto kKernel = combine_kernel<S, kKind>;
    const int most = most_shared<S, kKind>(params.device.index);
    params.measures = measures<C>(params, most);
    normalize_cuda(params, static_cast<char*>(params.workspace) + blocks_bytes(params), stream);
    plan_entries(params);
    if (is_direct<S>(params)) return launch_direct<S>(params, stream);
    const int64_t blocks = blocks_for(params);
    const int64_t shared = plan_tiles<C>(params, blocks, most);
    params.meeting = meeting_of<kKernel>(params, blocks, kShapes);
    allow_shared<kKernel>(params.device.index, most);
    launch_together(reinterpret_cast<const void*>(kKernel), blocks, kThreads, params, stream,
                    "launching combine_kernel", params.meeting, shared);
  });
  normalize_combined_cuda(params, stream);
}

}  // namespace pama
