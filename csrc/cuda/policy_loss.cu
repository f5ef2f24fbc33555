// launch_policy_loss_cuda: one launch per call. A token is read once, and its gradient is written at once; only the
// mask is read twice where rows count, and advantages where each objective has metrics.
#include "loss.cuh"
#include "pama/policy_term.h"

namespace pama {
namespace {

enum Slot { kLoss, kRatio, kLogRatio, kRatioMax, kKl, kTokens, kSequences, kHigh, kLow, kDual, kSlots };

struct Shared {
  double warps[kWarps], totals[kSlots + 2 * kMaxObjectives];
  double clipped[kWarps][kMaxObjectives], gradient[kWarps][kMaxObjectives];  // of each warp
};

__device__ float exponential(float x) { return expf(x); }
__device__ double exponential(double x) { return exp(x); }

// What the loss of a token is, and its derivative by log_prob.
template <class C>
struct Outcome {
  C loss, slope, factor, bounded, u, kl;  // bounded: log_ratio within its limit
  bool high, low, dual;
};

template <class C>
__device__ Outcome<C> outcome(const PolicyParams& p, const PolicyBounds<C>& bounds, C log_prob, C old, C advantage,
                              C ref) {
  Outcome<C> o{};
  const C log_ratio = log_prob - old;
  o.bounded = to_limit(log_ratio);
  o.u = exponential(o.bounded);
  const auto term = p.truncated ? policy_term<true, bool>(bounds, log_prob, log_ratio, o.bounded, o.u, advantage)
                                : policy_term<false, bool>(bounds, log_prob, log_ratio, o.bounded, o.u, advantage);
  o.loss = term.loss;
  o.factor = term.factor;
  o.slope = term.slope;
  o.high = term.high;
  o.low = term.low;
  o.dual = term.dual;
  if (p.ref_log_probs.data) {
    const C apart = ref - log_prob, limited = to_limit(apart);
    o.kl = exp_beyond(limited);
    if (p.kl_coef != 0.0) {
      const C coef = static_cast<C>(p.kl_coef);
      o.loss += coef * o.kl;
      if (limited == apart) o.slope -= coef * (o.kl + limited);
    }
  }
  return o;
}

template <class C>
__global__ void __launch_bounds__(kThreads, kBlocksPerSM) policy_loss_kernel(const __grid_constant__ PolicyParams p) {
  __shared__ Shared shared;
  const PolicyBounds<C> bounds(p);
  const Team team(p);
  const int warp = threadIdx.x / 32;
  for (int i = threadIdx.x % 32; i < p.n; i += 32) shared.clipped[warp][i] = shared.gradient[warp][i] = 0.0;
  __syncwarp();

  double loss = 0.0, ratio = 0.0, log_ratio = 0.0, kl = 0.0;
  C ratio_max{0};
  int64_t sequences = 0, high = 0, low = 0, dual = 0;
  const auto tokens =
      for_tokens<C>(p, team, shared.warps, sequences, [&](const Four& f, const bool* valid, double scale) {
        C log_probs[4], olds[4], refs[4] = {}, advantages[4] = {}, each[4], slopes[4], factors[4];
        load(p, p.log_probs, p.log_prob_dtype, f, log_probs);
        load(p, p.old_log_probs, p.old_dtype, f, olds);
        if (p.ref_log_probs.data) load(p, p.ref_log_probs, p.ref_dtype, f, refs);
        for (int i = 0; i < p.n; ++i) {
          const C weight = static_cast<C>(p.weights[i]);
          if (weight == C{0}) continue;  // adds nothing, whatever stands there
          load(p, p.advantages[i], p.advantage_dtype, f, each);
          for (int k = 0; k < 4; ++k) advantages[k] += weight * each[k];
        }
        C losses{0}, ratios{0}, logs{0}, kls{0};
        for (int k = 0; k < 4; ++k) {
          slopes[k] = factors[k] = C{0};
          if (!valid[k]) continue;
          const Outcome<C> o = outcome(p, bounds, log_probs[k], olds[k], advantages[k], refs[k]);
          slopes[k] = o.slope;
          factors[k] = o.factor;
          log_probs[k] = o.bounded;  // from here on
          losses += o.loss;
          ratios += o.u;
          logs += o.bounded;
          kls += o.kl;
          ratio_max = o.u > ratio_max ? o.u : ratio_max;
          high += o.high;
          low += o.low;
          dual += o.dual;
        }
        loss += static_cast<double>(losses) * scale;
        ratio += static_cast<double>(ratios);
        log_ratio += static_cast<double>(logs);
        kl += static_cast<double>(kls);
        if (p.gradient) store(p.gradient, p.log_prob_dtype, f.token, 1, f, slopes);
        if (!p.per_objective) return;

        for (int i = 0; i < p.n; ++i) {  // all lanes, since their sums meet here
          load(p, p.advantages[i], p.advantage_dtype, f, each);
          const C weight = static_cast<C>(p.weights[i]);
          double clipped = 0.0;
          C moved{0};
          for (int k = 0; k < 4; ++k) {
            if (!valid[k]) continue;
            const bool beyond = p.truncated ? each[k] != C{0} && log_probs[k] > bounds.log_max
                                            : (each[k] > C{0} && log_probs[k] > bounds.log_high) ||
                                                  (each[k] < C{0} && log_probs[k] < bounds.log_low);
            clipped += beyond ? 1.0 : 0.0;
            const C part = weight != C{0} ? weight * each[k] * factors[k] : C{0};
            moved += part < C{0} ? -part : part;
          }
          clipped = warp_sum(clipped);
          const double gradient = warp_sum(static_cast<double>(moved) * scale);
          if (threadIdx.x % 32 == 0) {
            shared.clipped[warp][i] += clipped;
            shared.gradient[warp][i] += gradient;
          }
        }
      });

  const auto put = [&](int k, double x) { leave(p, k, x, shared.warps, k == kRatioMax); };
  put(kLoss, loss);
  put(kRatio, ratio);
  put(kLogRatio, log_ratio);
  put(kRatioMax, static_cast<double>(ratio_max));
  put(kKl, kl);
  put(kTokens, static_cast<double>(tokens));
  put(kSequences, static_cast<double>(sequences));
  put(kHigh, static_cast<double>(high));
  put(kLow, static_cast<double>(low));
  put(kDual, static_cast<double>(dual));
  const int n = p.per_objective ? p.n : 0;
  leave_objectives(p, kSlots, shared.clipped, n);
  leave_objectives(p, kSlots + n, shared.gradient, n);
  if (!meet(p, kSlots + 2 * n, kRatioMax, shared.totals) || threadIdx.x != 0) return;
  const double* t = shared.totals;
  const auto count = [&](Slot k) { return static_cast<int64_t>(t[k]); };
  const PolicyTotals totals{t[kLoss],       t[kRatio],         t[kLogRatio], t[kRatioMax], t[kKl],
                            count(kTokens), count(kSequences), count(kHigh), count(kLow),  count(kDual)};
  finish_policy_loss<C>(p, totals, t + kSlots, t + kSlots + n);
}

int64_t blocks(const PolicyParams& p) {
  return p.wide ? blocks_for<policy_loss_kernel<double>>(p) : blocks_for<policy_loss_kernel<float>>(p);
}

}  // namespace

int64_t policy_loss_cuda_workspace(const PolicyParams& p) {
  return blocks(p) * (kSlots + (p.per_objective ? 2 * p.n : 0)) * static_cast<int64_t>(sizeof(double));
}

void launch_policy_loss_cuda(const PolicyParams& p, void* stream) {
  const DeviceGuard guard(p.device.index);
  launch_together(p.wide ? reinterpret_cast<const void*>(policy_loss_kernel<double>)
                         : reinterpret_cast<const void*>(policy_loss_kernel<float>),
                  blocks(p), kThreads, p, stream, "launching policy_loss_kernel");
}

}  // namespace pama
