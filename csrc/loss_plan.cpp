// From tensors to PolicyParams and ValueParams: everything that can be wrong with shapes, dtypes and devices is found
// here.
#include <cmath>
#include <cstring>

#include "pama/loss.h"
#include "plan.h"

namespace pama {
namespace {

// A floating [B, T] plane where the others are; null if it is one.
const char* plan_plane(const TensorView& t, const int64_t* sizes, const LossParams& p, Plane& to, DType& dtype,
                       const char* problem) {
  if (!same_shape(t, sizes, 2) || !is_float(t.dtype) || !(t.device == p.device)) return problem;
  to = plane(t);
  dtype = t.dtype;
  return nullptr;
}

// Mask, aggregate and normalizer.
const char* plan_common(const TensorView* mask, const TensorView* normalizer, const int64_t* sizes, LossParams& p) {
  p.mask = Plane{};
  if (mask) {
    if (!same_shape(*mask, sizes, 2)) return "mask: expected [B, T]";
    if (mask->dtype == DType::kOther) return "mask: expected a bool, integer or floating tensor";
    if (!(mask->device == p.device)) return "mask: expected the device of the other tensors";
    p.mask = plane(*mask);
    p.mask_dtype = mask->dtype;
  }
  p.normalizer = nullptr;
  p.normalized = false;
  if (normalizer) {
    int64_t elements = 1;
    for (int d = 0; d < normalizer->ndim; ++d) elements *= normalizer->sizes[d];
    if (elements != 1) return "normalizer: expected a tensor of one element";
    if (size_of(normalizer->dtype) < 4 && !is_float(normalizer->dtype))
      return "normalizer: expected a floating tensor, or an integer one of 32 or 64 bits";
    if (!(normalizer->device == p.device)) return "normalizer: expected the device of the other tensors";
    p.normalizer = normalizer->data;
    p.normalizer_dtype = normalizer->dtype;
  }
  p.workspace = nullptr;
  return nullptr;
}

bool joins(const Plane& q, int64_t cols) { return !q.data || q.row == cols * q.col; }

double log_bound(double ratio) {  // what log_ratio, held within its limit, is compared with
  const double bound = std::log(ratio);
  return bound >= kLogRatioLimit ? HUGE_VAL : bound < -kLogRatioLimit ? -HUGE_VAL : bound;
}

}  // namespace

Aggregate aggregate_named(const char* name) {
  constexpr const char* kNames[] = {"token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"};
  int k = 0;
  while (k < 4 && std::strcmp(name, kNames[k])) ++k;
  return static_cast<Aggregate>(k);
}

const char* plan_policy_loss(const PolicyOptions& options, const PolicyTensors& tensors, PolicyParams& p) {
  const TensorView& first = *tensors.log_probs;
  if (first.ndim != 2) return "log_probs: expected [B, T]";
  if (!is_float(first.dtype)) return "log_probs: expected float32, float64, float16 or bfloat16";
  if (first.device.type == DeviceType::kOther) return "log_probs: expected a CPU or CUDA tensor";
  if (options.aggregate == Aggregate::kUnknown) return "aggregate: unknown";
  const int64_t* sizes = first.sizes;
  p.device = first.device;
  p.rows = sizes[0];
  p.cols = sizes[1];
  p.aggregate = options.aggregate;
  p.log_probs = plane(first);
  p.log_prob_dtype = first.dtype;
  if (const char* problem = plan_plane(*tensors.old_log_probs, sizes, p, p.old_log_probs, p.old_dtype,
                                       "old_log_probs: expected a floating tensor like log_probs"))
    return problem;
  p.ref_log_probs = Plane{};
  p.ref_dtype = p.log_prob_dtype;
  if (tensors.ref_log_probs)
    if (const char* problem = plan_plane(*tensors.ref_log_probs, sizes, p, p.ref_log_probs, p.ref_dtype,
                                         "ref_log_probs: expected a floating tensor like log_probs"))
      return problem;
  if (options.kl_coef != 0.0 && !tensors.ref_log_probs) return "ref_log_probs: kl_coef needs them";
  if (const char* problem = plan_common(tensors.mask, tensors.normalizer, sizes, p)) return problem;

  p.n = tensors.n;
  p.per_objective = tensors.per_objective;
  p.advantage_dtype = tensors.advantages[0].dtype;
  for (int i = 0; i < p.n; ++i) {
    const TensorView& t = tensors.advantages[i];
    const bool by_row = same_shape(t, sizes, 1);
    if (!by_row && !same_shape(t, sizes, 2)) return "advantages: expected [B, T] or [B]";
    if (!is_float(t.dtype)) return "advantages: expected float32, float64, float16 or bfloat16";
    if (t.dtype != p.advantage_dtype) return "advantages: expected tensors of one dtype";
    if (t.ndim != tensors.advantages[0].ndim) return "advantages: expected tensors of one shape";
    if (!(t.device == p.device)) return "advantages: expected the device of log_probs";
    p.advantages[i] = by_row ? Plane{static_cast<char*>(t.data), t.strides[0], 0} : plane(t);
  }
  if (const char* problem = plan_numbers(tensors.weights, p.n, p.device, p.weights,
                                         "weights: expected floating [N], on the device of log_probs"))
    return problem;
  const DType wide = DType::kFloat64;
  p.wide = p.log_prob_dtype == wide || p.old_dtype == wide || p.advantage_dtype == wide || p.ref_dtype == wide;

  p.low = 1.0 - options.clip_low;
  p.high = 1.0 + options.clip_high;
  p.dual = options.dual_clip;
  p.max_weight = options.max_weight;
  p.truncated = options.max_weight != HUGE_VAL;
  p.kl_coef = options.kl_coef;
  p.log_low = options.clip_low < 1.0 ? std::log1p(-options.clip_low) : -HUGE_VAL;
  if (p.log_low <= -kLogRatioLimit) p.log_low = -HUGE_VAL;  // the limit would not let anything beyond
  p.log_high = std::log1p(options.clip_high);
  if (p.log_high >= kLogRatioLimit) p.log_high = HUGE_VAL;
  p.log_dual = log_bound(p.dual);
  p.log_max = log_bound(p.max_weight);
  p.gradient = nullptr;

  // One long row where every plane's rows follow each other and a row means nothing.
  bool flat = !p.by_rows() && p.rows != 1;
  for (const Plane* q : {&p.log_probs, &p.old_log_probs, &p.ref_log_probs, &p.mask}) flat = flat && joins(*q, p.cols);
  for (int i = 0; flat && i < p.n; ++i) flat = joins(p.advantages[i], p.cols);
  if (flat) {
    p.cols *= p.rows;
    p.rows = 1;
  }
  return nullptr;
}

const char* plan_value_loss(Aggregate aggregate, double clip, const ValueTensors& tensors, ValueParams& p) {
  const TensorView& first = tensors.values[0];
  if (first.ndim != 2) return "values: expected [B, T] for each objective";
  if (!is_float(first.dtype)) return "values: expected float32, float64, float16 or bfloat16";
  if (first.device.type == DeviceType::kOther) return "values: expected a CPU or CUDA tensor";
  if (aggregate == Aggregate::kUnknown) return "aggregate: unknown";
  const int64_t* sizes = first.sizes;
  p.n = tensors.n;
  p.device = first.device;
  p.rows = sizes[0];
  p.cols = sizes[1];
  p.aggregate = aggregate;
  p.clip = clip;
  p.clipped = tensors.old_values != nullptr;
  if (const char* problem = plan_common(tensors.mask, tensors.normalizer, sizes, p)) return problem;
  const auto each = [&](const TensorView* views, Plane* planes, DType& dtype, const char* problem) -> const char* {
    for (int i = 0; i < p.n; ++i) {
      if (const char* wrong = plan_plane(views[i], sizes, p, planes[i], dtype, problem)) return wrong;
      if (views[i].dtype != views[0].dtype) return problem;
    }
    return nullptr;
  };
  if (const char* problem = each(tensors.values, p.values, p.value_dtype, "values: expected tensors of one kind"))
    return problem;
  if (const char* problem = each(tensors.returns, p.returns, p.return_dtype, "returns: expected tensors like values"))
    return problem;
  p.old_dtype = p.value_dtype;
  if (p.clipped)
    if (const char* problem =
            each(tensors.old_values, p.old_values, p.old_dtype, "old_values: expected tensors like values"))
      return problem;
  const DType wide = DType::kFloat64;
  p.wide = p.value_dtype == wide || p.old_dtype == wide || p.return_dtype == wide;
  p.gradient = nullptr;
  p.gradient_col = tensors.interleaved ? p.n : 1;
  p.gradient_objective = tensors.interleaved ? 1 : p.rows * p.cols;

  bool flat = !p.by_rows() && p.rows != 1 && joins(p.mask, p.cols);
  for (int i = 0; flat && i < p.n; ++i)
    flat = joins(p.values[i], p.cols) && joins(p.returns[i], p.cols) && (!p.clipped || joins(p.old_values[i], p.cols));
  if (flat) {
    p.cols *= p.rows;
    p.rows = 1;
  }
  return nullptr;
}

const char* plan_scale(const TensorView& gradient, const TensorView& incoming, const TensorView& scale, int row_dim,
                       ScaleParams& p) {
  if (row_dim < 0 || row_dim >= gradient.ndim || gradient.ndim > 3) return "gradient: expected [B, T] or [B, T, N]";
  if (!is_float(gradient.dtype) || gradient.device.type == DeviceType::kOther) return "gradient: expected floats";
  int64_t stride = 1;
  for (int d = gradient.ndim; d-- > 0; stride *= gradient.sizes[d])
    if (gradient.sizes[d] != 1 && gradient.strides[d] != stride) return "gradient: expected a contiguous tensor";
  if (scale.ndim != 1 || incoming.ndim != 0) return "scale: expected one dimension";
  if (scale.dtype != incoming.dtype || !(scale.device == gradient.device) || !(incoming.device == gradient.device))
    return "scale: expected the dtype of the loss and the device of the gradient";
  p.wide = scale.dtype == DType::kFloat64;
  if (!p.wide && scale.dtype != DType::kFloat32) return "scale: expected float32 or float64";
  p.repeats = p.cols = 1;
  p.rows = gradient.sizes[row_dim];
  for (int d = 0; d < row_dim; ++d) p.repeats *= gradient.sizes[d];
  for (int d = row_dim + 1; d < gradient.ndim; ++d) p.cols *= gradient.sizes[d];
  p.row_scales = scale.sizes[0] != 1;
  if (p.row_scales && scale.sizes[0] != 1 + p.rows) return "scale: expected [1] or [1 + B]";
  if (scale.sizes[0] > 1 && scale.strides[0] != 1) return "scale: expected a contiguous tensor";
  p.dtype = gradient.dtype;
  p.device = gradient.device;
  p.gradient = p.out = gradient.data;
  p.incoming = incoming.data;
  p.scale = scale.data;
  return nullptr;
}

}  // namespace pama
