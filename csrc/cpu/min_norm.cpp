#include "pama/min_norm.h"

#include <memory>
#include <stdexcept>

namespace pama {

void launch_min_norm_cpu(const MinNormParams& params, ParallelFor parallel_for) {
  constexpr int64_t kOperations = 64 * 1024;  // of the order of 20 us: below, threads do not pay
  auto run = [](int64_t begin, int64_t end, void* opaque) {
    const MinNormParams& p = *static_cast<const MinNormParams*>(opaque);
    const std::unique_ptr<double[]> scratch(new double[min_norm_problem(p.n)]);
    for (int64_t k = begin; k < end; ++k) solve_min_norm(p, k, scratch.get());
  };
  MinNormParams copy = params;
  const int64_t each = static_cast<int64_t>(params.n) * params.n * params.n + 100;
  if (params.batch * each <= kOperations) return run(0, params.batch, &copy);
  if (parallel_for(0, params.batch, kOperations / each + 1, run, &copy) != 0)
    throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace pama
