// launch_value_loss_cuda: one launch per call. launch_scale_cuda: what either loss keeps, scaled by backward.
#include "loss.cuh"

namespace pama {
namespace {

enum Slot { kTokens, kSequences, kSlots };  // then three for each objective

struct Shared {
  double warps[kWarps], totals[kSlots + 3 * kMaxObjectives];
  double losses[kWarps][kMaxObjectives], clipped[kWarps][kMaxObjectives], values[kWarps][kMaxObjectives];
};

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) value_loss_kernel(const __grid_constant__ ValueParams p) {
  __shared__ Shared shared;
  const Team team(p);
  const int warp = threadIdx.x / 32;
  for (int i = threadIdx.x % 32; i < p.n; i += 32)
    shared.losses[warp][i] = shared.clipped[warp][i] = shared.values[warp][i] = 0.0;
  __syncwarp();
  const C clip = static_cast<C>(p.clip);

  int64_t sequences = 0;
  const auto tokens =
      for_tokens<C>(p, team, shared.warps, sequences, [&](const Four& f, const bool* valid, double scale) {
        for (int i = 0; i < p.n; ++i) {  // all lanes, since their sums meet here
          C values[4], targets[4], olds[4] = {}, slopes[4];
          load(p, p.values[i], p.value_dtype, f, values);
          load(p, p.returns[i], p.return_dtype, f, targets);
          if (p.clipped) load(p, p.old_values[i], p.old_dtype, f, olds);
          C total{0}, sum{0};
          double clipped = 0.0;
          for (int k = 0; k < 4; ++k) {
            slopes[k] = C{0};
            if (!valid[k]) continue;
            const C v = values[k], error = v - targets[k];
            C larger = error * error;
            bool flat = false;
            if (p.clipped) {
              const C low = olds[k] - clip, high = olds[k] + clip;
              const C other = (v < low ? low : v > high ? high : v) - targets[k];
              flat = other * other > larger;
              larger = flat ? other * other : larger;
            }
            total += larger;
            sum += v;
            clipped += flat ? 1.0 : 0.0;
            slopes[k] = flat ? C{0} : error;
          }
          if (p.gradient)
            store(p.gradient, p.value_dtype, f.token * p.gradient_col + i * p.gradient_objective, p.gradient_col, f,
                  slopes);
          const double losses = warp_sum(0.5 * static_cast<double>(total) * scale);
          const double sums = warp_sum(static_cast<double>(sum));
          clipped = warp_sum(clipped);
          if (threadIdx.x % 32 == 0) {
            shared.losses[warp][i] += losses;
            shared.values[warp][i] += sums;
            shared.clipped[warp][i] += clipped;
          }
        }
      });

  leave(p, kTokens, static_cast<double>(tokens), shared.warps);
  leave(p, kSequences, static_cast<double>(sequences), shared.warps);
  const int n = p.n;
  leave_objectives(p, kSlots, shared.losses, n);
  leave_objectives(p, kSlots + n, shared.clipped, n);
  leave_objectives(p, kSlots + 2 * n, shared.values, n);
  if (!meet(p, kSlots + 3 * n, -1, shared.totals) || threadIdx.x != 0) return;
  const double* t = shared.totals + kSlots;
  finish_value_loss<C>(p, static_cast<int64_t>(shared.totals[kTokens]), static_cast<int64_t>(shared.totals[kSequences]),
                       t, t + n, t + 2 * n);
}

int64_t blocks(const ValueParams& p) {
  return p.wide ? blocks_for<value_loss_kernel<double>>(p) : blocks_for<value_loss_kernel<float>>(p);
}

// 0 stays 0, whatever the factor is.
template <class S, class C>
__device__ S times(S kept, C factor) {
  const C x = Storage<S>::load(kept);
  return Storage<S>::store(x == C{0} ? x : x * factor);
}

template <class S>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScaleParams p) {
  using C = typename Storage<S>::Compute;
  const S* const from = static_cast<const S*>(p.gradient);
  S* const to = static_cast<S*>(p.out);
  const double all = p.factor();
  const int64_t elements = p.elements();
  const int64_t first = 4 * (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (first >= elements) return;
  const int64_t row = p.row_scales ? first / p.cols : 0;
  const bool one_row = !p.row_scales || (row + 1) * p.cols >= first + 4;
  if (first + 4 <= elements && one_row && holds_quad(from + first) && holds_quad(to + first)) {
    const C factor = static_cast<C>(all * p.row_factor(row));
    Quad<S> quad = *reinterpret_cast<const Quad<S>*>(from + first);
    for (int k = 0; k < 4; ++k) quad.at[k] = times(quad.at[k], factor);
    *reinterpret_cast<Quad<S>*>(to + first) = quad;
    return;
  }
  for (int64_t k = first; k < first + 4 && k < elements; ++k) {
    const C factor = static_cast<C>(all * p.row_factor(p.row_scales ? k / p.cols : 0));
    to[k] = times(from[k], factor);
  }
}

}  // namespace

int64_t value_loss_cuda_workspace(const ValueParams& p) {
  return blocks(p) * (kSlots + 3 * p.n) * static_cast<int64_t>(sizeof(double));
}

void launch_value_loss_cuda(const ValueParams& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  launch_together(p.wide ? reinterpret_cast<const void*>(value_loss_kernel<double>)
                         : reinterpret_cast<const void*>(value_loss_kernel<float>),
                  blocks(p), kThreads, p, stream, "launching value_loss_kernel");
}

void launch_scale_cuda(const ScaleParams& params, void* stream) {
  if (params.elements() == 0) return;
  const DeviceGuard guard(params.device.index);
  ScaleParams copy = params;
  void* arguments[] = {&copy};
  const void* kernel =
      with_dtype(params.dtype, [](auto s) { return reinterpret_cast<const void*>(scale_kernel<decltype(s)>); });
  const int64_t blocks = (params.elements() + 4 * kThreads - 1) / (4 * kThreads);
  check_cuda(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), kThreads, arguments, 0,
                              static_cast<cudaStream_t>(stream)),
             "launching scale_kernel");
  check_cuda(cudaGetLastError(), "after launching scale_kernel");
}

}  // namespace pama
