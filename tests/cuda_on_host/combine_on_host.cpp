// csrc/cuda/combine.cu as a host library for tests/test_cuda_on_host.py.
#include <vector>

#include "pama/combine.h"

static void call_kernel(const void* argument, const void* kernel) {
  reinterpret_cast<void (*)(pama::CombineParams)>(const_cast<void*>(kernel))(
      *static_cast<const pama::CombineParams*>(argument));
}

#include COMBINE_CU
#include NORMALIZE_CU

// The device that is imitated from here on.
extern "C" void use_device(int compute_capability, int shared_bytes, int multiprocessors, int cache_bytes) {
  const host::Imitated wanted{compute_capability, shared_bytes, multiprocessors, cache_bytes};
  const auto known = std::find(host::devices.begin(), host::devices.end(), wanted);
  host::device = static_cast<int>(known - host::devices.begin());
  if (known == host::devices.end()) host::devices.push_back(wanted);
}

static pama::Meeting met;
static pama::Access accessed;
extern "C" int last_meeting() { return static_cast<int>(met); }
extern "C" int last_access() { return static_cast<int>(accessed); }
extern "C" int last_launches() { return host::launches; }

// Tensors are dense: advantages [sizes[0], sizes[1], sizes[2]] with the objectives last in memory, or where
// `objectives` says, the result by rows or `transposed`; mask bool, log_ratio float32, groups int64 [n_groups], each or
// null. Returns the number of blocks, or -1 with what does not fit in `problem`.
extern "C" int combine_on_host(void* advantages, int dtype, const int64_t* sizes, void* mask, void* log_ratio,
                               void* out, void* packed, const double* reward_values, const char* level,
                               const char* solver, const char* normalize, void* groups, int64_t n_groups, int noon,
                               int propagate, int skip_inactive, int objectives, int transposed, unsigned order,
                               const char** problem) {
  using namespace pama;
  const Device cpu{DeviceType::kCPU, host::device};
  const int64_t in_memory[3][3] = {{sizes[1] * sizes[2], sizes[2], 1},   // last
                                   {sizes[1], 1, sizes[0] * sizes[1]},   // first
                                   {sizes[1] * sizes[2], 1, sizes[1]}};  // in the middle
  const int64_t *strides = in_memory[objectives], plane[2] = {sizes[1], 1}, columns[2] = {1, sizes[0]}, one = 1;
  const TensorView a{advantages, static_cast<DType>(dtype), cpu, 3, sizes, strides};
  const TensorView m{mask, DType::kInt8, cpu, 2, sizes, plane}, l{log_ratio, DType::kFloat32, cpu, 2, sizes, plane};
  const TensorView o{out, static_cast<DType>(dtype), cpu, 2, sizes, transposed ? columns : plane};
  const TensorView g{groups, DType::kInt64, cpu, 1, &n_groups, &one};
  const CombineOptions options(-1, 0.2, 0.2, noon, level, solver, normalize, propagate ? "propagate" : "ignore",
                               skip_inactive);
  CombineParams p;
  *problem = plan_combine(options,
                          {&a, 1, false, mask ? &m : nullptr, log_ratio ? &l : nullptr, nullptr, groups ? &g : nullptr,
                           out ? &o : nullptr, out == nullptr},
                          p);
  if (*problem) return -1;
  p.weighted = reward_values != nullptr;
  for (int i = 0; reward_values && i < p.n; ++i) p.reward_values[i] = reward_values[i];
  constexpr int kCanary = 32;
  const int64_t doubles = (combine_cuda_workspace(p) + 7) / 8;
  std::vector<double> workspace(doubles + kCanary, NAN);
  p.workspace = workspace.data();
  p.packed = packed;
  host::order = order;
  host::launches = 0;
  launch_combine_cuda(p, nullptr);
  for (int64_t k = doubles; k < doubles + kCanary; ++k)
    if (!std::isnan(workspace[k])) std::terminate();  // written beyond the workspace
  met = p.meeting;
  accessed = p.access;
  return host::blocks_together;
}
