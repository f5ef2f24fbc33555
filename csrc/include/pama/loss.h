// The parameter structs of `policy_loss` and `value_loss` and the functions that fill and run them.
//
// A loss is a sum over the valid tokens, divided by a number that is known at the end alone. So what is kept for
// backward is the gradient of the sum, written in the same pass, and `scale`, by which it is multiplied then.
#pragma once

#include <cstdint>

#include "pama/combine.h"

namespace pama {

// How a loss is made of those of its tokens; "seq" is a row.
enum class Aggregate : uint8_t { kTokenMean, kTokenSum, kSeqMeanTokenSum, kSeqMeanTokenMean, kUnknown };

Aggregate aggregate_named(const char* name);

// What both losses have. Tokens are a [rows, cols] grid: [B, T], or [1, B*T] where rows do not matter.
struct LossParams {
  int64_t rows, cols;
  bool wide;  // arithmetic and results are float64, not float32
  DType mask_dtype, normalizer_dtype;
  Device device;
  Aggregate aggregate;
  bool normalized;  // a number to divide by is given: here, or
  double normalizer_value;
  const void* normalizer;  // on the device
  Plane mask;              // data null = absent

  // Outputs, float64 or float32.
  void *loss, *metrics;
  void* scale;      // [1], or [1 + rows] at seq-mean-token-mean: of all, then of each row
  void* workspace;  // CUDA only

  PAMA_HD int64_t tokens() const { return rows * cols; }
  PAMA_HD bool by_rows() const { return aggregate >= Aggregate::kSeqMeanTokenSum; }
  PAMA_HD bool row_scales() const { return aggregate == Aggregate::kSeqMeanTokenMean; }
  PAMA_HD int64_t scales() const { return row_scales() ? 1 + rows : 1; }

  // What the sum of a row with `count` valid tokens counts for.
  PAMA_HD double row_scale(int64_t count) const {
    return row_scales() && count > 0 ? 1.0 / static_cast<double>(count) : 1.0;
  }

  // The factor of the whole sum; 0 if there is nothing to divide by.
  PAMA_HD double overall_scale(int64_t valid, int64_t sequences) const {
    double divisor = aggregate == Aggregate::kTokenMean ? static_cast<double>(valid)
                     : by_rows()                        ? static_cast<double>(sequences)
                                                        : 1.0;
    if (normalized) divisor = normalizer_value;
    if (normalizer)
      divisor = is_float(normalizer_dtype) ? float_at(normalizer, normalizer_dtype, 0)
                                           : static_cast<double>(integer_at(normalizer, normalizer_dtype, 0));
    return divisor != 0.0 ? 1.0 / divisor : 0.0;
  }
};

// ---- policy_loss ----

constexpr int kPolicyScalars = 7;  // of PolicyMetrics, before those of objectives

struct PolicyTensors {
  const TensorView *log_probs, *old_log_probs;
  const TensorView* advantages;  // [n], each [B, T] or [B]
  int n;
  bool per_objective;         // metrics for each of them are wanted
  const TensorView* weights;  // [n]; null: params.weights.values
  const TensorView *mask, *ref_log_probs, *normalizer;
};

struct PolicyOptions {
  double clip_low = 0.2, clip_high = 0.2;
  double dual_clip = HUGE_VAL;   // absent
  double max_weight = HUGE_VAL;  // absent
  double kl_coef = 0.0;
  Aggregate aggregate = Aggregate::kTokenMean;
};

struct PolicyParams : LossParams {
  int n;  // advantages; their weighted sum is the advantage
  bool per_objective, truncated;
  DType log_prob_dtype, old_dtype, advantage_dtype, ref_dtype;
  double log_low, log_high, log_dual, log_max;  // of log_ratio: where the bounds of the ratio are reached
  double low, high, dual, max_weight, kl_coef;
  Plane log_probs, old_log_probs, ref_log_probs;
  char* gradient;  // of the sum over tokens: contiguous, of the dtype of log_probs; null if not wanted
  PerObjective weights;
  Plane advantages[kMaxObjectives];

  int64_t metrics_size() const { return kPolicyScalars + (per_objective ? 2 * n : 0); }
};

// Sums over valid tokens.
struct PolicyTotals {
  double loss, ratio, log_ratio, ratio_max, kl;  // loss: of rows by their scale
  int64_t tokens, sequences, high, low, dual;
};

// Fills `params`, all but memory of the results and host values of weights. Returns null, or what does not fit.
const char* plan_policy_loss(const PolicyOptions& options, const PolicyTensors& tensors, PolicyParams& params);

// Loss, scale and metrics; the two arrays are sums for each objective, by whatever stride.
template <class C>
PAMA_HD void finish_policy_loss(const PolicyParams& p, const PolicyTotals& t, const double* clipped,
                                const double* gradient) {
  const double overall = p.overall_scale(t.tokens, t.sequences);
  const double each = t.tokens > 0 ? 1.0 / static_cast<double>(t.tokens) : 0.0;
  static_cast<C*>(p.loss)[0] = static_cast<C>(t.loss * overall);
  static_cast<C*>(p.scale)[0] = static_cast<C>(overall);
  C* to = static_cast<C*>(p.metrics);
  to[0] = static_cast<C>(static_cast<double>(t.high + t.low) * each);
  to[1] = static_cast<C>(static_cast<double>(t.low) * each);
  to[2] = static_cast<C>(static_cast<double>(t.dual) * each);
  to[3] = static_cast<C>(-t.log_ratio * each);
  to[4] = static_cast<C>(t.ratio * each);
  to[5] = static_cast<C>(t.ratio_max);
  to[6] = static_cast<C>(t.kl * each);
  if (!p.per_objective) return;
  double total = 0.0;
  for (int i = 0; i < p.n; ++i) total += gradient[i];
  for (int i = 0; i < p.n; ++i) {
    to[kPolicyScalars + i] = static_cast<C>(clipped[i] * each);
    to[kPolicyScalars + p.n + i] = static_cast<C>(total != 0.0 ? gradient[i] / total : 0.0);
  }
}

// ---- value_loss ----

struct ValueTensors {
  const TensorView *values, *old_values, *returns;  // [n], each [B, T]; old_values null = absent
  int n;
  bool interleaved;  // the gradient has its objectives last, else first
  const TensorView *mask, *normalizer;
};

struct ValueParams : LossParams {
  int n;
  bool clipped;  // old_values are there
  double clip;
  DType value_dtype, old_dtype, return_dtype;
  char* gradient;                            // as that of policy_loss, of the dtype of values
  int64_t gradient_col, gradient_objective;  // its strides, in elements
  Plane values[kMaxObjectives], old_values[kMaxObjectives], returns[kMaxObjectives];

  int64_t metrics_size() const { return 3 * n; }
};

const char* plan_value_loss(Aggregate aggregate, double clip, const ValueTensors& tensors, ValueParams& params);

// Loss, scale and metrics from three sums for each objective.
template <class C>
PAMA_HD void finish_value_loss(const ValueParams& p, int64_t tokens, int64_t sequences, const double* losses,
                               const double* clipped, const double* values) {
  const double overall = p.overall_scale(tokens, sequences);
  const double each = tokens > 0 ? 1.0 / static_cast<double>(tokens) : 0.0;
  double loss = 0.0;
  C* to = static_cast<C*>(p.metrics);
  for (int i = 0; i < p.n; ++i) {
    loss += losses[i] * overall;
    to[i] = static_cast<C>(losses[i] * overall);
    to[p.n + i] = static_cast<C>(clipped[i] * each);
    to[2 * p.n + i] = static_cast<C>(values[i] * each);
  }
  static_cast<C*>(p.loss)[0] = static_cast<C>(loss);
  static_cast<C*>(p.scale)[0] = static_cast<C>(overall);
}

// ---- backward: the kept gradient times the incoming one ----

// `gradient` is [repeats, rows, cols]; its rows have scales of their own if scale is [1 + rows].
struct ScaleParams {
  int64_t repeats, rows, cols;
  DType dtype;
  bool wide, row_scales;
  Device device;
  const void* gradient;
  const void* incoming;  // [], of the dtype of the loss
  const void* scale;
  void* out;  // may be gradient

  PAMA_HD int64_t elements() const { return repeats * rows * cols; }
  PAMA_HD double number(const void* data, int64_t at) const {
    return wide ? static_cast<const double*>(data)[at] : static_cast<double>(static_cast<const float*>(data)[at]);
  }
  PAMA_HD double factor() const { return number(incoming, 0) * number(scale, 0); }
  PAMA_HD double row_factor(int64_t row) const { return row_scales ? number(scale, 1 + row % rows) : 1.0; }
};

const char* plan_scale(const TensorView& gradient, const TensorView& incoming, const TensorView& scale, int row_dim,
                       ScaleParams& params);

void launch_policy_loss_cpu(const PolicyParams& params, ParallelFor parallel_for);
void launch_value_loss_cpu(const ValueParams& params, ParallelFor parallel_for);
void launch_scale_cpu(const ScaleParams& params, ParallelFor parallel_for);

int64_t policy_loss_cuda_workspace(const PolicyParams& params);  // bytes
int64_t value_loss_cuda_workspace(const ValueParams& params);
void launch_policy_loss_cuda(const PolicyParams& params, void* stream);
void launch_value_loss_cuda(const ValueParams& params, void* stream);
void launch_scale_cuda(const ScaleParams& params, void* stream);

}  // namespace pama
