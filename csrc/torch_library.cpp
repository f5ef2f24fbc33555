// Door 1, the dispatcher: every operator of this package. Libtorch stable ABI, so one binary serves torch 2.10 and
// later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "torch_runtime.h"

// advantages: the objectives, each [B] or [B, T]; or, if dim is given, one tensor [B, N] / [B, T, N] with them along
// dim. mask, log_ratio, out and the first result: [B] / [B, T]. reward_weights: [N], as a tensor or as numbers.
// normalize: Normalize._spec, or empty; groups: its group_ids or group_offsets. packed: statistics [10, N] in the order
// of ObjectiveStats, weights [N] (level "sequence": [B, N], "group": [G, N]), value [1] ([B], [G]).
#define PAMA_COMBINE_OPTIONS                                                                             \
  "int? dim, Tensor? mask, Tensor? log_ratio, float clip_low, float clip_high, bool noon, str level, "   \
  "str solver, str normalize, Tensor? groups, Tensor? reward_weights, float[]? reward_values, str nan, " \
  "bool skip_inactive"

STABLE_TORCH_LIBRARY(pama_ext, m) {
  m.def("combine(Tensor[] advantages, " PAMA_COMBINE_OPTIONS ") -> (Tensor combined, Tensor packed)");
  m.def("combine_out(Tensor[] advantages, " PAMA_COMBINE_OPTIONS ", Tensor(a!) out) -> Tensor packed");
  m.def("combine_(Tensor(a!)[] advantages, " PAMA_COMBINE_OPTIONS ") -> Tensor packed");
  m.def("min_norm(Tensor gramian) -> Tensor");  // [B, N, N] -> [B, N]
  // rewards, values, bootstrap: a tensor for each objective, [B, T] (with offsets [total]), rewards and bootstrap also
  // [B] ([S]). gamma, lam: [N], as tensors or as numbers. The results have the objectives at dim.
  m.def(
      "gae(Tensor[] rewards, Tensor[] values, int dim, Tensor? mask, Tensor? gamma, float[] gamma_values, "
      "Tensor? lam, float[] lam_values, Tensor? kl_penalty, Tensor[] bootstrap, Tensor? offsets) "
      "-> (Tensor advantages, Tensor returns)");
  // advantages: a tensor [B, T] or [B] for each objective; their sum, by weights [N] (a tensor, or numbers), is the
  // advantage. metrics: the scalars of PolicyMetrics in its order and, per objective, [N] twice. The loss is scale[0]
  // times a sum over tokens, whose derivative by log_probs is gradient; by rows, scale[1 + row] times scale[0].
  m.def(
      "policy_loss(Tensor log_probs, Tensor old_log_probs, Tensor[] advantages, bool per_objective, Tensor? weights, "
      "float[] weight_values, Tensor? mask, Tensor? ref_log_probs, float clip_low, float clip_high, float? dual_clip, "
      "float? max_weight, float kl_coef, str aggregate, Tensor? normalizer, float? normalizer_value, bool "
      "needs_gradient) -> (Tensor loss, Tensor gradient, Tensor scale, Tensor metrics)");
  // values: one tensor [B, T, N], or a tensor [B, T] for each objective, as old_values (none: not clipped) and returns.
  // gradient: [B, T, N], or [N, B, T]. metrics: those of ValueMetrics, [3, N].
  m.def(
      "value_loss(Tensor[] values, Tensor[] old_values, Tensor[] returns, float clip, Tensor? mask, str aggregate, "
      "Tensor? normalizer, float? normalizer_value, bool needs_gradient) "
      "-> (Tensor loss, Tensor gradient, Tensor scale, Tensor metrics)");
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using MaybeTensor = std::optional<Tensor>;

// The str of a schema. Read by hand: torch 2.13's own conversion to std::string leaks one string per call.
std::string text(StringHandle handle) {
  size_t length = 0;
  const char* data = nullptr;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &data);
  std::string result(data, length);
  torch_delete_string(handle);
  return result;
}

pama::DType dtype_of(ScalarType t) {
  switch (t) {
    case ScalarType::Float: return pama::DType::kFloat32;
    case ScalarType::Double: return pama::DType::kFloat64;
    case ScalarType::Half: return pama::DType::kFloat16;
    case ScalarType::BFloat16: return pama::DType::kBFloat16;
    case ScalarType::Bool:
    case ScalarType::Byte:
    case ScalarType::Char: return pama::DType::kInt8;
    case ScalarType::Short:
    case ScalarType::UInt16: return pama::DType::kInt16;
    case ScalarType::Int:
    case ScalarType::UInt32: return pama::DType::kInt32;
    case ScalarType::Long:
    case ScalarType::UInt64: return pama::DType::kInt64;
    default: return pama::DType::kOther;
  }
}

pama::TensorView view(const Tensor& t) {
  const pama::DeviceType type = t.is_cpu()    ? pama::DeviceType::kCPU
                                : t.is_cuda() ? pama::DeviceType::kCUDA
                                              : pama::DeviceType::kOther;
  const int index = type == pama::DeviceType::kCUDA ? t.get_device_index() : 0;
  return {t.data_ptr(),     dtype_of(t.scalar_type()), {type, index}, static_cast<int>(t.dim()),
          t.sizes().data(), t.strides().data()};
}

void* current_stream(const pama::Device& device) {
  void* stream = nullptr;
  if (device.type == pama::DeviceType::kCUDA &&
      (!aoti_torch_get_current_cuda_stream || aoti_torch_get_current_cuda_stream(device.index, &stream)))
    throw std::runtime_error("pama_ext: torch did not tell the current CUDA stream");
  return stream;
}

struct Result {
  Tensor combined, packed;
};

Result run(const Tensors& advantages, std::optional<int64_t> dim, const MaybeTensor& mask, const MaybeTensor& log_ratio,
           double clip_low, double clip_high, bool noon, StringHandle level, StringHandle solver,
           StringHandle normalize, const MaybeTensor& groups, const MaybeTensor& reward_weights,
           const std::optional<std::vector<double>>& reward_values, StringHandle nan, bool skip_inactive,
           const MaybeTensor& out, bool in_place) {
  const pama::CombineOptions options(dim.value_or(-1), clip_low, clip_high, noon, text(level), text(solver),
                                     text(normalize), text(nan), skip_inactive);

  const int count = static_cast<int>(advantages.size());
  if (count < 1 || count > pama::kMaxObjectives) throw std::invalid_argument("advantages: expected 1 to 64 tensors");
  if (dim && count != 1) throw std::invalid_argument("advantages: expected one tensor, as dim is given");
  pama::TensorView views[pama::kMaxObjectives], others[5];
  for (int i = 0; i < count; ++i) views[i] = view(advantages[i]);
  const MaybeTensor* given[5] = {&mask, &log_ratio, &reward_weights, &groups, &out};
  const pama::TensorView* optional[5] = {};
  for (int k = 0; k < 5; ++k)
    if (given[k]->has_value()) optional[k] = &(others[k] = view(given[k]->value()));

  pama::CombineParams params;
  params.weighted = reward_values.has_value();
  if (const char* problem = pama::plan_combine(
          options,
          {views, count, !dim.has_value(), optional[0], optional[1], optional[2], optional[3], optional[4], in_place},
          params))
    throw std::invalid_argument(problem);
  if (reward_values) {
    if (static_cast<int>(reward_values->size()) != params.n)
      throw std::invalid_argument("reward_weights: expected one per objective");
    for (int i = 0; i < params.n; ++i) params.reward_values[i] = (*reward_values)[i];
  }

  const Tensor& first = advantages[0];
  const ScalarType compute = params.dtype == pama::DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Result result;
  if (out) {
    result.combined = *out;
  } else if (!in_place) {
    std::vector<int64_t> sizes(first.sizes().begin(), first.sizes().end());
    if (dim) sizes.erase(sizes.begin() + (*dim < 0 ? *dim + first.dim() : *dim));
    result.combined = torch::stable::empty(sizes, first.scalar_type(), std::nullopt, first.device());
    params.out = {static_cast<char*>(result.combined.data_ptr()), params.cols, 1};
  }
  result.packed = torch::stable::empty({params.packed_size()}, compute, std::nullopt, first.device());
  params.packed = result.packed.data_ptr();
  Tensor workspace;
  if (const int64_t bytes = pama::combine_workspace(params)) {
    workspace = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, first.device());
    params.workspace = workspace.data_ptr();
  }
  pama::run_combine(params, current_stream(params.device));
  return result;
}

std::tuple<Tensor, Tensor> combine(Tensors advantages, std::optional<int64_t> dim, MaybeTensor mask,
                                   MaybeTensor log_ratio, double clip_low, double clip_high, bool noon,
                                   StringHandle level, StringHandle solver, StringHandle normalize, MaybeTensor groups,
                                   MaybeTensor reward_weights, std::optional<std::vector<double>> reward_values,
                                   StringHandle nan, bool skip_inactive) {
  const Result r = run(advantages, dim, mask, log_ratio, clip_low, clip_high, noon, level, solver, normalize, groups,
                       reward_weights, reward_values, nan, skip_inactive, std::nullopt, false);
  return {r.combined, r.packed};
}

Tensor combine_out(Tensors advantages, std::optional<int64_t> dim, MaybeTensor mask, MaybeTensor log_ratio,
                   double clip_low, double clip_high, bool noon, StringHandle level, StringHandle solver,
                   StringHandle normalize, MaybeTensor groups, MaybeTensor reward_weights,
                   std::optional<std::vector<double>> reward_values, StringHandle nan, bool skip_inactive, Tensor out) {
  return run(advantages, dim, mask, log_ratio, clip_low, clip_high, noon, level, solver, normalize, groups,
             reward_weights, reward_values, nan, skip_inactive, out, false)
      .packed;
}

Tensor combine_(Tensors advantages, std::optional<int64_t> dim, MaybeTensor mask, MaybeTensor log_ratio,
                double clip_low, double clip_high, bool noon, StringHandle level, StringHandle solver,
                StringHandle normalize, MaybeTensor groups, MaybeTensor reward_weights,
                std::optional<std::vector<double>> reward_values, StringHandle nan, bool skip_inactive) {
  return run(advantages, dim, mask, log_ratio, clip_low, clip_high, noon, level, solver, normalize, groups,
             reward_weights, reward_values, nan, skip_inactive, std::nullopt, true)
      .packed;
}

Tensor min_norm(Tensor gramian) {
  const pama::TensorView g = view(gramian);
  pama::MinNormParams params;
  if (const char* problem = pama::plan_min_norm(g, params)) throw std::invalid_argument(problem);
  if (g.ndim != 3) throw std::invalid_argument("gramian: expected [B, N, N]");
  const ScalarType compute = params.dtype == pama::DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  Tensor weights = torch::stable::empty({params.batch, params.n}, compute, std::nullopt, gramian.device());
  params.weights = weights.data_ptr();
  Tensor workspace;
  if (const int64_t bytes = pama::min_norm_workspace(params)) {
    workspace = torch::stable::empty({bytes}, ScalarType::Byte, std::nullopt, gramian.device());
    params.workspace = workspace.data_ptr();
  }
  pama::run_min_norm(params, current_stream(params.device));
  return weights;
}

ScalarType scalar_type(pama::DType t) {
  switch (t) {
    case pama::DType::kFloat64: return ScalarType::Double;
    case pama::DType::kFloat16: return ScalarType::Half;
    case pama::DType::kBFloat16: return ScalarType::BFloat16;
    default: return ScalarType::Float;
  }
}

std::tuple<Tensor, Tensor> gae(Tensors rewards, Tensors values, int64_t dim, MaybeTensor mask, MaybeTensor gamma,
                               std::vector<double> gamma_values, MaybeTensor lam, std::vector<double> lam_values,
                               MaybeTensor kl_penalty, Tensors bootstrap, MaybeTensor offsets) {
  const size_t n = values.size();
  if (n < 1 || n > pama::kMaxObjectives) throw std::invalid_argument("values: expected 1 to 64 tensors");
  if (rewards.size() != n) throw std::invalid_argument("rewards: expected one tensor for each of values");
  if (!bootstrap.empty() && bootstrap.size() != n)
    throw std::invalid_argument("bootstrap: expected one tensor for each of values");
  pama::TensorView reward_views[pama::kMaxObjectives], value_views[pama::kMaxObjectives],
      bootstrap_views[pama::kMaxObjectives], others[5];
  for (size_t i = 0; i < n; ++i) {
    reward_views[i] = view(rewards[i]);
    value_views[i] = view(values[i]);
    if (!bootstrap.empty()) bootstrap_views[i] = view(bootstrap[i]);
  }
  const MaybeTensor* given[5] = {&mask, &gamma, &lam, &kl_penalty, &offsets};
  const pama::TensorView* optional[5] = {};
  for (int k = 0; k < 5; ++k)
    if (given[k]->has_value()) optional[k] = &(others[k] = view(given[k]->value()));

  pama::GaeParams params;
  if (const char* problem =
          pama::plan_gae({reward_views, value_views, bootstrap.empty() ? nullptr : bootstrap_views, static_cast<int>(n),
                          optional[0], optional[1], optional[2], optional[3], optional[4], static_cast<int>(dim)},
                         params))
    throw std::invalid_argument(problem);
  for (const bool is_gamma : {true, false}) {
    pama::PerObjective& to = is_gamma ? params.gamma : params.lam;
    const std::vector<double>& numbers = is_gamma ? gamma_values : lam_values;
    if (to.data) continue;
    if (numbers.size() != n) throw std::invalid_argument("gamma, lam: expected one number per objective");
    for (size_t i = 0; i < n; ++i) to.values[i] = numbers[i];
  }

  std::vector<int64_t> sizes(values[0].sizes().begin(), values[0].sizes().end());
  sizes.insert(sizes.begin() + dim, static_cast<int64_t>(n));
  const auto make = [&] {
    return torch::stable::empty(sizes, scalar_type(params.dtype), std::nullopt, values[0].device());
  };
  const Tensor advantages = make(), returns = make();
  params.advantages.data = static_cast<char*>(advantages.data_ptr());
  params.returns.data = static_cast<char*>(returns.data_ptr());
  pama::run_gae(params, current_stream(params.device));
  return {advantages, returns};
}

// Loss, gradient (empty if not wanted), scale and metrics.
using Loss = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Runs a planned loss. `like` is a tensor of the gradient's dtype and device, `sizes` the gradient's.
template <class Params>
Loss run_loss(Params& p, const std::optional<double>& normalizer, bool needs_gradient, const Tensor& like,
              const std::vector<int64_t>& sizes, int64_t (*workspace_of)(const Params&),
              void (*run)(const Params&, void*)) {
  if (normalizer) {
    p.normalized = true;
    p.normalizer_value = *normalizer;
  }
  const auto make = [&](const std::vector<int64_t>& shape, ScalarType dtype) {
    return torch::stable::empty(shape, dtype, std::nullopt, like.device());
  };
  const ScalarType compute = p.wide ? ScalarType::Double : ScalarType::Float;
  const Tensor loss = make({}, compute), scale = make({p.scales()}, compute),
               metrics = make({p.metrics_size()}, compute);
  const Tensor gradient = make(needs_gradient ? sizes : std::vector<int64_t>{0}, like.scalar_type());
  p.loss = loss.data_ptr();
  p.scale = scale.data_ptr();
  p.metrics = metrics.data_ptr();
  if (needs_gradient) p.gradient = static_cast<char*>(gradient.data_ptr());
  Tensor workspace;
  if (const int64_t bytes = workspace_of(p)) {
    workspace = make({bytes}, ScalarType::Byte);
    p.workspace = workspace.data_ptr();
  }
  run(p, current_stream(p.device));
  return {loss, gradient, scale, metrics};
}

// Views of tensors, of which a whole one [B, T, N] makes N.
struct Views {
  std::vector<pama::TensorView> each;
  int64_t sizes[2], strides[2];

  explicit Views(const Tensors& tensors) {
    for (const Tensor& t : tensors) each.push_back(view(t));
    if (each.size() != 1 || each[0].ndim != 3) return;
    const pama::TensorView whole = each[0];
    each.clear();
    for (int d = 0; d < 2; ++d) sizes[d] = whole.sizes[d], strides[d] = whole.strides[d];
    for (int64_t i = 0; i < whole.sizes[2]; ++i)
      each.push_back({static_cast<char*>(whole.data) + i * whole.strides[2] * size_of(whole.dtype), whole.dtype,
                      whole.device, 2, sizes, strides});
  }
  Views(const Views&) = delete;
  int size() const { return static_cast<int>(each.size()); }
};

Loss policy_loss(Tensor log_probs, Tensor old_log_probs, Tensors advantages, bool per_objective, MaybeTensor weights,
                 std::vector<double> weight_values, MaybeTensor mask, MaybeTensor ref_log_probs, double clip_low,
                 double clip_high, std::optional<double> dual_clip, std::optional<double> max_weight, double kl_coef,
                 StringHandle aggregate, MaybeTensor normalizer, std::optional<double> normalizer_value,
                 bool needs_gradient) {
  const size_t n = advantages.size();
  if (n < 1 || n > pama::kMaxObjectives) throw std::invalid_argument("advantages: expected 1 to 64 tensors");
  const pama::PolicyOptions options{clip_low,
                                    clip_high,
                                    dual_clip.value_or(HUGE_VAL),
                                    max_weight.value_or(HUGE_VAL),
                                    kl_coef,
                                    pama::aggregate_named(text(aggregate).c_str())};
  pama::TensorView each[pama::kMaxObjectives], others[6];
  for (size_t i = 0; i < n; ++i) each[i] = view(advantages[i]);
  const MaybeTensor* given[4] = {&weights, &mask, &ref_log_probs, &normalizer};
  const pama::TensorView* optional[4] = {};
  for (int k = 0; k < 4; ++k)
    if (given[k]->has_value()) optional[k] = &(others[k] = view(given[k]->value()));
  others[4] = view(log_probs);
  others[5] = view(old_log_probs);
  pama::PolicyParams params;
  if (const char* problem = pama::plan_policy_loss(options,
                                                   {&others[4], &others[5], each, static_cast<int>(n), per_objective,
                                                    optional[0], optional[1], optional[2], optional[3]},
                                                   params))
    throw std::invalid_argument(problem);
  if (!weights) {
    if (weight_values.size() != n) throw std::invalid_argument("weights: expected one number per objective");
    for (size_t i = 0; i < n; ++i) params.weights.values[i] = weight_values[i];
  }
  const std::vector<int64_t> sizes(log_probs.sizes().begin(), log_probs.sizes().end());
  return run_loss(params, normalizer_value, needs_gradient, log_probs, sizes, pama::policy_loss_workspace,
                  pama::run_policy_loss);
}

Loss value_loss(Tensors values, Tensors old_values, Tensors returns, double clip, MaybeTensor mask,
                StringHandle aggregate, MaybeTensor normalizer, std::optional<double> normalizer_value,
                bool needs_gradient) {
  if (values.empty() || returns.empty()) throw std::invalid_argument("values, returns: expected 1 to 64 tensors");
  const Views value(values), old(old_values), target(returns);
  const int n = value.size();
  if (n < 1 || n > pama::kMaxObjectives) throw std::invalid_argument("values: expected 1 to 64 objectives");
  if (target.size() != n) throw std::invalid_argument("returns: expected as many objectives as values");
  if (!old_values.empty() && old.size() != n)
    throw std::invalid_argument("old_values: expected as many objectives as values");
  pama::TensorView views[2];
  if (mask) views[0] = view(*mask);
  if (normalizer) views[1] = view(*normalizer);
  const bool whole = values[0].dim() == 3;
  pama::ValueParams params;
  const pama::ValueTensors tensors{value.each.data(),
                                   old_values.empty() ? nullptr : old.each.data(),
                                   target.each.data(),
                                   n,
                                   whole,
                                   mask ? &views[0] : nullptr,
                                   normalizer ? &views[1] : nullptr};
  if (const char* problem =
          pama::plan_value_loss(pama::aggregate_named(text(aggregate).c_str()), clip, tensors, params))
    throw std::invalid_argument(problem);
  std::vector<int64_t> sizes(values[0].sizes().begin(), values[0].sizes().end());
  if (!whole) sizes.insert(sizes.begin(), n);
  return run_loss(params, normalizer_value, needs_gradient, values[0], sizes, pama::value_loss_workspace,
                  pama::run_value_loss);
}

template <class Library>
void register_kernels(Library& m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_out", TORCH_BOX(&combine_out));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("min_norm", TORCH_BOX(&min_norm));
  m.impl("gae", TORCH_BOX(&gae));
  m.impl("policy_loss", TORCH_BOX(&policy_loss));
  m.impl("value_loss", TORCH_BOX(&value_loss));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pama_ext, CPU, m) { register_kernels(m); }
#ifdef PAMA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pama_ext, CUDA, m) { register_kernels(m); }
#endif
