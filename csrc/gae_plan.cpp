// From tensors to GaeParams: everything that can be wrong with shapes, dtypes and devices is found here.
#include "pama/gae.h"
#include "plan.h"

namespace pama {
namespace {

// The dtype that holds both, as torch promotes: two different halves make a float32.
DType promoted(DType a, DType b) {
  if (a == b) return a;
  return a == DType::kFloat64 || b == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
}

// How many sequences, and whether the offsets fit. Those on the CPU are looked at.
const char* plan_offsets(const TensorView* t, GaeParams& p) {
  p.offsets = nullptr;
  if (!t) return nullptr;
  if (t->ndim != 1 || t->sizes[0] < 1 || (t->dtype != DType::kInt32 && t->dtype != DType::kInt64))
    return "offsets: expected int32 or int64 [S + 1]";
  if (!(t->device == p.device)) return "offsets: expected the device of values";
  p.sequences = t->sizes[0] - 1;
  p.offsets = t->data;
  p.offsets_dtype = t->dtype;
  p.offsets_stride = t->strides[0];
  if (p.device.type != DeviceType::kCPU) return nullptr;
  int64_t last = 0;
  for (int64_t s = 0; s <= p.sequences; ++s) {
    const int64_t offset = integer_at(t->data, t->dtype, s * p.offsets_stride);
    if (offset < last || (s == 0 && offset != 0)) return "offsets: must start at 0 and ascend";
    last = offset;
  }
  return last == p.tokens() ? nullptr : "offsets: must end at the number of tokens";
}

}  // namespace

const char* plan_gae(const GaeTensors& tensors, GaeParams& p) {
  const TensorView &values = tensors.values[0], &rewards = tensors.rewards[0];
  const int ndim = tensors.offsets ? 1 : 2;
  if (!is_float(values.dtype)) return "values: expected float32, float64, float16 or bfloat16";
  if (values.device.type == DeviceType::kOther) return "values: expected a CPU or CUDA tensor";
  if (values.ndim != ndim) return "values: expected [B, T] for each objective, with offsets [total]";
  p.n = tensors.n;
  p.device = values.device;
  p.values_dtype = values.dtype;
  p.rows = ndim == 1 ? 1 : values.sizes[0];
  p.cols = values.sizes[ndim - 1];
  p.sequences = p.rows;
  p.length = p.cols;
  if (const char* problem = plan_offsets(tensors.offsets, p)) return problem;

  if (!is_float(rewards.dtype)) return "rewards: expected float32, float64, float16 or bfloat16";
  p.rewards_dtype = rewards.dtype;
  p.dtype = promoted(p.rewards_dtype, p.values_dtype);
  p.outcome = !same_shape(rewards, values.sizes, ndim);
  p.bootstrapped = tensors.bootstrap != nullptr;
  for (int i = 0; i < p.n; ++i) {
    const TensorView &r = tensors.rewards[i], &v = tensors.values[i];
    if (!same_shape(v, values.sizes, ndim)) return "values: expected tensors of one shape";
    if (v.dtype != p.values_dtype || !(v.device == p.device)) return "values: expected tensors of one dtype and device";
    if (p.outcome ? !same_shape(r, &p.sequences, 1) : !same_shape(r, values.sizes, ndim))
      return "rewards: expected the shape of values, or one score for each sequence";
    if (r.dtype != p.rewards_dtype || !(r.device == p.device)) return "rewards: expected one dtype, and values' device";
    p.values[i] = plane(v);
    p.rewards[i] = p.outcome ? Plane{static_cast<char*>(r.data), r.strides[0], 0} : plane(r);
    if (!p.bootstrapped) continue;
    const TensorView& b = tensors.bootstrap[i];
    if (!same_shape(b, &p.sequences, 1)) return "bootstrap: expected one value for each sequence";
    if (!is_float(b.dtype) || b.dtype != tensors.bootstrap[0].dtype) return "bootstrap: expected one floating dtype";
    if (!(b.device == p.device)) return "bootstrap: expected the device of values";
    p.bootstrap[i] = {static_cast<char*>(b.data), b.strides[0], 0};
    p.bootstrap_dtype = b.dtype;
  }

  p.mask = p.kl = Plane{};
  if (const TensorView* t = tensors.mask) {
    if (!same_shape(*t, values.sizes, ndim)) return "mask: expected the shape of one objective";
    if (t->dtype == DType::kOther) return "mask: expected a bool, integer or floating tensor";
    if (!(t->device == p.device)) return "mask: expected the device of values";
    p.mask = plane(*t);
    p.mask_dtype = t->dtype;
  }
  if (const TensorView* t = tensors.kl_penalty) {
    if (!same_shape(*t, values.sizes, ndim)) return "kl_penalty: expected the shape of one objective";
    if (!is_float(t->dtype)) return "kl_penalty: expected a floating tensor";
    if (!(t->device == p.device)) return "kl_penalty: expected the device of values";
    p.kl = plane(*t);
    p.kl_dtype = t->dtype;
  }
  if (const char* problem =
          plan_numbers(tensors.gamma, p.n, p.device, p.gamma, "gamma: expected floating [N], where values is"))
    return problem;
  if (const char* problem =
          plan_numbers(tensors.lam, p.n, p.device, p.lam, "lam: expected floating [N], where values is"))
    return problem;

  // The outputs are contiguous, with the objectives at `dim`.
  const int64_t n = p.n;
  if (tensors.dim < 0 || tensors.dim > ndim) return "dim: out of range";
  if (tensors.dim == 0) {
    p.advantages = {nullptr, p.cols, 1, p.tokens()};
  } else if (tensors.dim == ndim) {
    p.advantages = {nullptr, p.cols * n, n, 1};
  } else {
    p.advantages = {nullptr, p.cols * n, 1, p.cols};
  }
  p.returns = p.advantages;

  // One long row where every plane's rows follow each other.
  auto joins = [&](const auto& q) { return q.row == p.cols * q.col; };
  bool flat = joins(p.advantages) && (!p.mask.data || joins(p.mask)) && (!p.kl.data || joins(p.kl));
  for (int i = 0; flat && i < p.n; ++i) flat = joins(p.values[i]) && (p.outcome || joins(p.rewards[i]));
  if (flat && p.rows != 1) {
    p.cols *= p.rows;
    p.rows = 1;
  }
  return nullptr;
}

}  // namespace pama
