// From tensors to CombineParams: everything that can be wrong with shapes, dtypes and devices is found here.
#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

#include "pama/combine.h"
#include "plan.h"

namespace pama {
namespace {

struct Axis {
  int64_t size, stride;
};

// Whether no two elements can share memory: sorted, each stride steps over all that the smaller ones reach.
template <size_t kAxes>
bool distinct(std::array<Axis, kAxes> axes) {
  std::sort(axes.begin(), axes.end(), [](const Axis& a, const Axis& b) { return a.stride < b.stride; });
  if (std::any_of(axes.begin(), axes.end(), [](const Axis& a) { return a.size == 0; })) return true;
  int64_t reach = 0;
  for (const Axis& axis : axes) {
    if (axis.size > 1 && axis.stride <= reach) return false;
    reach += (axis.size - 1) * axis.stride;
  }
  return true;
}

bool distinct(const Plane& p, int64_t rows, int64_t cols) {
  return distinct(std::array<Axis, 2>{{{rows, p.row}, {cols, p.col}}});
}

// A run of memory. Like torch, only those of dense tensors are compared: whether two strided ones meet is not decidable
// at no cost.
struct Extent {
  const char* data = nullptr;  // null: not dense, or absent
  int64_t bytes = 0;

  bool meets(const Extent& o) const { return data && o.data && data < o.data + o.bytes && o.data < data + bytes; }
};

// In whatever order the dimensions lie.
Extent extent(const TensorView* t) {
  if (!t) return {};
  int64_t elements = 1, size = 1;
  for (int d = 0; d < t->ndim; ++d) elements *= t->sizes[d];
  for (int round = 0; round < t->ndim && size != elements; ++round)
    for (int d = t->ndim - 1; d >= 0; --d)
      if (t->sizes[d] != 1 && t->strides[d] == size) size *= t->sizes[d];
  if (size != elements) return {};
  return {static_cast<const char*>(t->data), size * size_of(t->dtype)};
}

// What the written tensor (out, or advantages in place) may not share memory with; null if all is well.
const char* alias(const Extent& written, const CombineTensors& t) {
  if (written.meets(extent(t.mask)))
    return t.in_place ? "advantages: shares memory with mask" : "out: shares memory with mask";
  if (written.meets(extent(t.log_ratio)))
    return t.in_place ? "advantages: shares memory with log_ratio" : "out: shares memory with log_ratio";
  if (written.meets(extent(t.reward_weights)))
    return t.in_place ? "advantages: shares memory with reward_weights" : "out: shares memory with reward_weights";
  if (written.meets(extent(t.groups)))
    return t.in_place ? "advantages: shares memory with normalize" : "out: shares memory with normalize";
  return nullptr;
}

// How many groups, and whether what describes them fits. On the CPU offsets are looked at as well.
const char* plan_groups(const TensorView* t, CombineParams& p) {
  NormalizeOptions& how = p.normalize;
  p.groups = 1;
  p.group_data = nullptr;
  if (p.row_tokens == 1) how.row_sums = false;  // a row's sum is its one token
  if (how.groups == Groups::kSize) {
    if (p.batch % how.group_size) return "normalize: group_size does not divide the number of rows";
    p.groups = p.batch / how.group_size;
  }
  if (how.groups != Groups::kIds && how.groups != Groups::kOffsets) return nullptr;
  if (!t) return "normalize: group_ids or group_offsets are missing";
  if (t->ndim != 1) return "normalize: expected group_ids or group_offsets of one dimension";
  if (!(t->device == p.device)) return "normalize: expected groups on the device of advantages";
  p.group_data = t->data;
  p.group_dtype = t->dtype;
  p.group_stride = t->strides[0];
  if (how.groups == Groups::kIds) {
    p.groups = p.batch;
    return t->sizes[0] == p.batch ? nullptr : "normalize: expected one of group_ids per row";
  }
  p.groups = t->sizes[0] - 1;
  if (p.groups < 0) return "normalize: expected group_offsets [G + 1]";
  if (p.device.type != DeviceType::kCPU) return nullptr;
  int64_t last = 0;
  for (int64_t g = 0; g <= p.groups; ++g) {
    const int64_t offset = p.group_value(g);
    if (offset < last || (g == 0 && offset != 0)) return "normalize: group_offsets must start at 0 and ascend";
    last = offset;
  }
  return last == p.batch ? nullptr : "normalize: group_offsets must end at the number of rows";
}

}  // namespace

CombineOptions::CombineOptions(int64_t dim_, double clip_low, double clip_high, bool noon_, const std::string& level_,
                               const std::string& solver_, const std::string& normalize_, const std::string& nan,
                               bool skip_inactive_)
    : dim(dim_),
      log_low(clip_low < 1 ? std::log1p(-clip_low) : -HUGE_VAL),
      log_high(std::log1p(clip_high)),
      noon(noon_),
      propagate(nan == "propagate"),
      skip_inactive(skip_inactive_),
      normalize(normalize_) {
  if (log_low <= -kLogRatioLimit) log_low = -HUGE_VAL;  // the clamp would not let anything beyond
  if (log_high >= kLogRatioLimit) log_high = HUGE_VAL;
  if (level_ == "batch")
    level = Level::kBatch;
  else if (level_ == "sequence")
    level = Level::kSequence;
  else if (level_ == "group")
    level = Level::kGroup;
  else if (level_ == "token")
    level = Level::kToken;
  else
    throw std::invalid_argument("level: expected 'batch', 'sequence', 'group' or 'token', got '" + level_ + "'");
  if (solver_ == "closed_form")
    solver = Solver::kClosedForm;
  else if (solver_ == "min_norm")
    solver = Solver::kMinNorm;
  else if (solver_ == "fixed")
    solver = Solver::kFixed;
  else
    throw std::invalid_argument("solver: expected 'closed_form', 'min_norm' or 'fixed', got '" + solver_ + "'");
  if (level == Level::kGroup && normalize.groups == Groups::kNone)
    throw std::invalid_argument("level: \"group\" needs a Normalize that describes groups");
}

const char* plan_min_norm(const TensorView& t, MinNormParams& p) {
  if (!is_float(t.dtype)) return "gramian: expected float32, float64, float16 or bfloat16";
  if (t.device.type == DeviceType::kOther) return "gramian: expected a CPU or CUDA tensor";
  if (t.ndim < 2 || t.ndim > 3) return "gramian: expected [N, N] or [B, N, N]";
  const int64_t n = t.sizes[t.ndim - 1];
  if (t.sizes[t.ndim - 2] != n || n < 1 || n > kMaxObjectives) return "gramian: expected N x N, N from 1 to 64";
  p.gramian = t.data;
  p.dtype = t.dtype;
  p.device = t.device;
  p.n = static_cast<int>(n);
  p.batch = t.ndim == 3 ? t.sizes[0] : 1;
  p.strides[0] = t.ndim == 3 ? t.strides[0] : 0;
  p.strides[1] = t.strides[t.ndim - 2];
  p.strides[2] = t.strides[t.ndim - 1];
  p.workspace = nullptr;
  return nullptr;
}

const char* plan_combine(const CombineOptions& options, const CombineTensors& tensors, CombineParams& p) {
  const TensorView& first = tensors.advantages[0];
  p.dtype = first.dtype;
  p.device = first.device;
  if (!is_float(p.dtype)) return "advantages: expected float32, float64, float16 or bfloat16";
  if (p.device.type == DeviceType::kOther) return "advantages: expected a CPU or CUDA tensor";

  // Shape of one objective, and a plane for each.
  int64_t sizes[2];
  int ndim = 0;
  if (tensors.listed) {
    if (first.ndim < 1 || first.ndim > 2) return "advantages: expected tensors [B] or [B, T]";
    p.n = tensors.n;
    for (; ndim < first.ndim; ++ndim) sizes[ndim] = first.sizes[ndim];
    for (int i = 0; i < p.n; ++i) {
      const TensorView& t = tensors.advantages[i];
      if (!same_shape(t, sizes, ndim)) return "advantages: expected tensors of one shape";
      if (t.dtype != p.dtype || !(t.device == p.device)) return "advantages: expected tensors of one dtype and device";
      p.advantages[i] = plane(t);
    }
  } else {
    if (first.ndim < 2 || first.ndim > 3) return "advantages: expected a tensor [B, N] or [B, T, N]";
    const int64_t dim = options.dim < 0 ? options.dim + first.ndim : options.dim;
    if (dim < 0 || dim >= first.ndim) return "dim: out of range";
    if (first.sizes[dim] < 1 || first.sizes[dim] > kMaxObjectives) return "advantages: expected 1 to 64 objectives";
    p.n = static_cast<int>(first.sizes[dim]);
    int64_t strides[2];
    for (int d = 0; d < first.ndim; ++d) {
      if (d == dim) continue;
      sizes[ndim] = first.sizes[d];
      strides[ndim++] = first.strides[d];
    }
    const int64_t step = first.strides[dim] * size_of(p.dtype);
    for (int i = 0; i < p.n; ++i) {
      char* data = static_cast<char*>(first.data) + i * step;
      p.advantages[i] = ndim == 1 ? Plane{data, 0, strides[0]} : Plane{data, strides[0], strides[1]};
    }
  }
  p.rows = ndim == 1 ? 1 : sizes[0];
  p.cols = sizes[ndim - 1];

  p.mask = p.log_ratio = p.out = Plane{};
  if (const TensorView* t = tensors.mask) {
    if (!same_shape(*t, sizes, ndim)) return "mask: expected the shape of one objective";
    if (t->dtype == DType::kOther) return "mask: expected a bool, integer or floating tensor";
    if (!(t->device == p.device)) return "mask: expected the device of advantages";
    p.mask = plane(*t);
    p.mask_dtype = t->dtype;
  }
  if (const TensorView* t = tensors.log_ratio) {
    if (!same_shape(*t, sizes, ndim)) return "log_ratio: expected the shape of one objective";
    if (!is_float(t->dtype)) return "log_ratio: expected a floating tensor";
    if (!(t->device == p.device)) return "log_ratio: expected the device of advantages";
    p.log_ratio = plane(*t);
    p.log_ratio_dtype = t->dtype;
  }
  p.reward_weights = nullptr;
  if (const TensorView* t = tensors.reward_weights) {
    if (t->ndim != 1 || t->sizes[0] != p.n) return "reward_weights: expected one per objective";
    if (!is_float(t->dtype)) return "reward_weights: expected a floating tensor";
    if (!(t->device == p.device)) return "reward_weights: expected the device of advantages";
    p.reward_weights = t->data;
    p.reward_stride = t->strides[0];
    p.reward_dtype = t->dtype;
    p.weighted = true;
  }

  p.batch = sizes[0];
  p.row_tokens = ndim == 1 ? 1 : sizes[1];
  p.normalize = options.normalize;
  p.solver = options.solver;
  p.level = options.level;
  if (const char* problem = plan_groups(tensors.groups, p)) return problem;

  const int64_t rows = p.rows, cols = p.cols;
  if (const TensorView* t = tensors.out) {
    if (!same_shape(*t, sizes, ndim)) return "out: expected the shape of one objective";
    if (t->dtype != p.dtype || !(t->device == p.device)) return "out: expected the dtype and device of advantages";
    p.out = plane(*t);
    if (!distinct(p.out, rows, cols)) return "out: elements share memory";
    const Extent written = extent(t);
    for (int i = 0; i < tensors.n; ++i)
      if (written.meets(extent(&tensors.advantages[i]))) return "out: shares memory with advantages";
    // Columns, each with gaps, in which the others stand.
    const bool dense = adjacent(p.advantages, p.n, p.dtype) && (rows == 1 || p.advantages[0].row == cols * p.n);
    if (dense && written.meets({p.advantages[0].data, rows * cols * p.n * size_of(p.dtype)}))
      return "out: shares memory with advantages";
    if (const char* problem = alias(written, tensors)) return problem;
  }
  if (tensors.in_place && p.normalize.combined != Pool::kNone) return "normalize: combined has no in-place form";
  if (tensors.in_place) {
    constexpr const char* kShared = "advantages: elements share memory, cannot be written in place";
    const int64_t between = p.n > 1 ? (p.advantages[1].data - p.advantages[0].data) / size_of(p.dtype) : 1;
    if (!tensors.listed &&
        !distinct(std::array<Axis, 3>{{{rows, p.advantages[0].row}, {cols, p.advantages[0].col}, {p.n, between}}}))
      return kShared;
    for (int i = 0; i < tensors.n; ++i) {
      const Extent written = extent(&tensors.advantages[i]);
      if (tensors.listed && !distinct(p.advantages[i], rows, cols)) return kShared;
      for (int k = 0; k < i; ++k)
        if (written.meets(extent(&tensors.advantages[k])) ||
            (p.advantages[i].data == p.advantages[k].data && rows * cols > 0))
          return kShared;
      if (const char* problem = alias(written, tensors)) return problem;
    }
  }

  p.log_low = options.log_low;
  p.log_high = options.log_high;
  p.noon = options.noon;
  p.propagate = options.propagate;
  p.skip_inactive = options.skip_inactive;
  p.in_place = tensors.in_place;
  p.solver = options.solver;
  p.level = options.level;
  p.order = p.starts = p.ends = nullptr;
  p.dead = nullptr;
  p.equal_rows = 0;
  p.sums = p.affine = nullptr;
  p.absent_zero = p.measures = false;
  p.per_token = p.level == Level::kSequence && ndim == 1;
  if (p.per_token) p.level = Level::kToken;

  // One long row where every plane's rows follow each other; level sequence needs its rows.
  auto joins = [&](const Plane& q) { return !q.data || q.row == cols * q.col; };
  bool flat =
      p.level != Level::kSequence && !p.normalize.row_sums && joins(p.mask) && joins(p.log_ratio) && joins(p.out);
  for (int i = 0; flat && i < p.n; ++i) flat = joins(p.advantages[i]);
  if (flat && rows != 1) {
    p.cols = rows * cols;
    p.rows = 1;
  }
  return nullptr;
}

}  // namespace pama
