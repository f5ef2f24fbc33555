// csrc/cuda/policy_loss.cu (POLICY_CU) or csrc/cuda/value_loss.cu (VALUE_CU) as a host library, for
// tests/test_loss_on_host.py. Tensors are contiguous; dtype is a pama::DType of the floats, masks are bool.
#include <cmath>
#include <vector>

#include "pama/loss.h"

template <class Params>
static void call_with(const void* argument, const void* kernel) {
  reinterpret_cast<void (*)(Params)>(const_cast<void*>(kernel))(*static_cast<const Params*>(argument));
}

static bool scaling;  // which parameter struct the kernel takes
static void call_kernel(const void* argument, const void* kernel) {
#ifdef POLICY_CU
  call_with<pama::PolicyParams>(argument, kernel);
#else
  scaling ? call_with<pama::ScaleParams>(argument, kernel) : call_with<pama::ValueParams>(argument, kernel);
#endif
}

#ifdef POLICY_CU
#include POLICY_CU
#else
#include VALUE_CU
#endif

using namespace pama;

static const Device kDevice{DeviceType::kCUDA, 0};

struct Contiguous : TensorView {
  int64_t shape[3], steps[3];

  Contiguous(const void* memory, DType type, std::vector<int64_t> size) {
    data = const_cast<void*>(memory);
    dtype = type;
    device = kDevice;
    ndim = static_cast<int>(size.size());
    int64_t step = 1;
    for (int d = ndim; d-- > 0; step *= size[d]) shape[d] = size[d], steps[d] = step;
    sizes = shape;
    strides = steps;
  }
  const TensorView* given() const { return data ? this : nullptr; }
};

// Fills outputs with NaN first: loss and scale and metrics lie one behind the other in `results`.
template <class Params>
static std::vector<double> prepare(Params& p, void* results, int64_t workspace, int order) {
  std::vector<double> memory(workspace / sizeof(double) + 1, NAN);
  const int64_t size = p.wide ? 8 : 4;
  p.loss = results;
  p.scale = static_cast<char*>(results) + size;
  p.metrics = static_cast<char*>(p.scale) + size * p.scales();
  p.workspace = memory.data();
  host::order = order;
  return memory;
}

#ifdef POLICY_CU
// sizes: B, T, N; N is 0 where there is one advantage, [B, T] or, by_row, [B]; else they are [B, T, N] or [B, N].
// numbers: clip_low, clip_high, dual_clip, max_weight, kl_coef, normalizer (< 0: none).
extern "C" const char* policy_on_host(const void* log_probs, const void* old, const void* advantages, const void* ref,
                                      const void* mask, const int64_t* sizes, bool by_row, const double* numbers,
                                      const double* weights, const char* aggregate, int dtype, int order,
                                      void* gradient, void* results) {
  const DType type = static_cast<DType>(dtype);
  const int64_t rows = sizes[0], cols = sizes[1];
  const int n = sizes[2] ? static_cast<int>(sizes[2]) : 1;
  const Contiguous l(log_probs, type, {rows, cols}), o(old, type, {rows, cols}), r(ref, type, {rows, cols}),
      m(mask, DType::kInt8, {rows, cols});
  const int64_t steps[2] = {by_row ? n : cols * n, n};
  std::vector<TensorView> each;
  for (int i = 0; i < n; ++i)
    each.push_back({(char*)advantages + i * size_of(type), type, kDevice, by_row ? 1 : 2, sizes, steps});
  const PolicyOptions options{numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], aggregate_named(aggregate)};
  PolicyParams p;
  if (const char* problem =
          plan_policy_loss(options, {&l, &o, each.data(), n, sizes[2] > 0, nullptr, m.given(), r.given(), nullptr}, p))
    return problem;
  std::copy(weights, weights + n, p.weights.values);
  p.normalized = numbers[5] >= 0;
  p.normalizer_value = numbers[5];
  const auto memory = prepare(p, results, policy_loss_cuda_workspace(p), order);
  p.gradient = static_cast<char*>(gradient);
  launch_policy_loss_cuda(p, nullptr);
  return nullptr;
}
#else
// sizes: B, T, N. last: the gradient has its objectives last, else first. clip < 0: none.
extern "C" const char* value_on_host(const void* values, const void* old, const void* returns, const void* mask,
                                     const int64_t* sizes, bool last, double clip, const char* aggregate, int dtype,
                                     int order, void* gradient, void* results) {
  const DType type = static_cast<DType>(dtype);
  const int64_t rows = sizes[0], cols = sizes[1];
  const int n = static_cast<int>(sizes[2]);
  const int64_t steps[2] = {cols * n, n};
  std::vector<TensorView> v, o, r;
  for (int i = 0; i < n; ++i) {
    const auto add = [&](std::vector<TensorView>& to, const void* data) {
      to.push_back({(char*)data + i * size_of(type), type, kDevice, 2, sizes, steps});
    };
    add(v, values);
    add(o, old);
    add(r, returns);
  }
  const Contiguous m(mask, DType::kInt8, {rows, cols});
  ValueParams p;
  if (const char* problem = plan_value_loss(aggregate_named(aggregate), clip,
                                            {v.data(), clip < 0 ? nullptr : o.data(), r.data(), n, last, m.given()}, p))
    return problem;
  const auto memory = prepare(p, results, value_loss_cuda_workspace(p), order);
  p.gradient = static_cast<char*>(gradient);
  scaling = false;
  launch_value_loss_cuda(p, nullptr);
  return nullptr;
}

// gradient: [repeats, B, cols]; scale [scales].
extern "C" const char* scale_on_host(const void* gradient, const void* incoming, const void* scale, int64_t scales,
                                     const int64_t* sizes, int dtype, bool wide, void* out) {
  const DType compute = wide ? DType::kFloat64 : DType::kFloat32;
  const Contiguous g(gradient, static_cast<DType>(dtype), {sizes[0], sizes[1], sizes[2]}), i(incoming, compute, {}),
      s(scale, compute, {scales});
  ScaleParams p;
  if (const char* problem = plan_scale(g, i, s, 1, p)) return problem;
  p.out = out;
  scaling = true;
  launch_scale_cuda(p, nullptr);
  return nullptr;
}
#endif
