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

template <class Library>
void register_kernels(Library& m) {
  m.impl("combine", TORCH_BOX(&combine));
  m.impl("combine_out", TORCH_BOX(&combine_out));
  m.impl("combine_", TORCH_BOX(&combine_));
  m.impl("min_norm", TORCH_BOX(&min_norm));
  m.impl("gae", TORCH_BOX(&gae));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pama_ext, CPU, m) { register_kernels(m); }
#ifdef PAMA_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(pama_ext, CUDA, m) { register_kernels(m); }
#endif
