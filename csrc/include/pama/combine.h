// The one parameter struct of `combine` and the functions that fill and run it.
#pragma once

#include <cstdint>
#include <string>

#include "pama/dtype.h"
#include "pama/hd.h"
#include "pama/normalize.h"
#include "pama/tensor.h"

namespace pama {

constexpr int kMaxObjectives = 64;
constexpr int kStatistics = 10;  // rows of the packed statistics, in the order of ObjectiveStats

enum class Level : uint8_t { kBatch, kSequence, kGroup, kToken };
enum class Solver : uint8_t { kClosedForm, kMinNorm, kFixed };

// How a CUDA kernel can read the advantages: 16 bytes at a time, objectives taking turns or each for itself, or not so.
enum class Access : uint8_t { kAny, kInterleaved, kPlanes };
// Where its blocks meet.
enum class Meeting : uint8_t { kBlock, kCluster, kGrid };

constexpr double kLogRatioLimit = 20.0;  // log_ratio is clamped to this before exp

// A number for each objective: read on the device, or given by the host.
struct PerObjective {
  const void* data;  // [n] floating, or null: then values
  DType dtype;
  int64_t stride;
  double values[kMaxObjectives];

  PAMA_HD double operator[](int i) const { return data ? float_at(data, dtype, i * stride) : values[i]; }
};

// What the caller asked for, checked for meaning by Python.
struct CombineOptions {
  int64_t dim;               // of the objectives; not used for a list of tensors
  double log_low, log_high;  // bounds on log_ratio within which I(A) is 1
  bool noon, propagate, skip_inactive;
  Level level;
  Solver solver;
  NormalizeOptions normalize;

  CombineOptions(int64_t dim, double clip_low, double clip_high, bool noon, const std::string& level,
                 const std::string& solver, const std::string& normalize, const std::string& nan, bool skip_inactive);
};

// The tensors of one call; absent ones are null.
struct CombineTensors {
  const TensorView* advantages;
  int n;        // how many views
  bool listed;  // one view per objective, or one view that holds all of them along `dim`
  const TensorView* mask;
  const TensorView* log_ratio;
  const TensorView* reward_weights;
  const TensorView* groups;  // group_ids or group_offsets
  const TensorView* out;
  bool in_place;
};

// Everything a kernel needs, passed by value. Tokens are a [rows, cols] grid: [B, T], or [1, B*T] where strides allow.
struct CombineParams {
  int n;  // objectives
  int64_t rows, cols;
  DType dtype, mask_dtype, log_ratio_dtype, reward_dtype;
  Device device;

  Plane mask, log_ratio, out;  // data null = absent
  const void* reward_weights;  // [n] on the device, or null: then reward_values
  int64_t reward_stride;
  bool weighted;  // reward weights given

  double log_low, log_high;  // bounds on log_ratio at which I(A) still is 1
  bool noon, propagate, skip_inactive, in_place;
  bool per_token;  // level token, and the token's weights and s* are outputs: "sequence" on rows of one token
  Level level;
  Solver solver;

  NormalizeOptions normalize;
  int64_t batch;           // rows of the first dimension, what groups are made of
  int64_t row_tokens;      // tokens in each of them
  int64_t groups;          // how many; for group_ids at most `batch`
  const void* group_data;  // group_ids or group_offsets, or null
  DType group_dtype;
  int64_t group_stride;

  // Outputs, float64 for float64 advantages and float32 otherwise: statistics [10, n], then weights [n] (or one row for
  // each solve), then value [1] (one for each solve).
  void* packed;
  void* workspace;  // CUDA only
  Access access;    // these too, down to gate_high: see cuda/combine.cu
  Meeting meeting;
  int64_t run_tokens;  // of a block, where its tokens are not those of pools
  int tile_tokens, tile_pools;
  int tile_slices;            // of the tokens of a tile, each of another warp
  bool plain;                 // an entry is its advantage, or 0 below 0
  bool gates_together;        // mask and log_ratio have a byte and a float32 for a token after the other
  bool out_together;          // out has its tokens after each other
  float gate_low, gate_high;  // the bounds on a float32 log_ratio

  // Filled by the launchers, in their own memory. Tokens are then counted in grouped order: row k is order[k].
  const int64_t* order;   // [batch], or null: groups follow each other as they stand
  const int64_t* starts;  // [groups + 1]: the rows of group g are [starts[g], starts[g + 1]) in that order
  const int64_t* ends;    // CUDA, groups by ids: starts[k] and ends[k] are the rows of the group of row k
  int64_t equal_rows;     // how many rows every group has, 0 if that differs
  void* sums;             // [batch, n] in the type of the arithmetic: scores to be read instead of advantages; or null
  int64_t* dead;          // CUDA: [n], how many of the pools give only 0; or null
  void* affine;           // Maps of [n, pools] in that type, or null: nothing to normalise
  bool measures;          // `affine` is filled on the way, group by group; on CUDA, tile by tile
  bool absent_zero;       // -0 marks samples that are not there

  Plane advantages[kMaxObjectives];
  double reward_values[kMaxObjectives];

  // Whether there is more to do than statistics, solve and combination.
  PAMA_HD bool normalizes() const { return normalize.by != Pool::kNone || normalize.combined != Pool::kNone; }

  // Entry k of group_ids or group_offsets; ids are told apart by their bits alone.
  PAMA_HD int64_t group_value(int64_t k) const { return integer_at(group_data, group_dtype, k * group_stride); }

  PAMA_HD int64_t tokens() const { return rows * cols; }
  PAMA_HD int64_t solves() const {
    if (level == Level::kGroup) return normalize.groups == Groups::kIds ? batch : groups;
    return level == Level::kSequence ? rows : per_token ? tokens() : 1;
  }
  PAMA_HD int64_t packed_size() const { return kStatistics * static_cast<int64_t>(n) + solves() * (n + 1); }

  PAMA_HD bool has_gram() const { return solver == Solver::kMinNorm && level != Level::kToken; }  // of one token: none
  PAMA_HD bool normalizes_groups() const { return affine && normalize.by == Pool::kGroup; }
  PAMA_HD int64_t group_tokens() const { return normalize.group_size * row_tokens; }  // groups by size
  PAMA_HD bool marks() const { return normalize.combined != Pool::kNone; }            // -0 left where there is no data
  PAMA_HD int64_t pools() const { return level == Level::kGroup ? groups : rows; }    // solved one by one
  PAMA_HD int64_t row_at(int64_t k) const { return order ? order[k] : k; }  // of the tensors, the k-th in grouped order

  PAMA_HD double reward_weight(int i) const {
    return reward_weights ? float_at(reward_weights, reward_dtype, i * reward_stride) : reward_values[i];
  }
  PAMA_HD double fixed_weight(int i) const { return weighted ? reward_weight(i) : 1.0 / n; }
  // The factor before the solve; the fixed solver uses reward_weights as the weights themselves.
  PAMA_HD double scale(int i) const { return weighted && solver != Solver::kFixed ? reward_weight(i) : 1.0; }
};

// Fills `params` (all but packed, workspace and host reward values). Returns null, or what does not fit.
const char* plan_combine(const CombineOptions& options, const CombineTensors& tensors, CombineParams& params);

// torch's thread pool: torch_parallel_for of the libtorch stable ABI.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain, void (*)(int64_t, int64_t, void*),
                            void* context);

// A batch of Gram matrices, read through strides (batch, row, column) from one of the floating types.
struct MinNormParams {
  const void* gramian;
  DType dtype;
  Device device;
  int64_t batch, strides[3];
  int n;
  void* weights;    // [batch, n], float64 for float64 and float32 otherwise
  void* workspace;  // CUDA only
};

// Fills `params` (all but weights and workspace) from [N, N] or [B, N, N]. Returns null, or what does not fit.
const char* plan_min_norm(const TensorView& gramian, MinNormParams& params);

void launch_min_norm_cpu(const MinNormParams& params, ParallelFor parallel_for);
void launch_combine_cpu(CombineParams& params, ParallelFor parallel_for);
const char* cpu_instructions();               // what launch_combine_cpu runs: "avx512", "avx2" or "generic"
bool use_cpu_instructions(const char* name);  // for tests: run another one; false if this machine cannot

int64_t combine_cuda_workspace(const CombineParams& params);  // bytes
void launch_combine_cuda(CombineParams& params, void* stream);
int64_t min_norm_cuda_workspace(const MinNormParams& params);  // bytes
void launch_min_norm_cuda(const MinNormParams& params, void* stream);
int cuda_toolkit();  // the version built with, 13000 for 13.0

}  // namespace pama
