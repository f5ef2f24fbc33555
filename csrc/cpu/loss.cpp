// launch_policy_loss_cpu, launch_value_loss_cpu, launch_scale_cpu: tokens (or rows, where they count) dealt to threads
// in parts, whose sums meet in order: the same bits whatever the number of threads.
#include "pama/loss.h"

#include <algorithm>
#include <memory>

#include "isa.h"
#include "parts.h"

namespace pama {
namespace {

constexpr int64_t kPlanes = 4;  // about so many are read for each token

// f(first, last, sums) for each part; returns the sums of all.
template <class Sums, class F>
Sums summed(const LossParams& p, int64_t elements, ParallelFor parallel_for, void (*add)(Sums&, const Sums&, int),
            int n, const F& f) {
  const int64_t units = p.by_rows() ? p.rows : p.tokens(), parts = parts_for(elements, units);
  const std::unique_ptr<Sums[]> each(new Sums[parts]());
  for_parts(parallel_for, parts, units, [&](int64_t k, int64_t first, int64_t last) { f(first, last, each[k]); });
  for (int64_t k = 1; k < parts; ++k) add(each[0], each[k], n);
  return each[0];
}

void add_policy(PolicySums& a, const PolicySums& b, int n) {
  a.loss += b.loss;
  a.ratio += b.ratio;
  a.log_ratio += b.log_ratio;
  a.ratio_max = std::max(a.ratio_max, b.ratio_max);
  a.kl += b.kl;
  a.tokens += b.tokens;
  a.sequences += b.sequences;
  a.high += b.high;
  a.low += b.low;
  a.dual += b.dual;
  for (int i = 0; i < n; ++i) {
    a.clipped[i] += b.clipped[i];
    a.gradient[i] += b.gradient[i];
  }
}

void add_values(ValueSums& a, const ValueSums& b, int n) {
  a.tokens += b.tokens;
  a.sequences += b.sequences;
  for (int i = 0; i < n; ++i) {
    a.losses[i] += b.losses[i];
    a.clipped[i] += b.clipped[i];
    a.values[i] += b.values[i];
  }
}

}  // namespace

void launch_policy_loss_cpu(const PolicyParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = active_kernels();
  const PolicySums sums =
      summed<PolicySums>(p, p.tokens() * (kPlanes + p.n - 1), parallel_for, add_policy, p.per_objective ? p.n : 0,
                         [&](int64_t first, int64_t last, PolicySums& to) { kernels.policy_loss(p, first, last, to); });
  if (p.wide) {
    finish_policy_loss<double>(p, sums, sums.clipped, sums.gradient);
  } else {
    finish_policy_loss<float>(p, sums, sums.clipped, sums.gradient);
  }
}

void launch_value_loss_cpu(const ValueParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = active_kernels();
  const ValueSums sums =
      summed<ValueSums>(p, p.tokens() * kPlanes * p.n, parallel_for, add_values, p.n,
                        [&](int64_t first, int64_t last, ValueSums& to) { kernels.value_loss(p, first, last, to); });
  if (p.wide) {
    finish_value_loss<double>(p, sums.tokens, sums.sequences, sums.losses, sums.clipped, sums.values);
  } else {
    finish_value_loss<float>(p, sums.tokens, sums.sequences, sums.losses, sums.clipped, sums.values);
  }
}

void launch_scale_cpu(const ScaleParams& p, ParallelFor parallel_for) {
  const CpuKernels& kernels = active_kernels();
  const int64_t elements = p.elements();
  if (elements == 0) return;
  for_parts(parallel_for, parts_for(elements, elements), elements,
            [&](int64_t, int64_t first, int64_t last) { kernels.scale(p, first, last); });
}

}  // namespace pama
