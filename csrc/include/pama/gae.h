// The one parameter struct of `gae` and the functions that fill and run it.
#pragma once

#include <cstdint>

#include "pama/combine.h"

namespace pama {

// A plane for each objective, at equal distances: one output.
struct Planes {
  char* data;
  int64_t row, col, objective;  // strides in elements
};

// The tensors of one call. Each objective has its own view, [B, T] or, where there are offsets, [total]; absent ones
// are null.
struct GaeTensors {
  const TensorView* rewards;    // [n], also [B] or [S]: one score for a whole sequence
  const TensorView* values;     // [n]
  const TensorView* bootstrap;  // [n] of [B] or [S]
  int n;
  const TensorView* mask;
  const TensorView* gamma;  // [n]; null: params.gamma.values
  const TensorView* lam;
  const TensorView* kl_penalty;
  const TensorView* offsets;
  int dim;  // of the objectives in the outputs
};

// Everything a kernel needs. Tokens are a [rows, cols] grid: [B, T], or [1, B*T] where strides allow, or [1, total].
// They make up sequences, one after the other.
struct GaeParams {
  int n;  // objectives
  int64_t rows, cols;
  int64_t sequences, length;  // length: of all sequences, unless there are offsets
  const void* offsets;        // [sequences + 1] integers, or null
  DType offsets_dtype;
  int64_t offsets_stride;

  DType dtype;  // of the outputs
  DType rewards_dtype, values_dtype, mask_dtype, kl_dtype, bootstrap_dtype;
  Device device;
  bool outcome;       // rewards are one score for each sequence, `row` apart
  bool bootstrapped;  // there is a value after the last token of each sequence, `row` apart

  Plane mask, kl;  // data null = absent
  PerObjective gamma, lam;
  Planes advantages, returns;
  Plane rewards[kMaxObjectives], values[kMaxObjectives], bootstrap[kMaxObjectives];

  PAMA_HD int64_t tokens() const { return rows * cols; }

  // First token of a sequence; of sequence number `sequences`, how many tokens there are. Offsets on a GPU are not
  // looked at beforehand, so they are kept within the tokens.
  PAMA_HD int64_t start(int64_t sequence) const {
    if (!offsets) return sequence * length;
    const int64_t at = integer_at(offsets, offsets_dtype, sequence * offsets_stride);
    return at < 0 ? 0 : at > cols ? cols : at;
  }

  // What the last valid token of a sequence has in place of gamma v(t+1) + gamma lam A(t+1).
  PAMA_HD double last_term(int i, int64_t sequence) const {
    double term = outcome ? float_at(rewards[i].data, rewards_dtype, sequence * rewards[i].row) : 0.0;
    if (bootstrapped) term += gamma[i] * float_at(bootstrap[i].data, bootstrap_dtype, sequence * bootstrap[i].row);
    return term;
  }
};

// Fills `params`, all but the memory of the outputs and host values of gamma and lam. Returns null, or what does not
// fit.
const char* plan_gae(const GaeTensors& tensors, GaeParams& params);

void launch_gae_cpu(const GaeParams& params, ParallelFor parallel_for);

void launch_gae_cuda(const GaeParams& params, void* stream);

}  // namespace pama
